"""What the kernels of sealed pages require of their arguments, checked once for every
implementation: shapes, strides, dtypes and devices only, as in `checks`.
"""

import torch
from torch import Tensor

from kvpaged_kernels.checks import check_decode, check_prefill, require, require_device
from kvpaged_kernels.sealed import SliceLayout


def check_seal(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor,
    layout: SliceLayout, queries: Tensor | None,
) -> None:  # fmt: skip
    """Check the arguments of `seal`: see `reference.seal.seal`."""
    head = layout.kv_heads, layout.page_size
    fits = k_pages.ndim == v_pages.ndim == 5 and slices.ndim == 3
    fits = fits and k_pages.shape[2:] == (*head, layout.k_dim)
    fits = fits and v_pages.shape[2:] == (*head, layout.v_dim)
    fits = fits and k_pages.shape[1] == v_pages.shape[1] == slices.shape[1]
    require(
        fits and k_pages.dtype == v_pages.dtype == layout.dtype,
        f"pages of (heads, slots) {head}, K {layout.k_dim} and V {layout.v_dim} wide, of "
        f"{layout.dtype}: got K {tuple(k_pages.shape)} of {k_pages.dtype}, V "
        f"{tuple(v_pages.shape)} of {v_pages.dtype}, slices {tuple(slices.shape)}",
    )
    _check_slices(slices, layout)
    require(
        k_pages.stride(4) == v_pages.stride(4) == 1,
        f"pages must have last stride 1, got {k_pages.stride()} and {v_pages.stride()}",
    )
    require(
        src.dtype == dst.dtype == torch.int64 and src.ndim == 1 and src.shape == dst.shape,
        f"src and dst are int64 [n], got {tuple(src.shape)} of {src.dtype} and "
        f"{tuple(dst.shape)} of {dst.dtype}",
    )
    require_device(
        k_pages.device, v_pages=v_pages, src=src, slices=slices, dst=dst, queries=queries
    )
    if queries is None:
        return
    shape = (k_pages.shape[1], layout.kv_heads, 2, layout.k_dim)
    require(
        queries.dtype == torch.float32 and queries.shape == shape
        and queries.is_contiguous(),
        f"queries are fp32 {shape}, contiguous, got {tuple(queries.shape)} of "
        f"{queries.dtype}, strides {queries.stride()}",
    )  # fmt: skip
    require(
        layout.k.form == "int" and layout.k.bits == 4,
        f"queries are for keys of 4 bits, not {layout.k.form} of {layout.k.bits}",
    )


def check_mixed_decode(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, slices: Tensor, layout: SliceLayout,
    block_table: Tensor, seq_lens: Tensor, *, keep: int, scale: float, window: int | None,
    softcap: float | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
) -> None:  # fmt: skip
    """Check the arguments of `mixed_decode`: see `reference.mixed.mixed_decode`."""
    check_decode(
        q, k_pages, v_pages, block_table, seq_lens, scale=scale, cu_q=None, max_q=1, window=window,
        softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, dtypes=_FLOATS,
    )  # fmt: skip
    _check_mixed(k_pages, v_pages, slices, layout, keep)


def check_mixed_prefill(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, slices: Tensor, layout: SliceLayout,
    own_k: Tensor, own_v: Tensor, cu_own: Tensor, block_table: Tensor, cu_q: Tensor,
    seq_lens: Tensor, *, keep: int, max_q: int, max_len: int, scale: float, window: int | None,
    softcap: float | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
) -> None:  # fmt: skip
    """Check the arguments of `mixed_prefill`: see `reference.mixed.mixed_prefill`."""
    check_prefill(
        q, k_pages, v_pages, block_table, cu_q, seq_lens, max_q=max_q, max_len=max_len,
        scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        dtypes=_FLOATS,
    )  # fmt: skip
    _check_mixed(k_pages, v_pages, slices, layout, keep)
    head = layout.kv_heads, layout.page_size
    fits = own_k.ndim == own_v.ndim == 4 and len(own_k) == len(own_v)
    fits = fits and own_k.shape[1:] == (*head, layout.k_dim)
    fits = fits and own_v.shape[1:] == (*head, layout.v_dim)
    require(
        fits and own_k.dtype == own_v.dtype == layout.dtype
        and own_k.stride(3) == own_v.stride(3) == 1,
        f"own pages are [n, {head[0]}, {head[1]}, {layout.k_dim} or {layout.v_dim}] of "
        f"{layout.dtype}, got {tuple(own_k.shape)} and {tuple(own_v.shape)} of {own_k.dtype}",
    )  # fmt: skip
    require(
        cu_own.dtype == torch.int32 and cu_own.shape == cu_q.shape,
        f"cu_own is int32 {tuple(cu_q.shape)}, got {tuple(cu_own.shape)} of {cu_own.dtype}",
    )


def _check_mixed(
    k_pages: Tensor, v_pages: Tensor, slices: Tensor, layout: SliceLayout, keep: int
) -> None:
    shape = (layout.kv_heads, layout.page_size, layout.k_dim, layout.v_dim)
    got = (*k_pages.shape[1:], v_pages.shape[3])
    require(
        got == shape and k_pages.dtype == layout.dtype,
        f"exact pages of (heads, slots, widths) {shape} of {layout.dtype}, got {got} of "
        f"{k_pages.dtype}",
    )
    require(slices.ndim == 2, f"slices of a layer are [entries, bytes], got {tuple(slices.shape)}")
    _check_slices(slices, layout)
    require(keep >= 0, f"pages that stay exact are counted from 0, got {keep}")


def _check_slices(slices: Tensor, layout: SliceLayout) -> None:
    size = layout.slice_bytes
    require(
        slices.dtype == torch.uint8 and slices.shape[-1] == size and slices.stride(-1) == 1,
        f"slices are uint8, the last dimension {size} of stride 1, got {tuple(slices.shape)} of "
        f"{slices.dtype}, strides {slices.stride()}",
    )
    require(
        not any(step % 16 for step in slices.stride()[:-1]) and slices.storage_offset() % 16 == 0,
        f"slices begin at multiples of 16 bytes, got strides {slices.stride()} from "
        f"{slices.storage_offset()} on",
    )


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
