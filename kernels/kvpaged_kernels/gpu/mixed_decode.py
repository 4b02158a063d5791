"""Attention of one query token a sequence over sealed pages, exact first ones and its own.

The grid, the shares and the merge are those of `decode`. A unit is a tile of one page; of K's
integers it may span several groups of tokens, each of which has scores of its own. The exact tokens
of a share are attended to first, in one loop, the sealed ones after them in the one that matters.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import require
from kvpaged_kernels.gpu.decode import merge_launch
from kvpaged_kernels.gpu.decode_configs import DecodeConfig
from kvpaged_kernels.gpu.launch import Device, Launch, attention_arguments, device_of
from kvpaged_kernels.gpu.mixed_configs import EXACT_TOKENS, mixed_decode_config, shared_tokens
from kvpaged_kernels.gpu.mixed_steps import exact_step, sealed_step
from kvpaged_kernels.gpu.plan import DecodePlan, Shape, plan_launch, row_tokens
from kvpaged_kernels.gpu.primitives import LOWEST, add_sinks, load_slopes
from kvpaged_kernels.gpu.sealed_pieces import EXACT, INT8, sealed_arguments
from kvpaged_kernels.gpu.sealed_tiles import columns, load_q
from kvpaged_kernels.sealed import SliceLayout
from kvpaged_kernels.sealed_checks import check_mixed_decode

_EXACT = tl.constexpr(EXACT)
_INT8 = tl.constexpr(INT8)


@triton.jit(do_not_specialize=["stride_table_row", "window", "keep"])
def _mixed_decode(
    q,
    k_pages,
    v_pages,
    k_codes,
    v_codes,
    params,
    block_table,
    seq_lens,
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
    keep,
    window,
    score_scale,
    sealed_scale,
    cap,
    STRIDE_K_ENTRY: tl.constexpr,
    STRIDE_V_ENTRY: tl.constexpr,
    STRIDE_K_SLOT: tl.constexpr,
    STRIDE_V_SLOT: tl.constexpr,
    STRIDE_K_CODES: tl.constexpr,
    STRIDE_V_CODES: tl.constexpr,
    STRIDE_PARAMS: tl.constexpr,
    K_CODES_HEAD: tl.constexpr,
    V_CODES_HEAD: tl.constexpr,
    PARAMS_HEAD: tl.constexpr,
    V_CODES: tl.constexpr,
    K_PARAMS: tl.constexpr,
    V_PARAMS: tl.constexpr,
    K_FORM: tl.constexpr,
    K_WORDS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_FORM: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_TILES: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES_M: tl.constexpr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FP32: tl.constexpr,
    PTX: tl.constexpr,
):
    """`parts` and `part_lse` are as in `decode`. A unit, `BLOCK_N` tokens, is read `TOKENS` at a
    time, which share K's parameters.
    """
    V_PARTS: tl.constexpr = 1 if V_FORM == _EXACT else 4 if V_FORM > _INT8 else 2
    record = records + tl.program_id(0) * 4
    first_item = tl.load(record)
    first_unit = tl.load(record + 1)
    last_item = tl.load(record + 4)
    last_unit = tl.load(record + 5)
    for step in range(last_item - first_item + (last_unit > 0).to(tl.int32)):
        item = first_item + step
        row = (item // HEADS).to(tl.int64)
        kv_head = (item % HEADS // TILES_M).to(tl.int64)
        member = item % TILES_M * BLOCK_M + tl.arange(0, BLOCK_M)
        length, _, begin = row_tokens(row, True, seq_lens, None, window, BLOCK_N, HAS_WINDOW)
        continued = (item == first_item) & (first_unit > 0)
        left = (item == last_item) & (last_unit > 0)
        start = begin
        if continued:
            start += first_unit * BLOCK_N
        end = length
        if left:
            end = tl.minimum(begin + last_unit * BLOCK_N, length)

        mask = member < GROUP
        head = kv_head * GROUP + member
        slope = load_slopes(alibi_slopes, head, mask)
        places = q + row * stride_q_token + head * stride_q_head
        position = tl.full([BLOCK_M], 0, tl.int32) + (length - 1)
        table = block_table + row * stride_table_row
        k_head, v_head = k_pages + kv_head * stride_k_head, v_pages + kv_head * stride_v_head
        own = (length - 1) // PAGE_SIZE
        sealed_from = tl.minimum(keep, own) * PAGE_SIZE
        sealed_to = own * PAGE_SIZE

        m = tl.full([BLOCK_M], LOWEST, tl.float32)
        over = tl.zeros([BLOCK_M], tl.float32)
        acc = ()
        for _ in tl.static_range(V_TILES * V_PARTS):
            acc = acc + (tl.zeros([BLOCK_M, V_BLOCK], tl.float32),)

        dim = tl.arange(0, BLOCK_K)
        query = tl.load(
            places[:, None] + dim[None, :], mask=mask[:, None] & (dim < K_DIM)[None, :], other=0.0
        )
        kept = tl.cdiv(tl.maximum(tl.minimum(end, sealed_from) - start, 0), EXACT_N)
        own_start = tl.maximum(start, sealed_to)
        count = kept + tl.cdiv(tl.maximum(end - own_start, 0), EXACT_N)
        for number in tl.range(0, count, num_stages=1):
            first = start + number * EXACT_N
            if number >= kept:
                first = own_start + (number - kept) * EXACT_N
            entry = tl.load(table + first // PAGE_SIZE).to(tl.int64)
            acc, m, over = exact_step(
                acc, m, over, query, k_head + entry * STRIDE_K_ENTRY,
                v_head + entry * STRIDE_V_ENTRY, first, end, position, slope, window, score_scale,
                cap, STRIDE_K_SLOT, STRIDE_V_SLOT, K_DIM, BLOCK_K, PAGE_SIZE,
                V_FORM, V_WORDS, V_TILES, V_WIDTH, V_BLOCK, EXACT_N,
                HAS_WINDOW, HAS_SOFTCAP, FP32,
            )  # fmt: skip

        total = tl.where(tl.arange(0, TOKENS)[None, :] == 0, over[:, None], 0.0)
        q_pieces = load_q(places, mask, K_FORM, K_WORDS, K_BLOCK, FP32)
        k_head = k_codes + kv_head * K_CODES_HEAD
        v_head = v_codes + kv_head * V_CODES_HEAD + V_CODES
        head_params = params + kv_head * PARAMS_HEAD
        first = tl.maximum(start, sealed_from)
        last = tl.minimum(end, sealed_to)
        entry = tl.load(table + first // PAGE_SIZE, mask=first < last, other=0)
        for token in range(first, last, BLOCK_N):
            following = token + BLOCK_N
            next_entry = tl.load(table + following // PAGE_SIZE, mask=following < last, other=0)
            place = entry.to(tl.int64)
            params_of = head_params + place * STRIDE_PARAMS
            acc, m, total = sealed_step(
                acc, m, total, q_pieces, k_head + place * STRIDE_K_CODES,
                v_head + place * STRIDE_V_CODES, params_of + K_PARAMS, params_of + V_PARAMS,
                token, position, slope, window, sealed_scale, cap,
                K_FORM, K_DIM, K_WORDS, K_BLOCK, K_GROUP,
                V_FORM, V_WORDS, V_TILES, V_WIDTH, V_BLOCK, V_GROUP, V_GROUPS,
                PAGE_SIZE, BLOCK_N, TOKENS, HAS_WINDOW, HAS_SOFTCAP, FP32, PTX,
            )  # fmt: skip
            entry = next_entry

        over = tl.sum(total, 1)
        cut = continued | left
        place = tl.program_id(0) * 2 + (1 - continued.to(tl.int32))
        row_of_tile = place.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        factor = tl.full([BLOCK_M], 1.0, tl.float32)
        if sinks is not None:
            # The sink takes part once: in the merge, where the item is cut.
            _, with_sink, alpha = add_sinks(m, over, sinks, head, mask)
            over = tl.where(cut, over, with_sink)
            factor = tl.where(cut, 1.0, alpha)
        over = tl.where(over > 0, over, 1.0)
        if cut:
            # A query that sees nothing of this part leaves LOWEST, which weighs nothing.
            tl.store(part_lse + row_of_tile, m + tl.log2(over), mask=mask)
        for piece in tl.static_range(V_TILES * V_PARTS):
            dim, there = columns(piece, V_FORM, V_WORDS, V_WIDTH, V_BLOCK)
            result = acc[piece]
            result *= (factor / over)[:, None]
            inside = mask[:, None] & there[None, :]
            if cut:
                lines = row_of_tile * V_DIM
                tl.store(parts + lines[:, None] + dim[None, :], result, mask=inside)
            else:
                lines = (row * q_heads + head) * V_DIM
                given = result.to(out.dtype.element_ty)
                tl.store(out + lines[:, None] + dim[None, :], given, mask=inside)


def mixed_decode_launches(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slices: Tensor,
    layout: SliceLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    plan: DecodePlan,
    device: Device,
    keep: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> list[Launch]:
    """The launches of `mixed_decode` into `out`: of the attention and of the merge."""
    shape, config = plan.shape, plan.config
    places = plan.programs, 2, config.block_m
    both: dict[str, Any] = {
        "parts": torch.empty(*places, shape.v_dim, dtype=torch.float32, device=q.device),
        "part_lse": torch.empty(places, dtype=torch.float32, device=q.device),
        "records": plan.records,
        "sinks": sinks,
        "out": out,
        "q_heads": q.shape[1],
        "HEADS": plan.heads,
        "TILES_M": plan.heads // shape.kv_heads,
        "BLOCK_M": config.block_m,
    }
    arguments = attention_arguments(
        q, k_pages, v_pages, block_table, scale=scale, window=shape.window, softcap=softcap,
        arch=device.arch,
    )  # fmt: skip
    del arguments["BLOCK_V"], arguments["FP8"]
    sealed = sealed_arguments(slices, layout, arguments["score_scale"], device.arch)
    attending = Launch(
        kernel=_mixed_decode,
        grid=(plan.programs,),
        arguments=arguments
        | sealed
        | both
        | {
            "seq_lens": seq_lens,
            "alibi_slopes": alibi_slopes,
            "stride_q_token": q.stride(0),
            "stride_q_head": q.stride(1),
            "keep": min(keep, 2**20),
            "BLOCK_N": config.block_n,
            "TOKENS": shared_tokens(layout, config.block_n),
            "EXACT_N": min(config.block_n, EXACT_TOKENS),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers if device.arch.startswith("sm_") else None,
    )
    return [attending, merge_launch(plan, both | {"cu_q": None})]


def mixed_plan_launch(
    layout: SliceLayout,
    q_heads: int,
    seq_lens: Tensor,
    *,
    window: int | None,
    device: Device,
    config: DecodeConfig | None = None,
) -> tuple[DecodePlan, Launch]:
    """The plan of a step over sealed pages, and the launch that fills it in."""
    group = q_heads // layout.kv_heads
    shape = Shape(
        rows=seq_lens.shape[0], kv_heads=layout.kv_heads, group=group, k_dim=layout.k_dim,
        v_dim=layout.v_dim, page_size=layout.page_size, max_q=1, window=window, dtype=layout.dtype,
    )  # fmt: skip
    config = config or mixed_decode_config(layout, group, device.arch)
    return plan_launch(shape, seq_lens, None, device, config)


def plan_mixed_decode(
    layout: SliceLayout, q_heads: int, seq_lens: Tensor, *, window: int | None = None
) -> DecodePlan:
    """Deal a step of `mixed_decode` out to the device, for all layers of this layout.

    - `layout`: of the slices.
    - `seq_lens`: int32 `[rows]`.
    """
    plan, launch = mixed_plan_launch(
        layout, q_heads, seq_lens, window=window, device=device_of(seq_lens)
    )
    launch.run(seq_lens.device)
    return plan


def mixed_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slices: Tensor,
    layout: SliceLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    keep: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    plan: DecodePlan | None = None,
) -> Tensor:
    """Attention of one query token a sequence over its own page and the sealed form of those
    before it.

    - `slices`: uint8 `[entries, slice_bytes]`, this layer of the sealed pages, coded as `layout`
      says; every stride but the last, and the offset, a multiple of 16.
    - `block_table`: int32 `[rows, width]`. Of a row of `n` tokens, logical page `p` is an entry of
      `slices` where `keep <= p < (n - 1) // page_size`, else one of `k_pages` and `v_pages`.
    - `keep`: logical pages from the first on that stay exact when they are full.
    - `plan`: what `plan_mixed_decode` made of `seq_lens` and `window`; made anew where absent.
    - all else as for `decode.paged_decode`.

    Returns `[rows, q_heads, v_dim]`, contiguous, in `q`'s dtype; zeros for rows of length 0; sums
    are fp32. But of fp32 models what codes stand for is
    multiplied in fp16: queries, keys and values are below 65504 in magnitude.
    Raises ValueError where shapes, strides or dtypes disagree, or for groups that
    `sealed_pieces` can't read.
    """
    tensors = (q, k_pages, v_pages, slices, layout, block_table, seq_lens)
    check_mixed_decode(
        *tensors, keep=keep, scale=scale, window=window, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out = q.new_empty(q.shape[0], q.shape[1], layout.v_dim)
    if q.shape[0] == 0:
        return out
    device = device_of(q)
    made, planning = mixed_plan_launch(layout, q.shape[1], seq_lens, window=window, device=device)
    if plan is None:
        plan = made
        planning.run(q.device)
    require(
        plan.shape == made.shape and plan.config == made.config,
        f"the plan is for {plan.shape} and {plan.config}, this is {made.shape} and {made.config}",
    )
    launches = mixed_decode_launches(
        *tensors, out, plan=plan, device=device, keep=keep, scale=scale, softcap=softcap,
        sinks=sinks, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    for launch in launches:
        launch.run(q.device)
    return out
