"""Causal attention of ragged new tokens over sealed pages and each token's own, exact page.

A program takes queries of one own page, the GQA group packed into its rows as in `prefill`: so all
of them see the same pages before theirs whole, exact and then sealed, and only their own with a
causal mask.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.gpu.launch import Device, Launch, attention_arguments, device_of
from kvpaged_kernels.gpu.mixed_configs import mixed_prefill_blocks, shared_tokens
from kvpaged_kernels.gpu.mixed_steps import exact_step, sealed_step
from kvpaged_kernels.gpu.primitives import LOWEST, add_sinks, load_slopes, window_begin
from kvpaged_kernels.gpu.sealed_pieces import EXACT, INT8, sealed_arguments
from kvpaged_kernels.gpu.sealed_tiles import columns, load_q
from kvpaged_kernels.sealed import SliceLayout
from kvpaged_kernels.sealed_checks import check_mixed_prefill

_EXACT = tl.constexpr(EXACT)
_INT8 = tl.constexpr(INT8)


@triton.jit
def _row_of(page, cu_own, rows, BLOCK_R: tl.constexpr):
    """The row that own page `page` belongs to: as many rows end at or before it."""
    row = page * 0
    for first in range(0, rows, BLOCK_R):
        index = first + tl.arange(0, BLOCK_R)
        ends = tl.load(cu_own + 1 + index, mask=index < rows, other=2**31 - 1)
        row += tl.sum((ends <= page).to(tl.int32), 0)
    return row


@triton.jit(do_not_specialize=["stride_table_row", "window", "keep", "tiles", "rows"])
def _mixed_prefill(
    q,
    k_pages,
    v_pages,
    k_codes,
    v_codes,
    params,
    own_k,
    own_v,
    cu_own,
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
    stride_ok_page,
    stride_ok_head,
    stride_ov_page,
    stride_ov_head,
    stride_table_row,
    q_heads,
    rows,
    tiles,
    keep,
    window,
    score_scale,
    sealed_scale,
    cap,
    STRIDE_K_ENTRY: tl.constexpr,
    STRIDE_V_ENTRY: tl.constexpr,
    STRIDE_K_SLOT: tl.constexpr,
    STRIDE_V_SLOT: tl.constexpr,
    STRIDE_OK_SLOT: tl.constexpr,
    STRIDE_OV_SLOT: tl.constexpr,
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
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TOKENS: tl.constexpr,
    EXACT_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FP32: tl.constexpr,
    PTX: tl.constexpr,
):
    V_PARTS: tl.constexpr = 1 if V_FORM == _EXACT else 4 if V_FORM > _INT8 else 2
    page = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(1).to(tl.int64)
    row = _row_of(page, cu_own, rows, BLOCK_R)
    if row >= rows:
        return
    length = tl.load(seq_lens + row)
    first_query = tl.load(cu_q + row)
    start = length - (tl.load(cu_q + row + 1) - first_query)
    own = start // PAGE_SIZE + page - tl.load(cu_own + row)
    begin = own * PAGE_SIZE
    # The queries of this page are those of the positions `low .. end`.
    low = tl.maximum(begin, start)
    end = tl.minimum(begin + PAGE_SIZE, length)
    if tile * BLOCK_M >= (end - low) * GROUP:
        return

    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = packed < (end - low) * GROUP
    member = packed % GROUP
    index = packed // GROUP
    position = low + index
    head = kv_head * GROUP + member
    slope = load_slopes(alibi_slopes, head, mask)
    first_token = (first_query + low - start).to(tl.int64)
    places = q + first_token * stride_q_token + kv_head * GROUP * stride_q_head
    places = places + (index * stride_q_token + member * stride_q_head)
    table = block_table + row.to(tl.int64) * stride_table_row

    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    over = tl.zeros([BLOCK_M], tl.float32)
    acc = ()
    for _ in tl.static_range(V_TILES * V_PARTS):
        acc = acc + (tl.zeros([BLOCK_M, V_BLOCK], tl.float32),)
    dim = tl.arange(0, BLOCK_K)
    query = tl.load(
        places[:, None] + dim[None, :], mask=mask[:, None] & (dim < K_DIM)[None, :], other=0.0
    )
    seen_from = 0
    if HAS_WINDOW:
        seen_from = window_begin(low + tile * BLOCK_M // GROUP, window, BLOCK_N)
    sealed_from = tl.minimum(keep, own) * PAGE_SIZE

    k_head, v_head = k_pages + kv_head * stride_k_head, v_pages + kv_head * stride_v_head
    for token in tl.range(seen_from, sealed_from, EXACT_N, num_stages=1):
        entry = tl.load(table + token // PAGE_SIZE).to(tl.int64)
        acc, m, over = exact_step(
            acc, m, over, query, k_head + entry * STRIDE_K_ENTRY, v_head + entry * STRIDE_V_ENTRY,
            token, end, position, slope, window, score_scale, cap,
            STRIDE_K_SLOT, STRIDE_V_SLOT, K_DIM, BLOCK_K, PAGE_SIZE,
            V_FORM, V_WORDS, V_TILES, V_WIDTH, V_BLOCK, EXACT_N, HAS_WINDOW, HAS_SOFTCAP, FP32,
        )  # fmt: skip
    place = page.to(tl.int64)
    k_head = own_k + place * stride_ok_page + kv_head * stride_ok_head
    v_head = own_v + place * stride_ov_page + kv_head * stride_ov_head
    last = tl.minimum(low + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1, end)
    for token in tl.range(tl.maximum(begin, seen_from), last, EXACT_N, num_stages=1):
        acc, m, over = exact_step(
            acc, m, over, query, k_head, v_head, token, end, position, slope, window, score_scale,
            cap, STRIDE_OK_SLOT, STRIDE_OV_SLOT, K_DIM, BLOCK_K, PAGE_SIZE,
            V_FORM, V_WORDS, V_TILES, V_WIDTH, V_BLOCK, EXACT_N, HAS_WINDOW, HAS_SOFTCAP, FP32,
        )  # fmt: skip

    total = tl.where(tl.arange(0, TOKENS)[None, :] == 0, over[:, None], 0.0)
    pieces = load_q(places, mask, K_FORM, K_WORDS, K_BLOCK, FP32)
    k_head = k_codes + kv_head * K_CODES_HEAD
    v_head = v_codes + kv_head * V_CODES_HEAD + V_CODES
    params += kv_head * PARAMS_HEAD
    first = tl.maximum(seen_from, sealed_from)
    entry = tl.load(table + first // PAGE_SIZE, mask=first < begin, other=0)
    for token in range(first, begin, BLOCK_N):
        following = token + BLOCK_N
        next_entry = tl.load(table + following // PAGE_SIZE, mask=following < begin, other=0)
        place = entry.to(tl.int64)
        params_of = params + place * STRIDE_PARAMS
        acc, m, total = sealed_step(
            acc, m, total, pieces, k_head + place * STRIDE_K_CODES, v_head + place * STRIDE_V_CODES,
            params_of + K_PARAMS, params_of + V_PARAMS, token, position, slope, window,
            sealed_scale, cap, K_FORM, K_DIM, K_WORDS, K_BLOCK, K_GROUP,
            V_FORM, V_WORDS, V_TILES, V_WIDTH, V_BLOCK, V_GROUP, V_GROUPS,
            PAGE_SIZE, BLOCK_N, TOKENS, HAS_WINDOW, HAS_SOFTCAP, FP32, PTX,
        )  # fmt: skip
        entry = next_entry

    over = tl.sum(total, 1)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if sinks is not None:
        _, over, factor = add_sinks(m, over, sinks, head, mask)
    factor /= tl.where(over > 0, over, 1.0)
    out += (first_token * q_heads + kv_head * GROUP) * V_DIM
    lines = (index * q_heads + member) * V_DIM
    for piece in tl.static_range(V_TILES * V_PARTS):
        dim, there = columns(piece, V_FORM, V_WORDS, V_WIDTH, V_BLOCK)
        result = (acc[piece] * factor[:, None]).to(out.dtype.element_ty)
        tl.store(
            out + lines[:, None] + dim[None, :], result, mask=mask[:, None] & there[None, :]
        )  # fmt: skip


def mixed_prefill_launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slices: Tensor,
    layout: SliceLayout,
    own_k: Tensor,
    own_v: Tensor,
    cu_own: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    keep: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    device: Device,
) -> Launch:
    """The launch of `mixed_prefill` into `out`."""
    arguments = attention_arguments(
        q, k_pages, v_pages, block_table, scale=scale, window=window, softcap=softcap,
        arch=device.arch,
    )  # fmt: skip
    del arguments["BLOCK_V"], arguments["FP8"]
    rows, group = seq_lens.shape[0], arguments["GROUP"]
    blocks = mixed_prefill_blocks(layout, group, device.arch)
    tiles = triton.cdiv(layout.page_size * group, blocks.m)
    return Launch(
        kernel=_mixed_prefill,
        grid=(own_k.shape[0] * tiles, layout.kv_heads),
        arguments=arguments
        | sealed_arguments(slices, layout, arguments["score_scale"], device.arch)
        | {
            "own_k": own_k,
            "own_v": own_v,
            "cu_own": cu_own,
            "cu_q": cu_q,
            "seq_lens": seq_lens,
            "sinks": sinks,
            "alibi_slopes": alibi_slopes,
            "out": out,
            "stride_q_token": q.stride(0),
            "stride_q_head": q.stride(1),
            "stride_ok_page": own_k.stride(0),
            "stride_ok_head": own_k.stride(1),
            "stride_ov_page": own_v.stride(0),
            "stride_ov_head": own_v.stride(1),
            "STRIDE_OK_SLOT": own_k.stride(2),
            "STRIDE_OV_SLOT": own_v.stride(2),
            "rows": rows,
            "tiles": tiles,
            "keep": min(keep, 2**20),
            "BLOCK_M": blocks.m,
            "BLOCK_N": blocks.n,
            "BLOCK_R": min(256, max(16, triton.next_power_of_2(rows))),
            "TOKENS": shared_tokens(layout, blocks.n),
            "EXACT_N": min(blocks.n, 32),
        },
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        max_registers=255 if device.arch.startswith("sm_") else None,
    )


def mixed_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slices: Tensor,
    layout: SliceLayout,
    own_k: Tensor,
    own_v: Tensor,
    cu_own: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    *,
    keep: int,
    max_q: int,
    max_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of ragged new tokens, each over its own page up to itself and over the sealed form
    of those before it, which may be pages that the new tokens have filled.

    - `own_k`, `own_v`: `[n, kv_heads, page_size, k_dim or v_dim]` of the layout's dtype, last
      stride 1: the pages that have new tokens, exact, tokens before the new ones included; slots
      behind a row's last token may hold anything.
    - `cu_own`: int32 `[rows + 1]`: those of row i are `[cu_own[i], cu_own[i + 1])`, in order; none
      where it has no new tokens.
    - `block_table`: as in `mixed_decode` for all pages before that of the row's last token; others
      are not used.
    - `max_q`, `max_len`: bounds that are checked; `own_k` sizes the launch.
    - all else as for `mixed_decode` and `prefill.paged_prefill`.

    Returns `[tokens, q_heads, v_dim]`, contiguous, in `q`'s dtype; sums are fp32. Raises ValueError
    where shapes, strides or dtypes disagree, or for groups that `sealed_pieces` can't read.
    """
    tensors = (
        q, k_pages, v_pages, slices, layout, own_k, own_v, cu_own, block_table, cu_q, seq_lens,
    )  # fmt: skip
    check_mixed_prefill(
        *tensors, keep=keep, max_q=max_q, max_len=max_len, scale=scale, window=window,
        softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    # Tokens that no own page has (a padded batch's) belong to nobody: zeros.
    out = q.new_zeros(q.shape[0], q.shape[1], layout.v_dim)
    if q.shape[0] == 0 or own_k.shape[0] == 0:
        return out
    mixed_prefill_launch(
        *tensors, out, keep=keep, scale=scale, window=window, softcap=softcap, sinks=sinks,
        alibi_slopes=alibi_slopes, device=device_of(q),
    ).run(q.device)  # fmt: skip
    return out
