"""Write new K and V into their slots."""

import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import check_append
from kvpaged_kernels.gpu.launch import Launch

_BLOCK_ELEMENTS = 2048


@triton.jit
def _append(
    k,
    v,
    k_pages,
    v_pages,
    slots,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_kp_entry,
    stride_kp_head,
    stride_kp_slot,
    stride_vp_entry,
    stride_vp_head,
    stride_vp_slot,
    kv_heads,
    PAGE_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    place = tl.load(slots + token)
    heads = tl.where(place >= 0, kv_heads, 0)  # none of a token without a slot
    entry = place // PAGE_SIZE
    slot = place % PAGE_SIZE

    dim = tl.arange(0, BLOCK_K)[None, :]
    mask = (head < heads) & (dim < K_DIM)
    values = tl.load(k + token * stride_k_token + head * stride_k_head + dim, mask=mask)
    page = k_pages + entry * stride_kp_entry + slot * stride_kp_slot
    tl.store(page + head * stride_kp_head + dim, values, mask=mask)
    if v is not None:
        dim = tl.arange(0, BLOCK_V)[None, :]
        mask = (head < heads) & (dim < V_DIM)
        values = tl.load(v + token * stride_v_token + head * stride_v_head + dim, mask=mask)
        page = v_pages + entry * stride_vp_entry + slot * stride_vp_slot
        tl.store(page + head * stride_vp_head + dim, values, mask=mask)


def append_launch(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slots: Tensor,
) -> Launch:
    """The launch of `append`; reads shapes and strides only."""
    tokens, kv_heads, k_dim = k.shape
    v_dim = k_dim if v is None else v.shape[2]
    block_k, block_v = triton.next_power_of_2(k_dim), triton.next_power_of_2(v_dim)
    block_h = min(triton.next_power_of_2(kv_heads), _BLOCK_ELEMENTS // max(block_k, block_v))
    return Launch(
        kernel=_append,
        grid=(tokens, triton.cdiv(kv_heads, block_h)),
        arguments={
            "k": k,
            "v": v,
            "k_pages": k_pages,
            "v_pages": v_pages,
            "slots": slots,
            "stride_k_token": k.stride(0),
            "stride_k_head": k.stride(1),
            "stride_v_token": 0 if v is None else v.stride(0),
            "stride_v_head": 0 if v is None else v.stride(1),
            "stride_kp_entry": k_pages.stride(0),
            "stride_kp_head": k_pages.stride(1),
            "stride_kp_slot": k_pages.stride(2),
            "stride_vp_entry": 0 if v_pages is None else v_pages.stride(0),
            "stride_vp_head": 0 if v_pages is None else v_pages.stride(1),
            "stride_vp_slot": 0 if v_pages is None else v_pages.stride(2),
            "kv_heads": kv_heads,
            "PAGE_SIZE": k_pages.shape[2],
            "K_DIM": k_dim,
            "V_DIM": v_dim,
            "BLOCK_K": block_k,
            "BLOCK_V": block_v,
            "BLOCK_H": block_h,
        },
    )


def append(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slots: Tensor,
) -> None:
    """Write the K and V of new tokens into their slots, one program a token.

    - `k`: `[tokens, kv_heads, k_dim]`, last stride 1; `v`: `[tokens, kv_heads, v_dim]` or None.
    - `k_pages`: `[entries, kv_heads, page_size, k_dim]`, **mutated**; `v_pages` likewise with
      `v_dim`, or None exactly when `v` is.
    - `slots`: int64 `[tokens]`, `entry * page_size + slot`, distinct; -1: the token goes nowhere.
      They are not checked on the device: a wrong one writes out of bounds.

    Bytes are copied exactly. Raises ValueError where shapes, strides, dtypes or devices disagree.
    """
    check_append(k, v, k_pages, v_pages, slots)
    if slots.shape[0] > 0:
        append_launch(k, v, k_pages, v_pages, slots).run(k.device)
