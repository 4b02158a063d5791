"""Causal attention of ragged new tokens over their pages.

The queries and their GQA group are packed into the rows of a tile: row p of a sequence's tiles is
query p // group, member p % group. So any ratio fills the tile, and K and V are read once for it.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import check_prefill
from kvpaged_kernels.gpu.configs import prefill_blocks
from kvpaged_kernels.gpu.launch import Device, Launch, attention_arguments, device_of
from kvpaged_kernels.gpu.primitives import add_sinks, attend, load_slopes, window_begin


@triton.jit(do_not_specialize=["stride_table_row", "window", "blocks"])
def _prefill(
    q,
    k_pages,
    v_pages,
    block_table,
    cu_q,
    seq_lens,
    sinks,
    alibi_slopes,
    out,
    stride_q_token,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_table_row,
    q_heads,
    blocks,
    window,
    score_scale,
    cap,
    STRIDE_K_ENTRY: tl.constexpr,
    STRIDE_V_ENTRY: tl.constexpr,
    STRIDE_K_SLOT: tl.constexpr,
    STRIDE_V_SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    # The last queries see the most: starting with them leaves no long program for the end.
    block = blocks - 1 - tl.program_id(0) % blocks
    kv_head = tl.program_id(1).to(tl.int64)
    first_query = tl.load(cu_q + row)
    queries = tl.load(cu_q + row + 1) - first_query
    if block * BLOCK_M >= queries * GROUP:
        return

    length = tl.load(seq_lens + row)
    # int64 for where the block begins, int32 within it: the rows' offsets live through the loop.
    first = block * BLOCK_M // GROUP
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = packed < queries * GROUP
    index = packed // GROUP - first
    member = packed % GROUP
    position = length - queries + first + index
    token = (first_query + first).to(tl.int64)
    dim = tl.arange(0, BLOCK_K)
    q += token * stride_q_token + kv_head * GROUP * stride_q_head
    query = tl.load(
        q + (index * stride_q_token + member * stride_q_head)[:, None] + dim[None, :],
        mask=mask[:, None] & (dim < K_DIM)[None, :],
        other=0.0,
    )
    k_pages += kv_head * stride_k_head
    v_pages += kv_head * stride_v_head
    table = block_table + row * stride_table_row

    slope = load_slopes(alibi_slopes, kv_head * GROUP + member, mask)

    low = length - queries + first
    high = tl.minimum(length - queries + (block * BLOCK_M + BLOCK_M - 1) // GROUP, length - 1)
    start = 0
    if HAS_WINDOW:
        start = window_begin(low, window, min(PAGE_SIZE, BLOCK_N))
    acc, m, total = attend(
        query, k_pages, v_pages, table, position, low, high, start, high + 1,
        slope, window, score_scale, cap,
        STRIDE_K_ENTRY, STRIDE_V_ENTRY, STRIDE_K_SLOT, STRIDE_V_SLOT,
        K_DIM, V_DIM, BLOCK_K, BLOCK_V, PAGE_SIZE, BLOCK_N,
        HAS_WINDOW, HAS_SOFTCAP, False, FP8,
    )  # fmt: skip

    if sinks is not None:
        m, total, alpha = add_sinks(m, total, sinks, kv_head * GROUP + member, mask)
        acc *= alpha[:, None]
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    dim = tl.arange(0, BLOCK_V)
    out += (token * q_heads + kv_head * GROUP) * V_DIM
    tl.store(
        out + ((index * q_heads + member) * V_DIM)[:, None] + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=mask[:, None] & (dim < V_DIM)[None, :],
    )


def prefill_launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    max_q: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    device: Device,
) -> Launch:
    """The launch of `paged_prefill` into `out`."""
    _, q_heads, k_dim = q.shape
    _, kv_heads, _, v_dim = v_pages.shape
    group = q_heads // kv_heads
    tile = prefill_blocks(q.element_size(), k_dim, v_dim, device.shared_memory)
    blocks = triton.cdiv(max_q * group, tile.m)
    return Launch(
        kernel=_prefill,
        grid=(seq_lens.shape[0] * blocks, kv_heads),
        arguments=attention_arguments(
            q,
            k_pages,
            v_pages,
            block_table,
            scale=scale,
            window=window,
            softcap=softcap,
            arch=device.arch,
        )
        | {
            "cu_q": cu_q,
            "seq_lens": seq_lens,
            "sinks": sinks,
            "alibi_slopes": alibi_slopes,
            "out": out,
            "stride_q_token": q.stride(0),
            "stride_q_head": q.stride(1),
            "blocks": blocks,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=255 if device.arch.startswith("sm_") else None,
    )


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    *,
    max_q: int,
    max_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged new tokens over their paged histories.

    - `q`: `[tokens, q_heads, k_dim]`, last stride 1: the queries of all rows, one after another.
    - `cu_q`: int32 `[rows + 1]`: the queries of row i are `q[cu_q[i]:cu_q[i + 1]]`, the *last*
      tokens of its `seq_lens[i]`; K and V of all of them are in the pages. A row may have none.
    - `max_q`: an upper bound of the queries of a row; sizes the launch.
    - all else as for `paged_decode`.

    Returns `[tokens, q_heads, v_dim]`, contiguous, in `q`'s dtype; sums are fp32. Raises ValueError
    where shapes, strides, dtypes or devices disagree.
    """
    check_prefill(
        q,
        k_pages,
        v_pages,
        block_table,
        cu_q,
        seq_lens,
        max_q=max_q,
        max_len=max_len,
        window=window,
        softcap=softcap,
        scale=scale,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    out = q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])
    if q.shape[0] == 0 or max_q == 0:
        return out
    prefill_launch(
        q,
        k_pages,
        v_pages,
        block_table,
        cu_q,
        seq_lens,
        out,
        max_q=max_q,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        device=device_of(q),
    ).run(q.device)
    return out
