"""Attention of packed passes by native code, on a CPU."""

import logging

from torch import Tensor

from kvpaged.books import CacheBooks
from kvpaged.step import GroupStep, Step
from kvpaged_kernels.cpu.native import NativeError
from kvpaged_kernels.cpu.native_attend import NativeLayer, NativeStep, form_of

log = logging.getLogger("kvpaged")


class NativeAttention:
    """The layers of a cache, as native code has them. One thread at a time.

    A layer's code is made when it first attends, in the passes that a model is checked by. Where
    none can be made, stock torch serves from then on, and a warning says why, once.
    """

    def __init__(self, cache: CacheBooks) -> None:
        self._books = cache
        self._layers: dict[int, NativeLayer] = {}
        # Compressed pages have native code of their own, below `Batch.attend`.
        self._failed = cache.compressed or any(backend != "cpu" for backend in cache.backends)
        # Of the step that runs, by layer group.
        self._steps: dict[int, tuple[GroupStep, NativeStep]] = {}

    def attend(
        self, step: Step, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float,
        softcap: float | None, sinks: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """Put K and V of a layer into pages and attend.

        Args:
            step: running.
            layer: the model's.
            q, k, v: `[tokens, heads, width]`, any strides with the last 1.
            scale, softcap, sinks: as of `Batch.attend`.

        Returns:
            `[tokens, q_heads, width]`; `None`: there is no native code, and nothing was done.
        """
        if self._failed:
            return None
        home = self._books.home_of(layer)
        group = step.groups[home.group]
        made = self._layers.get(layer)
        if made is None or made.options != (scale, softcap):
            made = self._make(layer, q, scale, softcap)
            if made is None:
                return None
        known = self._steps.get(home.group)
        if known is None or known[0] is not group or known[1].form != form_of(q, k, v):
            planned = made.plan(q, k, v, group.table, group.lengths, group.cu_q)
            known = self._steps[home.group] = group, planned
        step.wait_layer(home.group, home.place)
        out = made(known[1], q, k, v, sinks)
        step.written.add(layer)
        step.attended.add(layer)
        return out

    def _make(
        self, layer: int, q: Tensor, scale: float, softcap: float | None
    ) -> NativeLayer | None:
        home = self._books.home_of(layer)
        pages = home.layers[home.place]
        if pages.v_pages is None:
            return None
        try:
            made = NativeLayer(
                pages.k_pages, pages.v_pages, q.shape[1], scale=scale, window=home.window,
                softcap=softcap,
            )  # fmt: skip
        except NativeError as error:
            self._failed = True
            log.warning("attention stays with stock torch: %s", error)
            return None
        self._layers[layer] = made
        return made
