"""Steps of online softmax over a tile of exact or of sealed tokens, of decode and prefill alike.

`acc` is a tuple of pieces (`sealed_pieces`), fp32; `m`, fp32 `[rows]`, are maxima in units of log2.
"""

import triton
import triton.language as tl

from kvpaged_kernels.gpu.primitives import capped, dot
from kvpaged_kernels.gpu.sealed_tiles import add_exact_v, add_v, k_scores


@triton.jit
def _in_log2(
    scores, token, position, slope, window, score_scale, cap,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Scores in units of log2 with everything in them, -inf where a token is not seen."""
    scores *= score_scale
    if HAS_SOFTCAP:
        scores = capped(scores, cap, PRECISE)
    if slope is not None:
        distance = (token[None, :] - position[:, None]).to(tl.float32)
        scores += slope[:, None] * distance
    if CAUSAL:
        scores = tl.where(token[None, :] <= position[:, None], scores, -float("inf"))
    if HAS_WINDOW:
        seen = token[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, -float("inf"))
    return scores


@triton.jit
def exact_step(
    acc, m, over, query, k_head, v_head, first, end, position, slope, window, score_scale, cap,
    STRIDE_K_SLOT: tl.constexpr, STRIDE_V_SLOT: tl.constexpr, K_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE_SIZE: tl.constexpr, V_FORM: tl.constexpr, V_WORDS: tl.constexpr,
    V_TILES: tl.constexpr, V_WIDTH: tl.constexpr, V_BLOCK: tl.constexpr, EXACT_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """The tokens `first .. first + EXACT_N`, below `end`, of the page at `k_head` and `v_head`.

    `over` `[rows]` is the denominator.
    """
    token = first + tl.arange(0, EXACT_N)
    slot = token % PAGE_SIZE
    valid = token < end
    dim = tl.arange(0, BLOCK_K)
    k = tl.load(
        k_head + (slot * STRIDE_K_SLOT)[:, None] + dim[None, :],
        mask=valid[:, None] & (dim < K_DIM)[None, :],
        other=0.0,
    )
    scores = dot(query, tl.trans(k), tl.zeros([query.shape[0], EXACT_N], tl.float32))
    scores = _in_log2(
        scores, token, position, slope, window, score_scale, cap,
        HAS_WINDOW, HAS_SOFTCAP, True, FP32,
    )  # fmt: skip
    m_new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    over = over * alpha + tl.sum(p, 1)
    acc = add_exact_v(
        acc, p, alpha, v_head, slot, valid, STRIDE_V_SLOT,
        V_FORM, V_WORDS, V_TILES, V_WIDTH, V_BLOCK,
    )  # fmt: skip
    return acc, m_new, over


@triton.jit
def sealed_step(
    acc, m, total, q, k_head, v_head, k_params, v_params, token, position, slope, window,
    score_scale, cap,
    K_FORM: tl.constexpr, K_DIM: tl.constexpr, K_WORDS: tl.constexpr, K_BLOCK: tl.constexpr,
    K_GROUP: tl.constexpr, V_FORM: tl.constexpr, V_WORDS: tl.constexpr, V_TILES: tl.constexpr,
    V_WIDTH: tl.constexpr, V_BLOCK: tl.constexpr, V_GROUP: tl.constexpr, V_GROUPS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FP32: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The tokens `token .. token + BLOCK_N` of one page, `TOKENS` at a time, which share K's
    parameters. All queries come after them.

    `total` `[rows, TOKENS]` is each column's own denominator, which saves a reduction a tile.
    """
    slot = token % PAGE_SIZE
    m_new = m
    each = ()
    for part in tl.static_range(BLOCK_N // TOKENS):
        scores = k_scores(
            q, k_head, k_params, slot + part * TOKENS, K_FORM, K_DIM, K_WORDS, K_BLOCK, K_GROUP,
            TOKENS, FP32, PTX,
        )  # fmt: skip
        scores = _in_log2(
            scores, token + part * TOKENS + tl.arange(0, TOKENS), position, slope, window,
            score_scale, cap, HAS_WINDOW, HAS_SOFTCAP, False, FP32,
        )  # fmt: skip
        m_new = tl.maximum(m_new, tl.max(scores, 1))
        each = each + (scores,)
    alpha = tl.exp2(m - m_new)
    total = total * alpha[:, None]
    for part in tl.static_range(BLOCK_N // TOKENS):
        p = tl.exp2(each[part] - m_new[:, None])
        total += p
        acc = add_v(
            acc, p, alpha if part == 0 else None, v_head, v_params, slot + part * TOKENS,
            V_FORM, V_WORDS, V_TILES, V_WIDTH, V_BLOCK, V_GROUP, V_GROUPS, PAGE_SIZE, TOKENS,
            FP32, PTX,
        )  # fmt: skip
    return acc, m_new, total
