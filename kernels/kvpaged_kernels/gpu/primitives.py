"""Device functions shared by the kernels.

Scores are kept in units of log2: the caller folds log2(e) into the scale, and `exp2` takes the
place of `exp`. Running maxima start at `LOWEST`, a finite number, so that a wholly masked row gives
exp2(-inf - LOWEST) = 0 and never the NaN of -inf - -inf.
"""

import triton
import triton.language as tl

from kvpaged_kernels.gpu.launch import E4M3_SCALE, INTERPRETED, LOG2_E

LOWEST = tl.constexpr(-1.0e38)
_LOG2_E = tl.constexpr(LOG2_E)
_INTERPRETED = tl.constexpr(INTERPRETED)
_E4M3_SCALE = tl.constexpr(E4M3_SCALE)


@triton.jit
def dot(a, b, acc):
    """`acc + a @ b` with fp32 accumulation; fp32 operands are never rounded to tf32."""
    if _INTERPRETED:
        # The interpreter multiplies bf16 operands as if their bits were integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_entries(table, start, end, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Entries of the tokens `start .. start + BLOCK_N`; from `end` on nothing is read.

    `start` is a multiple of min(PAGE_SIZE, BLOCK_N). A tile inside one page has one scalar entry,
    a tile over several pages has one entry a token.
    """
    page = start // PAGE_SIZE
    if BLOCK_N > PAGE_SIZE:
        # A page number and its mask are the same for all tokens of the page, and the compiler sees
        # it: a lane that holds several of them loads once.
        page += tl.arange(0, BLOCK_N) // PAGE_SIZE
    return tl.load(table + page, mask=page * PAGE_SIZE < end, other=0)


@triton.jit
def load_tokens(
    pages,
    entry,
    start,
    valid,
    STRIDE_ENTRY: tl.constexpr,
    STRIDE_SLOT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The vectors of the tokens `start .. start + BLOCK_N` of one head, zero where not `valid`.

    `entry`, int64, is as `load_entries` gave it. Within a page offsets are int32 (the launcher
    checks that they fit) and, the slots' stride being a constant, immediates of the loads. Slots
    past the length may hold anything, NaN included, and 0 * NaN is NaN: hence the zeros.
    """
    dim = tl.arange(0, BLOCK_D)
    slot = tl.arange(0, BLOCK_N)
    if BLOCK_N > PAGE_SIZE:  # a tile of several pages starts at slot 0 of one
        lanes = pages + (slot % PAGE_SIZE * STRIDE_SLOT)[:, None] + dim[None, :]
        pointers = lanes + (entry * STRIDE_ENTRY)[:, None]
    else:
        lanes = pages + (slot * STRIDE_SLOT)[:, None] + dim[None, :]
        pointers = lanes + (entry * STRIDE_ENTRY + start % PAGE_SIZE * STRIDE_SLOT)
    if MASKED:
        if BLOCK_D > DIM:
            return tl.load(pointers, mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    if BLOCK_D > DIM:
        return tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def capped(x, cap, PRECISE: tl.constexpr):
    """`cap * tanh(y)` for `x = 2 * log2(e) * y`: the caller folds the factor into `x`.

    tanh(y) = 1 - 2 / (exp(2y) + 1), with the absolute error of fp32 near 1. The bound keeps the
    exponential finite, far above where tanh rounds to 1. `PRECISE` (fp32 tensors) takes the Taylor
    series where |y| < 1/4; there the first form would be 20 times less exact than fp32 allows.
    """
    far = cap - 2.0 * cap / (tl.exp2(tl.minimum(x, 126.0)) + 1.0)
    if not PRECISE:
        return far
    y = x * 0.34657359027997264  # ln(2) / 2
    s = y * y
    series = -1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))
    return tl.where(tl.abs(y) < 0.25, cap * (y + y * s * series), far)


@triton.jit
def e4m3_even(pairs, FP8: tl.constexpr):
    """The lower bytes of int16s, each an e4m3 number, as fp16 numbers 2**-8 times as large.

    An e4m3 number is the top of an fp16 number but for the exponent's bias (7, not 15), zeros and
    subnormal numbers included, so moving its bits converts it: two at a time in PTX (`FP8` 2).
    """
    if FP8 == 2:
        found = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 rest, sign;
            shl.b32 rest, $1, 7;
            shl.b32 sign, $1, 8;
            and.b32 rest, rest, 0x3f803f80;
            lop3.b32 $0, sign, 0x80008000, rest, 0xEA;
            }
            """,
            "=r,r",
            [pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        bits = pairs.to(tl.int32)
        found = ((bits & 0x7F) << 7 | (bits & 0x80) << 8).to(tl.int16).to(tl.float16, bitcast=True)
    return found


@triton.jit
def e4m3_odd(pairs, FP8: tl.constexpr):
    """The same of the upper bytes."""
    if FP8 == 2:
        found = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 rest;
            shr.b32 rest, $1, 1;
            and.b32 rest, rest, 0x3f803f80;
            lop3.b32 $0, $1, 0x80008000, rest, 0xEA;
            }
            """,
            "=r,r",
            [pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        bits = pairs.to(tl.int32)
        found = ((bits >> 1) & 0x3F80 | bits & 0x8000).to(tl.int16).to(tl.float16, bitcast=True)
    return found


@triton.jit
def attend_tile(
    acc,
    acc_odd,
    m,
    total,
    q,
    q_odd,
    k_pages,
    v_pages,
    entry,
    start,
    position,
    end,
    slope,
    window,
    score_scale,
    cap,
    STRIDE_K_ENTRY: tl.constexpr,
    STRIDE_V_ENTRY: tl.constexpr,
    STRIDE_K_SLOT: tl.constexpr,
    STRIDE_V_SLOT: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    SUM_LATER: tl.constexpr,
    FP8: tl.constexpr,
):
    """One step of online softmax over the tokens `start .. start + BLOCK_N`, below `end`.

    `q` is `[BLOCK_M, BLOCK_K]`, `position` int32 `[BLOCK_M]`; `acc` `[BLOCK_M, BLOCK_V]`, `m` and
    `total` `[BLOCK_M]` are fp32 and returned anew. With `SUM_LATER`, `total` is
    `[BLOCK_M, BLOCK_N]`: each column's own sum, which saves a reduction a tile. `slope` is that of
    ALiBi, `[BLOCK_M]` in units of log2, or None. Milakov and Gimelshein, arXiv:1805.02867.

    With `FP8`, pages are pairs of e4m3 numbers as int16 and dimensions count pairs: `q` and `acc`
    are the even columns, `q_odd` and `acc_odd` the odd ones (elsewhere unused). So both products
    read tiles of 16 bits from shared memory, transposed or not, with the hardware's own loads.
    """
    token = start + tl.arange(0, BLOCK_N)
    valid = token < end
    entry = entry.to(tl.int64)
    k = load_tokens(
        k_pages, entry, start, valid, STRIDE_K_ENTRY, STRIDE_K_SLOT,
        K_DIM, BLOCK_K, PAGE_SIZE, BLOCK_N, MASKED,
    )  # fmt: skip
    scores = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    if FP8:
        scores = dot(q, tl.trans(e4m3_even(k, FP8)), scores)
        scores = dot(q_odd, tl.trans(e4m3_odd(k, FP8)), scores)
    else:
        scores = dot(q, tl.trans(k), scores)
    # The factor goes into the exponent's multiply-add, which costs nothing; a cap needs it before.
    factor = score_scale
    if HAS_SOFTCAP:
        scores = capped(scores * score_scale, cap, q.dtype == tl.float32)
        factor = 1.0
    if slope is not None:
        distance = (token[None, :] - position[:, None]).to(tl.float32)
        scores = scores * factor + slope[:, None] * distance
        factor = 1.0
    if MASKED:
        seen = token[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen &= token[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, -float("inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * factor)
    p = tl.exp2(scores * factor - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    total = total * alpha[:, None] + p if SUM_LATER else total * alpha + tl.sum(p, 1)
    v = load_tokens(
        v_pages, entry, start, valid, STRIDE_V_ENTRY, STRIDE_V_SLOT,
        V_DIM, BLOCK_V, PAGE_SIZE, BLOCK_N, MASKED,
    )  # fmt: skip
    if FP8:
        weights = p.to(tl.float16)
        acc = dot(weights, e4m3_even(v, FP8), acc * alpha[:, None])
        acc_odd = dot(weights, e4m3_odd(v, FP8), acc_odd * alpha[:, None])
    else:
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, acc_odd, m_new, total


@triton.jit
def attend(
    q,
    k_pages,
    v_pages,
    table,
    position,
    low,
    high,
    start,
    end,
    slope,
    window,
    score_scale,
    cap,
    STRIDE_K_ENTRY: tl.constexpr,
    STRIDE_V_ENTRY: tl.constexpr,
    STRIDE_K_SLOT: tl.constexpr,
    STRIDE_V_SLOT: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SUM_LATER: tl.constexpr,
    FP8: tl.constexpr,
):
    """Attention of a block of queries to the tokens `start .. end` of one KV head.

    `position` `[BLOCK_M]` lies in `low .. high`, both included. The tiles come in three runs: those
    where some window starts, those that every query sees whole and that need no mask, and those
    where a query or the range ends. Returns `acc` (not yet divided), `m` and `total`.

    With `FP8` the pages are those of e4m3 numbers, seen as int16 pairs; `score_scale` makes up for
    what the conversion leaves out of K, V's part is made up for here.
    """
    PARTS: tl.constexpr = 2 if FP8 else 1
    q_odd = q
    if FP8:
        q, q_odd = tl.split(tl.reshape(q.to(tl.float16), [q.shape[0], BLOCK_K // 2, 2]))
    edge = start
    if HAS_WINDOW:
        edge += tl.cdiv(tl.maximum(high - window + 1 - start, 0), BLOCK_N) * BLOCK_N
        edge = tl.minimum(edge, end)
    whole = edge + tl.maximum(tl.minimum(low + 1, end) - edge, 0) // BLOCK_N * BLOCK_N

    m = tl.full([q.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([q.shape[0], BLOCK_N] if SUM_LATER else [q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], BLOCK_V // PARTS], tl.float32)
    acc_odd = acc if FP8 else m
    # Entries are loaded a tile ahead: a load whose address waits for another load in the same turn
    # of the loop would take pipeline stages from K and V.
    entry = load_entries(table, start, end, PAGE_SIZE, BLOCK_N)
    if HAS_WINDOW:
        for token in tl.range(start, edge, BLOCK_N, num_stages=1):
            following = load_entries(table, token + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
            acc, acc_odd, m, total = attend_tile(
                acc, acc_odd, m, total, q, q_odd, k_pages, v_pages, entry, token, position, end,
                slope, window, score_scale, cap,
                STRIDE_K_ENTRY, STRIDE_V_ENTRY, STRIDE_K_SLOT, STRIDE_V_SLOT,
                K_DIM // PARTS, V_DIM // PARTS, BLOCK_K // PARTS, BLOCK_V // PARTS,
                PAGE_SIZE, BLOCK_N, HAS_WINDOW, HAS_SOFTCAP, True, SUM_LATER, FP8,
            )  # fmt: skip
            entry = following
    for token in range(edge, whole, BLOCK_N):
        following = load_entries(table, token + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        acc, acc_odd, m, total = attend_tile(
            acc, acc_odd, m, total, q, q_odd, k_pages, v_pages, entry, token, position, end,
            slope, window, score_scale, cap,
            STRIDE_K_ENTRY, STRIDE_V_ENTRY, STRIDE_K_SLOT, STRIDE_V_SLOT,
            K_DIM // PARTS, V_DIM // PARTS, BLOCK_K // PARTS, BLOCK_V // PARTS, PAGE_SIZE, BLOCK_N,
            HAS_WINDOW, HAS_SOFTCAP, False, SUM_LATER, FP8,
        )  # fmt: skip
        entry = following
    for token in tl.range(whole, end, BLOCK_N, num_stages=1):
        following = load_entries(table, token + BLOCK_N, end, PAGE_SIZE, BLOCK_N)
        acc, acc_odd, m, total = attend_tile(
            acc, acc_odd, m, total, q, q_odd, k_pages, v_pages, entry, token, position, end,
            slope, window, score_scale, cap,
            STRIDE_K_ENTRY, STRIDE_V_ENTRY, STRIDE_K_SLOT, STRIDE_V_SLOT,
            K_DIM // PARTS, V_DIM // PARTS, BLOCK_K // PARTS, BLOCK_V // PARTS, PAGE_SIZE, BLOCK_N,
            HAS_WINDOW, HAS_SOFTCAP, True, SUM_LATER, FP8,
        )  # fmt: skip
        entry = following
    if SUM_LATER:
        total = tl.sum(total, 1)
    if FP8:
        acc = tl.interleave(acc, acc_odd) * _E4M3_SCALE
    return acc, m, total


@triton.jit
def load_slopes(alibi_slopes, head, mask):
    """The ALiBi slope of each `head` in units of log2, or None."""
    slopes = alibi_slopes
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + head, mask=mask, other=0.0).to(tl.float32) * _LOG2_E
    return slopes


@triton.jit
def add_sinks(m, total, sinks, head, mask):
    """Maximum and denominator with the sink of each `head` in, and the factor due to old sums."""
    sink = tl.load(sinks + head, mask=mask, other=LOWEST).to(tl.float32) * _LOG2_E
    m_new = tl.maximum(m, sink)
    alpha = tl.exp2(m - m_new)
    return m_new, total * alpha + tl.exp2(sink - m_new), alpha


@triton.jit
def window_begin(position, window, ALIGN: tl.constexpr):
    """The first token to read for a query at `position`: where its window starts, rounded down."""
    first = tl.maximum(position - window + 1, 0)
    return first // ALIGN * ALIGN
