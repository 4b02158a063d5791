"""Forward passes over packed tokens: rows of any lengths side by side in one, without padding.

The model sees `[1, tokens]` ids and positions; its attention function sends each layer's new
queries, keys and values to the pages of a batch whose step is running. Nothing of the step is an
argument of the pass, so a graph compiled or captured from one serves any other.
"""

import inspect
import itertools
import logging
import time
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import UnsupportedModelError, UsageError
from kvpaged.integrations.attention import (
    TAG,
    PackedCache,
    PackedTag,
    Preparation,
)
from kvpaged.integrations.compiling import Run, any_size, compile_run, kept_on_disk, shape_of
from kvpaged.integrations.graphs import Capture, DecodeGraphs
from kvpaged.integrations.linears import PackedLinears
from kvpaged.integrations.native import NativeAttention
from kvpaged.slot_batch import SlotBatch
from kvpaged_kernels.cpu.native import NativeError, all_threads, one_thread

log = logging.getLogger("kvpaged")

FEW = 12
"""Tokens of a step up to which a compiled model's own kernels run in one thread on a CPU, where
products are native: it takes less time than waking another (SmolLM2 at 8 tokens 3 % less, at 16 of
them 7 % more).
"""

SOME = 64
"""Tokens up to which a step is compiled where products are torch's own: what holds kernels to one
thread would hold those, too.
"""

_passes: "weakref.WeakValueDictionary[int, PackedPass]" = weakref.WeakValueDictionary()
_numbers = itertools.count()

_library = torch.library.Library("kvpaged", "FRAGMENT")
_library.define(
    "packed_attend(Tensor q, Tensor k, Tensor v, Tensor? sinks, int number, int layer, "
    "float scale, float? softcap) -> Tensor",
    tags=(torch.Tag.flexible_layout,),
)


def _packed_attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, number: int, layer: int,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return _passes[number].serve(layer, q, k, v, scale, softcap, sinks)


def _packed_attend_fake(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, number: int, layer: int,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return q.new_empty((1, q.shape[2], q.shape[1], v.shape[3]))


for _device in ("CPU", "CUDA"):
    _library.impl("packed_attend", _packed_attend, _device)
torch.library.register_fake("kvpaged::packed_attend", _packed_attend_fake, lib=_library)


class PackedPass(Cache, PackedCache):
    """What a model is given as `past_key_values` in passes over the running step of a batch.

    One thread at a time.
    """

    def __init__(
        self, cache: CacheBooks, preparation: Preparation, batch: Batch, *, native: bool = False
    ) -> None:
        """`native`: attention is by native code where there is some."""
        super().__init__(layers=[])
        self._books = cache
        self._of = preparation
        self.batch = batch
        self._number = next(_numbers)
        self._windows = {layer: group.window for group in cache.groups for layer in group.layers}
        self._tags = {layer: PackedTag(self, layer) for layer in cache.layers}
        self._native = NativeAttention(cache) if native else None
        _passes[self._number] = self

    @property
    def preparation(self) -> Preparation:
        """Of the model whose passes it takes part in."""
        return self._of

    # -- what the model calls ----------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values on to attention, which puts them into pages."""
        setattr(key_states, TAG, self._tags[layer_idx])
        return key_states, value_states

    def attend_packed(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Put a layer's new keys and values (`[1, kv_heads, tokens, width]`) into pages and attend.

        Returns `[1, tokens, q_heads, width]`.
        """
        if window != self._windows[layer]:
            raise UnsupportedModelError(
                f"layer {layer} attends with a window of {window}; its pages were made for "
                f"{self._windows[layer]}"
            )
        scale = q.shape[3] ** -0.5 if scale is None else scale
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.kvpaged.packed_attend(
                q, k, v, sinks, self._number, layer, scale, softcap
            )
            return out
        return self.serve(layer, q, k, v, scale, softcap, sinks)

    def serve(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The same, not traced."""
        step = self.batch.step
        if step is None:
            raise UsageError("a packed pass runs without a step of its batch")
        q, k, v = (_tokens_first(x) for x in (q, k, v))
        if self._native is not None:
            served = self._native.attend(step, layer, q, k, v, scale, softcap, sinks)
            if served is not None:
                return served.unsqueeze(0)
        with all_threads():
            self.batch.write(layer, k, v)
            out = self.batch.attend(layer, q, scale=scale, softcap=softcap, sinks=sinks)
        return out.contiguous().unsqueeze(0)  # as the operator's fake says

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing before the pass, as far as masks and positions are concerned: they are given."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No mask is made."""
        return query_length, 0

    # -- what the hooks call -----------------------------------------------------------------------

    def enter(self, module: torch.nn.Module, given: dict[str, Any]) -> None:
        """See `ServedCache`: the step runs already."""
        self._of.check_ready(module)

    def leave(self) -> None:
        """See `ServedCache`: whoever began the step ends it."""

    def check_attended(self) -> None:
        """Raise `UnsupportedModelError` unless every layer attended in the running step."""
        step = self.batch.step
        missing = set(self._books.layers) - (step.attended if step is not None else set())
        if missing:
            raise UnsupportedModelError(
                f"layers {sorted(missing)[:8]} did not attend over their pages in this forward pass"
            )

    def note_attended(self, layer: int) -> None:
        """See `ServedCache`."""

    def has_written(self, layer: int) -> bool:
        """See `ServedCache`."""
        return self.batch.step is not None and layer in self.batch.step.written

    def attend(
        self, layer: int, query: Tensor, scale: float | None, window: int | None,
        softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """See `ServedCache`: packed passes attend by `attend_packed`."""
        raise UsageError("a packed pass attends by attend_packed")


def _tokens_first(x: Tensor) -> Tensor:
    """`[1, heads, tokens, width]` as `[tokens, heads, width]`."""
    x = x.squeeze(0).transpose(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()


class PackedModel:
    """A causal language model, run over packed tokens: eagerly, or compiled.

    The model's own forward runs. What is compiled is compiled for any number of tokens, by
    `check`; `compile_s` tells how long that took, in seconds.
    """

    def __init__(
        self, cache: CacheBooks, preparation: Preparation, batch: Batch, *, compiled: bool,
        pack_weights: bool, capture: Capture | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            cache, preparation, batch: what it runs over.
            compiled: through `torch.compile`.
            pack_weights: see `PackedLinears`.
            capture: how decode steps are captured as graphs; `None`: they are not.

        Raises:
            UnsupportedModelError: its forward can't be told positions, or which logits to give.
        """
        names = inspect.signature(preparation.model.forward).parameters
        missing = [name for name in ("position_ids", "logits_to_keep") if name not in names]
        if missing:
            raise UnsupportedModelError(
                f"{type(preparation.model).__name__}.forward takes no {' and no '.join(missing)}: "
                "it can't run over packed tokens"
            )
        self._model = preparation.model
        self._cpu = batch.device.type == "cpu"
        self.past = PackedPass(cache, preparation, batch, native=compiled and self._cpu)
        self.compiled = compiled
        self.compile_s: float | None = None
        self._linears = _pack(self._model, native=compiled and self._cpu) if pack_weights else None
        linears = self._linears
        self._any_size = linears is not None and linears.native and linears.cover(self._model)
        self._fast: Run | None = None  # the compiled forward
        self._shape: list[Any] = []  # of the model it was compiled of
        self.graphs: DecodeGraphs | None = None
        if capture is not None:
            self.graphs = DecodeGraphs(cache, batch, self._model, self._run, capture=capture)

    def __call__(self, ids: Tensor, positions: Tensor, take: Tensor, every: bool = False) -> Tensor:
        """One pass over the tokens of the running step.

        Args:
            ids, positions: int64 `[tokens]`.
            take: ints `[n]`, the tokens whose logits are wanted; none: `n` is 0.
            every: those are all, in order.

        Returns:
            `[n, vocabulary]`, of the model's dtype; valid until the next pass.
        """
        step = self.past.batch.step
        if every and step is not None and self.graphs is not None and self.graphs.serves(step):
            return self.graphs(step, ids, positions)
        wanted = len(take)
        take = take.long() if wanted else ids.new_zeros(1)
        logits = self._run(ids, positions, take)
        self.past.check_attended()
        return logits[:wanted]

    def _run(self, ids: Tensor, positions: Tensor, take: Tensor) -> Tensor:
        fast = self._fast
        if fast is None or (self._cpu and len(ids) > SOME and not self._any_size):
            with torch.no_grad():
                return self._call(ids[None], positions[None], take)
        self.past.enter(self._model, {})
        # Not while it is compiled, for that looks how many threads there are.
        few = self._cpu and len(ids) <= FEW
        held = few and self._any_size and self.compile_s is not None
        with torch.no_grad(), any_size(), one_thread() if held else nullcontext():
            return fast(ids, positions, take)

    def check(self, batch: SlotBatch) -> None:
        """See that packing sequences changes nothing for them, in a pass of two and two of one; a
        compiled model is compiled here. `batch` is empty before and after.

        Raises:
            UnsupportedModelError: it does change them: the model mixes tokens elsewhere than in
                attention, or takes no notice of positions; or the compiled model differs from the
                one it was made of.
        """
        device = batch.device
        first, second = (torch.tensor(x, device=device) for x in ([1, 5, 3], [4, 2]))
        batch.admit(0, second.cpu().numpy(), None)
        other = self._probe(batch, [2], second)
        batch.vacate(0)
        batch.admit(0, first.cpu().numpy(), None)
        alone = self._probe(batch, [3], first)
        if batch.rows > 1:
            batch.admit(1, second.cpu().numpy(), None)
            packed = self._probe(batch, [3, 2], torch.cat([first, second]))
            batch.vacate(1)
            self._must_agree("when another is packed before it", packed, torch.cat([alone, other]))
        self._must_agree("a token at a time", self._probe(batch, [1], first[:1]), alone[:1])
        batch.vacate(0)
        if self.compiled:
            self._compile(batch)
        if self.graphs is not None:
            self.graphs.capture()

    def _must_agree(self, when: str, got: Tensor, wanted: Tensor) -> None:
        got, exact = got.float(), wanted.float()
        wrong, most = (got - exact).abs().max(), exact.abs().max()
        if not wrong <= torch.finfo(wanted.dtype).eps ** 0.5 * most:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} gives a sequence other scores (by {wrong:.3g}, "
                f"where they reach {most:.3g}) {when}: it can't run over packed tokens"
            )

    def _check_compiled(self, batch: SlotBatch) -> None:
        """Raise `UnsupportedModelError` unless most tokens' scores are those of the eager model.

        Most, because in bf16 other roundings alone (inductor keeps fp32 within a kernel) can turn
        the scores of a single early token over: of SmolLM2 one in a dozen, others by 0.1 to 2 %
        (mean square over variance); tokens that see something else differ by 100 % and more.
        """
        vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        ids = torch.arange(1, 12, device=batch.device) * vocabulary // 12
        batch.admit(0, ids.cpu().numpy(), None)
        scores, fast = [], self._fast
        try:
            for self._fast in (fast, None):
                scores.append(self._probe(batch, [len(ids)], ids).float())
        finally:
            self._fast = fast
            batch.vacate(0)
        got, exact = scores
        apart = float(((got - exact).square().mean(-1) / exact.var(-1)).median())
        if not apart <= 4 * torch.finfo(self._model.dtype).eps ** 0.5:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} gives other scores when it is compiled (mean square "
                f"of the difference over the variance: {apart:.3g})"
            )

    def _compile(self, batch: SlotBatch) -> None:
        """Compile the model as it is; `batch` is empty before and after.

        Raises:
            UnsupportedModelError: see `_check_compiled`.
        """
        start = time.perf_counter()
        model, past = self._model, self.past

        def run(ids: Tensor, positions: Tensor, take: Tensor) -> Tensor:
            """Without the model's own hooks, which are Python's. The one row is made within, where
            its number is no variable of the graph: loops over tokens are outermost then.
            """
            out = model.forward(
                input_ids=ids[None], position_ids=positions[None], past_key_values=past,
                use_cache=True, logits_to_keep=take,
            )  # fmt: skip
            logits: Tensor = out.logits[0]
            return logits

        self._fast = compile_run(run, batch.device, one_thread=not self._any_size)
        self._shape, self.compile_s = shape_of(model), None
        ids = torch.tensor([1, 5, 3], device=batch.device)
        batch.admit(0, ids.cpu().numpy(), None)
        try:
            with kept_on_disk():  # no two sizes alike: else they are so for ever
                self._probe(batch, [3], ids, take=2)
            self.compile_s = time.perf_counter() - start
            batch.vacate(0)
            self._check_compiled(batch)
        except BaseException:
            self._shape = []  # the next request tries again
            raise
        finally:
            batch.vacate(0)

    def _probe(
        self, batch: SlotBatch, counts: list[int], ids: Tensor, take: int | None = None
    ) -> Tensor:
        """Logits of all tokens, or the first `take`, of a step over the first rows; the step is
        dropped.
        """
        every = np.zeros(batch.rows, np.int64)
        every[: len(counts)] = counts
        step = batch.begin(every, order=np.arange(len(counts)))
        try:
            positions = step.positions.long()
            return self(ids, positions, torch.arange(take or len(ids), device=ids.device))
        finally:
            batch.drop_step()

    def refresh(self, batch: SlotBatch) -> None:
        """Look whether weights or the model have changed, between requests: `batch` is empty.

        Raises:
            UnsupportedModelError: it was compiled anew, and differs from what it was made of.
        """
        if self._linears is not None:
            self._linears.refresh()
        if self.compiled and shape_of(self._model) != self._shape:
            self._compile(batch)
        if self.graphs is not None and self.graphs.is_stale():
            self.graphs.capture()

    def release(self) -> None:
        """Leave the model as it was found."""
        if self._linears is not None:
            self._linears.release()

    def _call(self, ids: Tensor, positions: Tensor, take: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids, position_ids=positions, past_key_values=self.past, use_cache=True,
            logits_to_keep=take,
        )  # fmt: skip
        logits: Tensor = out.logits[0]
        return logits


def _pack(model: torch.nn.Module, *, native: bool) -> PackedLinears:
    if native:
        try:
            return PackedLinears(model, native=True)
        except NativeError as error:
            log.warning("products stay with oneDNN: %s", error)
    return PackedLinears(model)
