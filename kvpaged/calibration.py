"""A format for a model, layer by layer: the fewest bits within a budget of perplexity.

What coding one layer's K, or its V, does to the model's predictions is measured by itself: the
Kullback-Leibler divergence KL(exact || coded) of the next token, a mean over tokens. Of text that
the model would write itself, it is the expected rise of the log perplexity; it scatters about ten
times less from window to window than the rise on a given text does, so a few windows will do. Small
divergences add up, so the best codes under a limit are a matter of arithmetic (`formats.choice`);
whether they do add up is measured with the chosen ones, on other windows.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kvpaged.cache import PagedKVCache
from kvpaged.config import Backend
from kvpaged.errors import ConfigError
from kvpaged.formats.choice import Option, choose
from kvpaged.formats.kv import CODES, EXACT, KVFormat, is_int4, slice_layout
from kvpaged.integrations.queries import observe_queries
from kvpaged.likeness import Kind, Measured, Probe
from kvpaged.texts import Texts, ids_of, windows_of

TRIES = 5
"""Choices that are measured before the best that held is taken."""

NEAR = 0.85
"""A choice that uses this much of the budget is not improved upon."""

LEAST = {"int4g64": 1.0, "int4": 1 / 2.5, "int4g16": 1 / 6.25}
"""Of codes of 4 bits, none does less harm than this beside the others: of numbers that share a
scale, half as many have at most 1.6 times finer steps, and harm goes with their square.
"""

LEAST_OF_8 = 1 / 400
"""The same of a code of 8 bits beside any: its steps are 17 times finer than those of 4 bits."""

COLLAPSE_KL, COLLAPSE_CHANGE = 0.2, 0.2
"""A format is said to collapse beyond this divergence, or this rise of the perplexity."""

BITS = {"fp8": 8.0, "int8": 8.0, "int4g16": 5.0, "int4": 4.5, "int4g64": 4.25}
"""About as many as codes have, of pages of 64."""

KINDS = ("k", "v")

Harm = dict[Kind, dict[str, float]]
"""By layer and kind, and code: the divergence of coding nothing but that, where it was measured."""

Ways = dict[int, dict[tuple[str, str], int]]
"""By layer: how it can be coded, with the bytes each way takes in a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        format: to be given to `for_model(kv_format=...)`; `format.to_json()` saves it.
        budget: the rise of the perplexity that was allowed.
        measured: the format, on windows that nothing was chosen by.
        uniform: by code: all layers' K and V coded so, on the same windows.
        harm: by layer and "k" or "v", and code: the divergence of coding nothing but that; of the
            coarsest code, and of others where they were considered.
        collapses: uniform codes that ruin the model (`COLLAPSE_KL`, `COLLAPSE_CHANGE`).
        causes: of the coarsest code: what makes up nine tenths of its divergence, the worst first.
    """

    format: KVFormat
    budget: float
    measured: Measured
    uniform: Mapping[str, Measured]
    harm: Mapping[Kind, Mapping[str, float]]
    collapses: tuple[str, ...]
    causes: tuple[Kind, ...]

    @property
    def coarsest(self) -> str:
        """Of the codes to choose from, the one with the fewest bits."""
        return min(self.uniform, key=BITS.__getitem__)

    @property
    def bits(self) -> float:
        """For each element of K and V in a full page, all in."""
        return self.measured.bits

    def report(self) -> str:
        """All of it, in lines for people."""
        limit = math.log1p(self.budget)
        lines = [
            f"budget: perplexity +{100 * self.budget:g} %, a divergence of {limit:.5f}",
            f"chosen   {self.measured}",
            *(f"{code:<8} {measured}" for code, measured in self.uniform.items()),
        ]
        worst = ", ".join(f"{kind.upper()} of layer {layer}" for layer, kind in self.causes[:8])
        more = f" and {len(self.causes) - 8} more" if len(self.causes) > 8 else ""
        lines += [f"the model collapses with {code} in all layers" for code in self.collapses]
        if self.collapses:
            lines.append(f"what weighs most, as {self.coarsest}: {worst}{more}")
        lines.append("layer: K, V")
        for layer in sorted({layer for layer, _ in self.harm}):
            k, v = self.format.codes(layer)
            lines.append(f"{layer:5}: {k}, {v}   {self._harms(layer)}")
        return "\n".join(lines)

    def _harms(self, layer: int) -> str:
        each = [
            f"{kind.upper()} {code} {harm:.1e}"
            for kind in "kv"
            for code, harm in self.harm.get((layer, kind), {}).items()
        ]
        return "alone: " + ", ".join(each)

    def __str__(self) -> str:
        return self.report()


def calibrate(
    model: Any,
    texts: Texts,
    *,
    budget: float = 0.005,
    formats: Sequence[str] = ("fp8", "int8", "int4g16", "int4", "int4g64"),
    tokenizer: Any = None,
    page_size: int = 64,
    keep: int = 1,
    windows: int = 2,
    held_out: int = 4,
    length: int = 512,
    memory: int | str = "1GiB",
    backend: Backend | None = None,
    say: Callable[[str], None] | None = None,
) -> Calibration:
    """Choose how each layer of a model codes K and V, for the fewest bits within a budget.

    What the model's queries are like is measured first, and keys of 4 bits are coded towards it, as
    with `tune`. Then each layer's K and V are coded by themselves, as the coarsest of `formats`,
    and their effect on the windows is measured (two passes a layer); that of a finer code where the
    coarse one does too much. What is chosen is measured on held-out windows, and chosen again where
    it misses the budget or leaves much of it.

    Best done with the model in fp32. In 16 bits what is coded turns roundings over all the way up,
    so each divergence has a floor, and floors add up; the choice holds its budget all the same, for
    it is measured as a whole.

    Args:
        model: a `transformers` causal LM, in eval mode, that `for_model` serves.
        texts: what it is to be good at: strings, with a `tokenizer`, or token ids.
        budget: the relative rise of the perplexity that is allowed, 0.005 being 0.5 %. It is the
            divergence that is held to `log(1 + budget)`: see the module.
        formats: codes to choose from, of `kvpaged.formats.kv.CODES`; exact ones are among them in
            any case.
        tokenizer: makes token ids of strings.
        page_size, keep, memory, backend: of the caches, as in `for_model` and `KVFormat`.
        windows: that harms are measured on.
        held_out: that choices are measured on.
        length: tokens a window; the second half are scored.
        say: told what is done, a line at a time.

    Raises:
        ConfigError: an argument is impossible, or no layer can be coded so.
        UsageError: the texts are too short, or are strings and there is no tokenizer.
        UnsupportedModelError: see `for_model`.
    """
    codes = [code for code in dict.fromkeys(formats) if code != EXACT]
    if not codes or not set(codes) <= set(CODES):
        raise ConfigError(f"formats are of {', '.join(CODES[1:])}; got {list(formats)}")
    if budget <= 0 or windows < 1 or held_out < 1 or length < (keep + 2) * page_size:
        raise ConfigError(
            "a calibration has a budget above 0, windows to measure and to hold out, of at least "
            f"{(keep + 2) * page_size} tokens; got {budget}, {windows}, {held_out}, {length}"
        )
    rows = windows_of(ids_of(texts, tokenizer), windows + held_out, length).to(model.device)
    own = [n * (windows + held_out) // windows for n in range(windows)]
    others = [n for n in range(len(rows)) if n not in own]
    work = _Work(model, codes, page_size, keep, memory, backend, say or _nothing)
    return work.calibrate(rows[own], rows[others], budget)


def _nothing(line: str) -> None:
    pass


class _Work:
    """One calibration under way."""

    def __init__(
        self, model: Any, codes: Sequence[str], page_size: int, keep: int, memory: int | str,
        backend: Backend | None, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._model, self._codes, self._keep, self._say = model, list(codes), keep, say
        self._coarsest = min(self._codes, key=BITS.__getitem__)
        self._base = KVFormat(name="calibrated", keep=keep)
        self._options: dict[str, Any] = {
            "memory": memory, "page_size": page_size, "backend": backend,
        }  # fmt: skip

    def calibrate(self, own: Tensor, others: Tensor, budget: float) -> Calibration:
        """See `calibrate`: `own` windows are for harms, `others` for choices."""
        if any(map(is_int4, self._codes)):
            self._base = self._base.with_queries(observe_queries(self._model, own[:, :-1]))
        probe = Probe(self._model, own, self._cache)
        ways = self._ways(probe)
        harm = self._harms(probe, ways)
        held_out = Probe(self._model, others, self._cache)
        uniform = {}
        for code in self._codes:
            uniform[code] = held_out.measure(self._format(dict.fromkeys(ways, (code, code))))
            self._say(f"{code} in all layers: {uniform[code]}")
        chosen, measured = self._choose(probe, held_out, ways, harm, budget)
        chosen = replace(chosen, queries={
            layer: like for layer, like in chosen.queries.items()
            if is_int4(chosen.codes(layer)[0])
        })  # fmt: skip
        collapses = tuple(
            code for code, found in uniform.items()
            if found.kl > COLLAPSE_KL or found.change > COLLAPSE_CHANGE
        )  # fmt: skip
        return Calibration(
            format=chosen, budget=budget, measured=measured, uniform=uniform, harm=harm,
            collapses=collapses, causes=self._causes(harm),
        )  # fmt: skip

    def _cache(self, kv_format: KVFormat) -> PagedKVCache:
        """A cache of the model in a format, which nobody shares pages of."""
        return PagedKVCache.for_model(
            self._model, kv_format=kv_format, prefix_sharing=False, checksums=False,
            **self._options,
        )  # fmt: skip

    def _format(self, layers: Mapping[int, tuple[str, str]]) -> KVFormat:
        return replace(self._base, layers=dict(layers))

    def _ways(self, probe: Probe) -> Ways:
        """By layer: the ways to code it, with the bytes each takes in a page."""
        found: Ways = {}
        for group in probe.groups:
            geometry = group.geometry
            ways = {(EXACT, EXACT): geometry.slice_bytes}
            if geometry.v_width:  # a group without V stays as it is
                for k, v in itertools.product([EXACT, *self._codes], repeat=2):
                    ways[k, v] = slice_layout(geometry, k, v).slice_bytes
                found |= dict.fromkeys(group.layers, ways)
        if not found:
            raise ConfigError("no layer of the model has both K and V")
        return dict(sorted(found.items()))

    # -- what each code does -----------------------------------------------------------------------

    def _harms(self, probe: Probe, layers: Iterable[int]) -> Harm:
        """See `Calibration.harm`: of the coarsest code."""
        harm: Harm = {}
        for layer, kind in itertools.product(layers, KINDS):
            self._measure_one(probe, harm, (layer, kind), self._coarsest)
        return harm

    def _measure_one(self, probe: Probe, harm: Harm, of: Kind, code: str) -> None:
        layer, kind = of
        codes = (code, EXACT) if kind == "k" else (EXACT, code)
        found = probe.measure(self._format({layer: codes}))
        harm.setdefault(of, {})[code] = max(found.kl, 0.0)
        self._say(f"{kind.upper()} of layer {layer} as {code}: KL {found.kl:.2e}")

    def _expected(self, harm: Harm, of: Kind, code: str) -> float:
        """The harm of a code: measured, or the least there can be."""
        if code == EXACT:
            return 0.0
        coarsest = harm[of][self._coarsest]
        if not is_int4(code):
            return harm[of].get(code, coarsest * LEAST_OF_8)
        return harm[of].get(code, coarsest * LEAST[code] / LEAST[self._coarsest])

    # -- what is chosen ----------------------------------------------------------------------------

    def _best(self, probe: Probe, ways: Ways, harm: Harm, aim: float) -> dict[int, tuple[str, str]]:
        """By layer, the codes of least size whose measured harms add up to `aim` at most.

        What is not measured yet is taken to do no more harm than it possibly could, so whatever
        deserves to be chosen is; it is measured then, and the choice made again.
        """
        while True:
            options = [
                [
                    Option((k, v), size, self._expected(harm, (layer, "k"), k)
                           + self._expected(harm, (layer, "v"), v))
                    for (k, v), size in sizes.items()
                ]
                for layer, sizes in ways.items()
            ]  # fmt: skip
            chosen = [option.codes for option in choose(options, aim)]
            codes = dict(zip(ways, chosen, strict=True))
            unknown = [
                ((layer, kind), code)
                for layer, both in codes.items()
                for kind, code in zip(KINDS, both, strict=True)
                if code != EXACT and code not in harm[layer, kind]
            ]
            if not unknown:
                return codes
            for of, code in unknown:
                self._measure_one(probe, harm, of, code)

    def _choose(
        self, probe: Probe, held_out: Probe, ways: Ways, harm: Harm, budget: float
    ) -> tuple[KVFormat, Measured]:
        """The smallest choice found that holds the budget on the held-out windows, measured there.

        What is aimed at starts as the budget, and is moved by how much of it the last choice used.
        """
        limit = aim = math.log1p(budget)
        best = self._base
        measured = held_out.measure(best)
        tried: list[dict[int, tuple[str, str]]] = []
        for _ in range(TRIES):
            codes = self._best(probe, ways, harm, aim)
            if codes in tried or all(both == (EXACT, EXACT) for both in codes.values()):
                break
            tried.append(codes)
            kv_format = self._format(codes)
            found = held_out.measure(kv_format)
            self._say(f"chosen for a divergence of {aim:.5f}: {found}")
            if found.kl <= limit and found.bits < measured.bits:
                best, measured = kv_format, found
            if NEAR * limit <= found.kl <= limit:
                break
            aim *= min(2.0, 0.95 * limit / max(found.kl, 1e-12))
        return best, measured

    def _causes(self, harm: Harm) -> tuple[Kind, ...]:
        """See `Calibration.causes`."""
        worst = sorted(harm, key=lambda kind: -harm[kind][self._coarsest])
        total = sum(each[self._coarsest] for each in harm.values())
        sums = itertools.accumulate(harm[kind][self._coarsest] for kind in worst)
        return tuple(worst[: 1 + sum(reached < 0.9 * total for reached in sums)])
