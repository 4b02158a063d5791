"""Forward passes over packed tokens: rows of any lengths side by side in one, without padding.

The model sees `[1, tokens]` ids and positions; its attention function sends each layer's new
queries, keys and values to the pages of a batch whose step is running. Nothing of the step is an
argument of the pass, so a graph compiled or captured from one serves any other.
"""

import itertools
import weakref
from typing import Any

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
from kvpaged.integrations.native import NativeAttention
from kvpaged_kernels.cpu.native import all_threads

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
