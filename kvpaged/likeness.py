"""How like a model's own predictions those are that it makes over coded K and V."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpaged.cache import PagedKVCache
from kvpaged.formats.kv import KVFormat
from kvpaged.geometry import LayerGroup

Kind = tuple[int, str]
"""A layer, and "k" or "v"."""


class Likeness(NamedTuple):
    """Predictions beside exact ones; means over tokens.

    Attributes:
        nll: negative log likelihood of the text.
        kl: KL(exact || these).
        agree: share of tokens of which the most likely one is the same.
    """

    nll: float
    kl: float
    agree: float


class Measured(NamedTuple):
    """A format on some windows.

    Attributes:
        bits: for each element of K and V in a full page, all in.
        kl, kl_error: see `Likeness`; the standard error over windows.
        change, change_error: of the perplexity, relative (0.01 is 1 %).
    """

    bits: float
    kl: float
    kl_error: float
    change: float
    change_error: float

    def __str__(self) -> str:
        return (
            f"{self.bits:5.2f} bits, KL {self.kl:.2e} +-{self.kl_error:.0e}, perplexity "
            f"{100 * self.change:+.2f} % +-{100 * self.change_error:.2f}"
        )


def likeness(exact: Tensor, found: Tensor, wanted: Tensor) -> Likeness:
    """Of logits `[tokens, vocabulary]` beside the exact ones, and the text's tokens, int64
    `[tokens]`.
    """
    p, q = exact.float().log_softmax(-1), found.float().log_softmax(-1)
    nll = -q.gather(1, wanted[:, None]).double().mean()
    kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).mean()
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return Likeness(float(nll), float(kl), float(agree))


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; of a single value that is not a number."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def bits_per_element(groups: Sequence[LayerGroup], kv_format: KVFormat) -> float:
    """Bits of full pages of a model for each element of K and V, scales and padding in them."""
    size = elements = 0
    for group in groups:
        geometry, sealed = group.geometry, kv_format.sealed(group)
        size += geometry.page_bytes if sealed is None else sealed.page_bytes
        elements += geometry.layers * geometry.slice_bytes // geometry.itemsize
    return 8 * size / elements


class Probe:
    """Some windows of a text, and the exact model's predictions on them. One thread.

    Attributes:
        groups: of the model's layers.
    """

    def __init__(self, model: Any, rows: Tensor, cache: Callable[[KVFormat], PagedKVCache]) -> None:
        """`rows`: int64 `[windows, tokens + 1]`, each with the token after it; `cache` makes a
        cache of the model.
        """
        self._model, self._rows, self._cache = model, rows, cache
        with cache(KVFormat()) as exact:
            self.groups = exact.groups
            self._exact = [self._logits(exact, row) for row in rows[:, None]]
        self._own = [self._like(n, logits) for n, logits in enumerate(self._exact)]

    def measure(self, kv_format: KVFormat) -> Measured:
        """A format on all windows."""
        with self._cache(kv_format) as cache:
            rows = enumerate(self._rows[:, None])
            found = [self._like(n, self._logits(cache, row)) for n, row in rows]
        kl, kl_error = mean([each.kl for each in found])
        pairs = zip(found, self._own, strict=True)
        rise, rise_error = mean([each.nll - own.nll for each, own in pairs])
        bits, ratio = bits_per_element(self.groups, kv_format), math.exp(rise)
        return Measured(bits, kl, kl_error, ratio - 1, ratio * rise_error)

    @torch.inference_mode()
    def _logits(self, cache: PagedKVCache, row: Tensor) -> Tensor:
        """Of the second half of a window, `[tokens, vocabulary]`."""
        ids = row[:, :-1]
        with cache.session(ids, private=True) as past:
            scored = ids.shape[1] - ids.shape[1] // 2
            out = self._model(ids, past_key_values=past, logits_to_keep=scored)
        found: Tensor = out.logits[0]
        return found

    def _like(self, row: int, logits: Tensor) -> Likeness:
        return likeness(self._exact[row], logits, self._rows[row, -len(logits) :])
