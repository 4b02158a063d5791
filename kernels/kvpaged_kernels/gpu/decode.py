"""Attention of one or a few query tokens a sequence over its pages: a persistent grid, and a merge.

Each program works off its share of a plan (`gpu/plan.py`): items, of which it may begin its first
and end its last in the middle. The GQA group of a head and the queries of its row are packed into
the rows of the tile, so K and V are read once for all of them. An item that one program does by
itself goes straight to the output; parts of the others are left for the merge.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import DECODED_FLOATS, check_decode, require
from kvpaged_kernels.gpu.decode_configs import padded
from kvpaged_kernels.gpu.launch import Launch, attention_arguments, device_of
from kvpaged_kernels.gpu.plan import DecodePlan, Shape, plan_launch, row_tokens
from kvpaged_kernels.gpu.primitives import LOWEST, add_sinks, attend, load_slopes

_MERGE_ROWS = 4
_MERGE_PARTS = 8


@triton.jit(do_not_specialize=["stride_table_row", "window"])
def _decode(
    q,
    k_pages,
    v_pages,
    block_table,
    seq_lens,
    cu_q,
    records,
    sinks,
    alibi_slopes,
    out,
    parts,
    part_lse,
    stride_q_token,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_table_row,
    q_heads,
    window,
    score_scale,
    cap,
    STRIDE_K_ENTRY: tl.constexpr,
    STRIDE_V_ENTRY: tl.constexpr,
    STRIDE_K_SLOT: tl.constexpr,
    STRIDE_V_SLOT: tl.constexpr,
    HEADS: tl.constexpr,
    TILES_M: tl.constexpr,
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
    """`parts` is fp32 `[programs, 2, BLOCK_M, V_DIM]`, `part_lse` fp32 `[programs, 2, BLOCK_M]`.

    Place 1 of a program is for an item that it begins and does not end, place 0 for one that
    another has begun.
    """
    record = records + tl.program_id(0) * 4
    first_item = tl.load(record)
    first_unit = tl.load(record + 1)
    last_item = tl.load(record + 4)
    last_unit = tl.load(record + 5)
    for step in range(last_item - first_item + (last_unit > 0).to(tl.int32)):
        item = first_item + step
        row = (item // HEADS).to(tl.int64)
        kv_head = (item % HEADS // TILES_M).to(tl.int64)
        packed = item % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)
        length, queries, begin = row_tokens(
            row, True, seq_lens, cu_q, window, min(PAGE_SIZE, BLOCK_N), HAS_WINDOW
        )
        first_token = row
        if cu_q is not None:
            first_token = tl.load(cu_q + row).to(tl.int64)
        continued = (item == first_item) & (first_unit > 0)
        left = (item == last_item) & (last_unit > 0)
        start = begin
        if continued:
            start += first_unit * BLOCK_N
        # A row may have fewer queries than the tile has place for, or none: then nothing is read.
        end = tl.where(item % TILES_M * BLOCK_M < queries * GROUP, length, start)
        if left:
            end = tl.minimum(begin + last_unit * BLOCK_N, end)

        mask = packed < queries * GROUP
        index = packed // GROUP
        member = packed % GROUP
        head = kv_head * GROUP + member
        dim = tl.arange(0, BLOCK_K)
        places = q + first_token * stride_q_token + kv_head * GROUP * stride_q_head
        query = tl.load(
            places + (index * stride_q_token + member * stride_q_head)[:, None] + dim[None, :],
            mask=mask[:, None] & (dim < K_DIM)[None, :],
            other=0.0,
        )
        slope = load_slopes(alibi_slopes, head, mask)
        low = length - queries
        acc, m, total = attend(
            query,
            k_pages + kv_head * stride_k_head,
            v_pages + kv_head * stride_v_head,
            block_table + row * stride_table_row,
            low + index, low, length - 1, start, end,
            slope, window, score_scale, cap,
            STRIDE_K_ENTRY, STRIDE_V_ENTRY, STRIDE_K_SLOT, STRIDE_V_SLOT,
            K_DIM, V_DIM, BLOCK_K, BLOCK_V, PAGE_SIZE, BLOCK_N,
            HAS_WINDOW, HAS_SOFTCAP, True, FP8,
        )  # fmt: skip

        dim = tl.arange(0, BLOCK_V)
        if continued | left:
            place = tl.program_id(0) * 2 + (1 - continued.to(tl.int32))
            row_of_tile = place.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            # A query that sees nothing of this part leaves LOWEST, which weighs nothing.
            total = tl.where(total > 0, total, 1.0)
            acc /= total[:, None]
            tl.store(part_lse + row_of_tile, m + tl.log2(total), mask=mask)
            tl.store(
                parts + row_of_tile[:, None] * V_DIM + dim[None, :],
                acc,
                mask=mask[:, None] & (dim < V_DIM)[None, :],
            )
        else:
            if sinks is not None:
                m, total, alpha = add_sinks(m, total, sinks, head, mask)
                acc *= alpha[:, None]
            acc /= tl.where(total > 0, total, 1.0)[:, None]
            target = (first_token * q_heads + kv_head * GROUP) * V_DIM
            tl.store(
                out + target + ((index * q_heads + member) * V_DIM)[:, None] + dim[None, :],
                acc.to(out.dtype.element_ty),
                mask=mask[:, None] & (dim < V_DIM)[None, :],
            )


@triton.jit
def _merge(
    parts,
    part_lse,
    records,
    cu_q,
    sinks,
    out,
    q_heads,
    HEADS: tl.constexpr,
    TILES_M: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Weigh the parts of an item by their log-sum-exp, in the order of its tokens.

    There is a program for each boundary of shares; the one at the first boundary inside an item
    merges the item, `BLOCK_R` of its queries and heads at a time, and the others have nothing to
    do.
    """
    begun_by = tl.program_id(0)
    before = records + begun_by * 4
    item = tl.load(before + 4)
    unit = tl.load(before + 5)
    inside_before = (tl.load(before) == item) & (tl.load(before + 1) > 0)
    if (unit == 0) | inside_before:
        return
    count = tl.load(before + 6) - begun_by + 1

    row = (item // HEADS).to(tl.int64)
    kv_head = (item % HEADS // TILES_M).to(tl.int64)
    queries = 1
    first_token = row
    if cu_q is not None:
        first_token = tl.load(cu_q + row).to(tl.int64)
        queries = (tl.load(cu_q + row + 1) - first_token).to(tl.int32)
    line = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    packed = item % TILES_M * BLOCK_M + line
    mask = (line < BLOCK_M) & (packed < queries * GROUP)
    dim = tl.arange(0, BLOCK_V)
    m = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for first in range(0, count, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        place = ((begun_by + part) * 2 + (part == 0).to(tl.int32)).to(tl.int64)
        lines = place[None, :] * BLOCK_M + line[:, None]
        there = mask[:, None] & (part < count)[None, :]
        lse = tl.load(part_lse + lines, mask=there, other=-float("inf"))
        values = tl.load(
            parts + lines[:, :, None] * V_DIM + dim[None, None, :],
            mask=there[:, :, None] & (dim < V_DIM)[None, None, :],
            other=0.0,
        )
        m_new = tl.maximum(m, tl.max(lse, 1))
        weight = tl.exp2(lse - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(weight, 1)
        acc = acc * alpha[:, None] + tl.sum(values * weight[:, :, None], 1)
        m = m_new
    member = packed % GROUP
    if sinks is not None:
        m, total, alpha = add_sinks(m, total, sinks, kv_head * GROUP + member, mask)
        acc *= alpha[:, None]
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    target = out + (first_token * q_heads + kv_head * GROUP) * V_DIM
    tl.store(
        target + ((packed // GROUP * q_heads + member) * V_DIM)[:, None] + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=mask[:, None] & (dim < V_DIM)[None, :],
    )


def decode_launches(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    plan: DecodePlan,
    scale: float,
    cu_q: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> list[Launch]:
    """The launches of `paged_decode` into `out`: of the attention and of the merge."""
    shape, config = plan.shape, plan.config
    places = plan.programs, 2, config.block_m
    parts = torch.empty(*places, shape.v_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(places, dtype=torch.float32, device=q.device)
    both: dict[str, Any] = {
        "parts": parts,
        "part_lse": part_lse,
        "records": plan.records,
        "cu_q": cu_q,
        "sinks": sinks,
        "out": out,
        "q_heads": q.shape[1],
        "HEADS": plan.heads,
        "TILES_M": plan.heads // shape.kv_heads,
        "BLOCK_M": config.block_m,
    }
    arguments = attention_arguments(
        q, k_pages, v_pages, block_table, scale=scale, window=shape.window, softcap=softcap,
        arch=plan.arch,
    )  # fmt: skip
    attending = Launch(
        kernel=_decode,
        grid=(plan.programs,),
        arguments=arguments
        | both
        | {
            "seq_lens": seq_lens,
            "alibi_slopes": alibi_slopes,
            "stride_q_token": q.stride(0),
            "stride_q_head": q.stride(1),
            "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers if plan.arch.startswith("sm_") else None,
    )
    return [attending, merge_launch(plan, both)]


def merge_launch(plan: DecodePlan, both: dict[str, Any]) -> Launch:
    """The launch of the merge; `both`: what it has in common with the attention's."""
    shape = plan.shape
    lines = min(plan.config.block_m, shape.group * shape.max_q)
    return Launch(
        kernel=_merge,
        grid=(plan.programs - 1, triton.cdiv(lines, _MERGE_ROWS)),
        arguments=both
        | {
            "GROUP": shape.group,
            "V_DIM": shape.v_dim,
            "BLOCK_V": padded(shape.v_dim),
            "BLOCK_R": _MERGE_ROWS,
            "BLOCK_P": _MERGE_PARTS,
        },
    )


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    cu_q: Tensor | None = None,
    max_q: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    plan: DecodePlan | None = None,
) -> Tensor:
    """Attention of one or a few query tokens a sequence over its paged history.

    - `q`: `[tokens, q_heads, k_dim]`, last stride 1: one query a row, or as `cu_q` says.
    - `k_pages`, `v_pages`: `[entries, kv_heads, page_size, k_dim or v_dim]` of `q`'s dtype, or both
      float8_e4m3fn (finite numbers; `q` then is bf16 or fp16, and below 65504 in magnitude);
      `q_heads` is a multiple of `kv_heads`, query head `h` reads KV head `h // group`.
    - `block_table`: int32 `[rows, width]`, last stride 1: entry of each logical page. Entries
      wholly before the window or past the length are never used.
    - `seq_lens`: int32 `[rows]`, tokens of each row *including* the queries' own, the last ones,
      already in the pages. A row of length 0 gives zeros.
    - `scale`: factor of the dot products, positive.
    - `cu_q`: int32 `[rows + 1]`: the queries of row i are `q[cu_q[i]:cu_q[i + 1]]`, its last
      tokens. A row may have none; tokens past the last row's give zeros. Without it each row has
      one.
    - `max_q`: the most queries of a row, at most 16.
    - `window`: W, or None. A query at position p sees positions p-W < j <= p: W tokens with itself.
    - `softcap`: c, or None: scores become c*tanh(s/c), after `scale` (Gemma 2).
    - `sinks`: `[q_heads]` logits that join the softmax's denominator only (GPT-OSS), or None.
    - `alibi_slopes`: `[q_heads]`, or None: slope * (j - p) is added to the score of token j, after
      the soft cap (Press, Smith and Lewis, arXiv:2108.12409).
    - `plan`: what `plan_decode` made of `seq_lens`, `cu_q` and `window` for these shapes; made anew
      where absent. It decides the order of sums and nothing else.

    Returns `[tokens, q_heads, v_dim]`, contiguous, in `q`'s dtype; sums are fp32. Raises ValueError
    where shapes, strides, dtypes or devices disagree. Splitting over tokens is Flash-Decoding's,
    equal shares of all work are Stream-K's (Osama et al., arXiv:2301.03598).
    """
    tensors = (q, k_pages, v_pages, block_table, seq_lens)
    check_decode(
        *tensors, scale=scale, cu_q=cu_q, max_q=max_q, window=window, softcap=softcap,
        sinks=sinks, alibi_slopes=alibi_slopes, dtypes=DECODED_FLOATS,
    )  # fmt: skip
    # Tokens past the last query of `cu_q` (a padded batch's) belong to nobody: zeros.
    make = q.new_empty if cu_q is None else q.new_zeros
    out = make(q.shape[0], q.shape[1], v_pages.shape[3])
    if q.shape[0] == 0:
        return out
    _, kv_heads, page_size, v_dim = v_pages.shape
    shape = Shape(
        rows=seq_lens.shape[0], kv_heads=kv_heads, group=q.shape[1] // kv_heads, k_dim=q.shape[2],
        v_dim=v_dim, page_size=page_size, max_q=max_q, window=window, dtype=k_pages.dtype,
    )  # fmt: skip
    if plan is None:
        plan, planning = plan_launch(shape, seq_lens, cu_q, device_of(q))
        planning.run(q.device)
    require(plan.shape == shape, f"the plan is for {plan.shape}, this is {shape}")
    require(
        plan.records.device == q.device,
        f"the plan is on {plan.records.device}, q on {q.device}",
    )
    launches = decode_launches(
        *tensors, out, plan=plan, scale=scale, cu_q=cu_q, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    for launch in launches:
        launch.run(q.device)
    return out
