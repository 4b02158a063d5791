"""The operations on pages, dispatched to one implementation, explicitly.

`backend` says which: `"cpu"` (stock torch), `"triton"` (GPUs, and Triton's interpreter),
`"reference"` (the eager oracles). Nothing falls back. Eager calls go straight to the
implementation; under `torch.compile` they become the custom operators `torch.ops.kvpaged.*`, which
have fake implementations and name what they mutate (`kvpaged.operators`).
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpaged.config import Backend
from kvpaged.errors import ConfigError
from kvpaged.geometry import View
from kvpaged_kernels.cpu import append as cpu_append
from kvpaged_kernels.cpu import copy as cpu_copy
from kvpaged_kernels.cpu import decode as cpu_decode
from kvpaged_kernels.cpu import lane as cpu_lane
from kvpaged_kernels.cpu import plan as cpu_plan
from kvpaged_kernels.cpu import prefill as cpu_prefill
from kvpaged_kernels.cpu.lane import Lane
from kvpaged_kernels.cpu.plan import DecodePlan, SpanPlan

if TYPE_CHECKING:
    from kvpaged_kernels.gpu.plan import DecodePlan as SharePlan


class Options(NamedTuple):
    """What attention may be asked for beside the softmax.

    Attributes:
        scale: factor of `q . k`.
        window: tokens a query sees, itself included; `None`: all.
        softcap: `s -> softcap * tanh(s / softcap)` after the scale.
        sinks: logits `[q_heads]` that join the softmax denominator only.
        alibi_slopes: `[q_heads]`; a token's score gets `slope * (its position - the query's)`.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None


class LayerPages(NamedTuple):
    """One layer's K and V over all pages of a class.

    Attributes:
        flat: the storage, a vector of the pages' dtype.
        k_pages, v_pages: `[entries, kv_heads, page_size, width]` views of it; `v_pages` may be
            `None`.
        k_view, v_view: the same views as integers (sizes, strides, offset, step), for custom
            operators.
        step: entries between adjacent pages.
    """

    flat: Tensor
    k_pages: Tensor
    v_pages: Tensor | None
    k_view: list[int]
    v_view: list[int]
    step: int

    @classmethod
    def of(cls, flat: Tensor, k: View, v: View | None, *, step: int) -> "LayerPages":
        """The views of a storage."""
        k_view = [*k.size, *k.stride, k.offset, step]
        v_view = [*v.size, *v.stride, v.offset, step] if v else []
        return cls.of_views(flat, k_view, v_view)

    @classmethod
    def of_views(cls, flat: Tensor, k_view: list[int], v_view: list[int]) -> "LayerPages":
        """The same from views as integers; `v_view` is empty without V."""
        v_pages = _pages(flat, v_view) if v_view else None
        return cls(flat, _pages(flat, k_view), v_pages, k_view, v_view, k_view[9])

    @property
    def page_size(self) -> int:
        """Token slots a page."""
        return self.k_pages.shape[2]

    @property
    def joined(self) -> bool:
        """Whether adjacent pages are one run of slots within a head."""
        return self.k_pages.stride(0) == self.page_size * self.k_pages.stride(2)


def _pages(flat: Tensor, view: Sequence[int]) -> Tensor:
    return flat.as_strided(view[:4], view[4:8], view[8])


class Kernels(NamedTuple):
    """The functions of a backend, all of the signatures that `kvpaged_kernels.reference`
    documents.
    """

    append: Callable[..., None]
    paged_decode: Callable[..., Tensor]
    paged_prefill: Callable[..., Tensor]
    copy_pages: Callable[..., None]
    checksum: Callable[..., Tensor]
    fill_pages: Callable[..., None]


@lru_cache(maxsize=1)
def _triton() -> Kernels:
    """The Triton kernels; Triton itself is imported only when they are first asked for."""
    from kvpaged_kernels.gpu.append import append
    from kvpaged_kernels.gpu.checksum import checksum
    from kvpaged_kernels.gpu.copy import copy_pages
    from kvpaged_kernels.gpu.decode import paged_decode
    from kvpaged_kernels.gpu.prefill import paged_prefill
    from kvpaged_kernels.gpu.transfer import fill_pages

    return Kernels(append, paged_decode, paged_prefill, copy_pages, checksum, fill_pages)


@lru_cache(maxsize=1)
def _reference() -> Kernels:
    from kvpaged_kernels.reference.append import append
    from kvpaged_kernels.reference.attention import paged_decode, paged_prefill
    from kvpaged_kernels.reference.checksum import checksum
    from kvpaged_kernels.reference.copy import copy_pages
    from kvpaged_kernels.reference.transfer import fill_pages

    return Kernels(append, paged_decode, paged_prefill, copy_pages, checksum, fill_pages)


def _kernels(backend: str) -> Kernels:
    if backend not in ("triton", "reference"):
        raise ConfigError(f"no kernels are called {backend!r}")
    return _triton() if backend == "triton" else _reference()


def append(
    pages: LayerPages,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor,
    *,
    backend: Backend,
    spans: SpanPlan | None = None,
) -> None:
    """Write the K and V of new tokens into their slots of `pages`.

    Args:
        pages: where to; mutated.
        k: `[tokens, kv_heads, k_width]`, last dimension contiguous, of the pages' dtype.
        v: `[tokens, kv_heads, v_width]`, or `None` exactly when the pages have no V.
        slots: int64 `[tokens]`, `entry * page_size + slot`, distinct; -1 (not on a CPU): the token
            goes nowhere.
        backend: which implementation.
        spans: the same places as runs (CPU only; optional).
    """
    if torch.compiler.is_compiling():
        torch.ops.kvpaged.append(pages.flat, k, v, slots, pages.k_view, pages.v_view, backend)
    elif backend == "cpu":
        cpu_append.append(k, v, pages.k_pages, pages.v_pages, slots, spans)
    else:
        _kernels(backend).append(k, v, pages.k_pages, pages.v_pages, slots)


def decode(
    pages: LayerPages,
    q: Tensor,
    table: Tensor,
    lengths: Tensor,
    options: Options,
    *,
    backend: Backend,
    cu_q: Tensor | None = None,
    max_q: int = 1,
    plan: "DecodePlan | SharePlan | None" = None,
) -> Tensor:
    """Attention of one or a few query tokens a sequence over its pages.

    Args:
        pages: what is read.
        q: `[tokens, q_heads, k_width]`, one query a row, or as `cu_q` says.
        table: int32 `[rows, width]` of entries.
        lengths: int32 `[rows]`, the queries' tokens included.
        options: scale, window, soft cap, sinks, slopes.
        backend: which implementation.
        cu_q: int32 `[rows + 1]`: row `i`'s queries are `[cu_q[i], cu_q[i + 1])`, its last
            positions; not for the CPU, where `prefill` is as good.
        max_q: an upper bound of the queries of a row, at most `MAX_DECODE_QUERIES`.
        plan: what `plan_decode` made of table, lengths, window and `cu_q` on a CPU, or
            `plan_shares` for Triton; made anew if absent.

    Returns:
        `[tokens, q_heads, v_width]` of `q`'s dtype.
    """
    if torch.compiler.is_compiling():
        records = None if plan is None or isinstance(plan, DecodePlan) else plan.records
        return _decode_call(
            pages.flat, q, table, lengths, cu_q, records, pages.k_view, pages.v_view, max_q,
            *options, backend,
        )  # fmt: skip
    if backend == "cpu":
        if cu_q is not None:
            raise ConfigError("on a CPU several queries a row go through prefill")
        return _decode_on_cpu(pages, q, table, lengths, options, plan)
    more = {} if backend == "reference" else {"plan": plan}
    return _kernels(backend).paged_decode(
        q, pages.k_pages, values_of(pages), table, lengths, cu_q=cu_q, max_q=max_q,
        **options._asdict(), **more,
    )  # fmt: skip


def _decode_on_cpu(
    pages: LayerPages,
    q: Tensor,
    table: Tensor,
    lengths: Tensor,
    options: Options,
    plan: "DecodePlan | SharePlan | None",
) -> Tensor:
    if options.alibi_slopes is not None:
        cu_q = torch.arange(len(lengths) + 1, dtype=torch.int32)
        return prefill(pages, q, table, cu_q, lengths, options, max_q=1, max_len=1, backend="cpu")
    if not isinstance(plan, DecodePlan):
        plan = plan_decode(pages, table, lengths, options.window)
    return cpu_decode.paged_decode(
        q, pages.k_pages, values_of(pages), plan,
        scale=options.scale, softcap=options.softcap, sinks=options.sinks,
    )  # fmt: skip


def prefill(
    pages: LayerPages,
    q: Tensor,
    table: Tensor,
    cu_q: Tensor,
    lengths: Tensor,
    options: Options,
    *,
    max_q: int,
    max_len: int,
    backend: Backend,
    spans: SpanPlan | None = None,
) -> Tensor:
    """Causal attention of ragged queries over their paged history; the new tokens are in the pages.

    Args:
        pages, table, lengths, options, max_len, backend: as in `decode`.
        q: `[tokens, q_heads, k_width]`; row `i`'s queries are `[cu_q[i], cu_q[i + 1])` and are its
            last positions.
        cu_q: int32 `[rows + 1]`.
        max_q: an upper bound of the queries of a row, known on the host.
        spans: what `plan_spans` made of table, lengths, `cu_q` and window (CPU only; made anew if
            absent).

    Returns:
        `[tokens, q_heads, v_width]` of `q`'s dtype.
    """
    if torch.compiler.is_compiling():
        return _prefill_call(
            pages.flat, q, table, cu_q, lengths, pages.k_view, pages.v_view, max_q, max_len,
            *options, backend,
        )  # fmt: skip
    if backend == "cpu":
        if options.alibi_slopes is not None:
            window = cpu_prefill.NO_WINDOW if options.window is None else options.window
            spans = plan_spans(pages, table, cu_q, lengths, window)
        elif spans is None:
            spans = plan_spans(pages, table, cu_q, lengths, options.window)
        return cpu_prefill.paged_prefill(
            q, pages.k_pages, values_of(pages), spans, **options._asdict()
        )
    return _kernels(backend).paged_prefill(
        q, pages.k_pages, values_of(pages), table, cu_q, lengths,
        max_q=max_q, max_len=max_len, **options._asdict(),
    )  # fmt: skip


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor, *, backend: Backend) -> None:
    """Copy pages, exactly.

    Args:
        pages: `[entries, pieces, elements]` view of a storage; mutated.
        src, dst: int64 `[n]` entries; `dst` distinct and apart from `src`.
        backend: which implementation.
    """
    if backend == "cpu":
        cpu_copy.copy_pages(pages, src, dst)
    else:
        _kernels(backend).copy_pages(pages, src, dst)


def checksum(words: Tensor, entries: Tensor, *, first_word: int, backend: Backend) -> Tensor:
    """Checksums of the slices of some pages, int64 `[n, slices]`: see
    `kvpaged_kernels.reference.checksum`.

    Args:
        words: int32 `[entries, slices, pieces, words]` view of a storage.
        entries: int64 `[n]`.
        first_word: the place of this part's first word within its slice.
        backend: which implementation.
    """
    if backend == "cpu":
        return cpu_copy.checksum(words, entries, first_word=first_word)
    return _kernels(backend).checksum(words, entries, first_word=first_word)


def fill_pages(records: Tensor, pages: Tensor, entries: Tensor, *, backend: Backend) -> None:
    """Copy pieces of records into pages, exactly, by a kernel.

    Args:
        records: `[n, slices, pieces, elements]` view, on the pages' device or in pinned memory.
        pages: `[entries, slices, pieces, elements]` view of a storage; mutated.
        entries: int64 `[n]`, distinct.
        backend: which implementation; there is none of stock torch.

    Raises:
        ConfigError: the backend is `"cpu"`.
    """
    _kernels(backend).fill_pages(records, pages, entries)


def plan_decode(
    pages: LayerPages, table: Tensor, lengths: Tensor, window: int | None
) -> DecodePlan:
    """The CPU's calls for a decode step, from device tensors."""
    return cpu_plan.plan_decode(
        table.numpy(), lengths.numpy().astype(np.int64), page_size=pages.page_size, step=pages.step,
        joined=pages.joined, dtype=pages.flat.dtype, window=window,
        page_bytes=2 * math.prod(pages.k_pages.shape[1:]) * pages.flat.itemsize,
    )  # fmt: skip


def plan_shares(
    pages: LayerPages,
    q_heads: int,
    lengths: Tensor,
    window: int | None,
    *,
    cu_q: Tensor | None = None,
    max_q: int = 1,
    records: Tensor | None = None,
) -> "SharePlan":
    """How the Triton kernel's programs share a decode step, worked out on the device once for all
    layers with these heads and widths; from `records` it is made without working it out again.
    """
    from kvpaged_kernels.gpu.plan import Shape, plan_decode

    _, kv_heads, page_size, k_dim = pages.k_pages.shape
    shape = Shape(
        rows=lengths.shape[0], kv_heads=kv_heads, group=q_heads // kv_heads, k_dim=k_dim,
        v_dim=values_of(pages).shape[3], page_size=page_size, max_q=max_q, window=window,
        dtype=pages.flat.dtype,
    )  # fmt: skip
    return plan_decode(shape, lengths, cu_q, records=records)


def decode_lane(pages: LayerPages, plan: DecodePlan) -> Lane | None:
    """A layer's lane for a decode step (CPU); `None` where rows are not alike, or without V."""
    if not plan.has_lane or pages.v_pages is None:
        return None
    return cpu_lane.decode_lane(pages.k_pages, pages.v_pages, plan)


def prefill_lane(pages: LayerPages, plan: SpanPlan) -> Lane | None:
    """The same for rows that are nothing but new tokens."""
    if plan.uniform is None or plan.trunks or pages.v_pages is None:
        return None
    return cpu_lane.prefill_lane(pages.k_pages, pages.v_pages, plan.uniform)


def plan_spans(
    pages: LayerPages, table: Tensor, cu_q: Tensor, lengths: Tensor, window: int | None
) -> SpanPlan:
    """The CPU's runs for ragged queries, from device tensors."""
    return cpu_plan.plan_spans(
        table.numpy(), lengths.numpy().astype(np.int64), cu_q.numpy().astype(np.int64),
        page_size=pages.page_size, step=pages.step, joined=pages.joined, window=window,
    )  # fmt: skip


def values_of(pages: LayerPages) -> Tensor:
    """The pages attention takes values from: V, or the one tensor of a group without V."""
    return pages.k_pages if pages.v_pages is None else pages.v_pages


# -- under torch.compile: the custom operators of `kvpaged.operators` -----------------------------


def _decode_call(*arguments: object) -> Tensor:
    out: Tensor = torch.ops.kvpaged.decode(*arguments)
    return out


def _prefill_call(*arguments: object) -> Tensor:
    out: Tensor = torch.ops.kvpaged.prefill(*arguments)
    return out
