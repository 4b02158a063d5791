"""A decode loop over 4-bit pages, as a design study: what such a loop costs, not a format to use.

It is compiled and counted beside vLLM's 4-bit kernel (docs/kernels.md) and its arithmetic is
tested, so that the format of sealed pages can be chosen with figures. Nothing else uses it.

K is symmetric about 8 with a scale per channel and `GROUP` tokens, V with one per token. An int16
holds four codes of one token, of the dimensions d, d + D/4, d + D/2 and d + 3D/4: so a tile is read
as 16-bit numbers by the hardware's own loads, transposed or not, and each nibble position is one
operand of a quarter of the width. `code | 0x4300` *is* the bf16 number 128 + code, so no code is
converted and nothing is subtracted from one: K's scales go into the queries once a group, V's into
the weights, and 136 times what those add up to is taken off per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.gpu.launch import INTERPRETED, LOG2_E, Launch
from kvpaged_kernels.gpu.primitives import LOWEST, dot

GROUP = 128
"""Tokens that share K's scales; the tile and the page of this study."""

_OFFSET = tl.constexpr(136.0)
_LOWEST_NIBBLE = "lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xEA;"
_NIBBLE = "{{ .reg .b32 a; shr.b32 a, $1, {}; lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xEA; }}"
_PTX = tuple(tl.constexpr(_NIBBLE.format(n) if n else _LOWEST_NIBBLE) for n in (0, 4, 8, 12))
_PTX_0, _PTX_1, _PTX_2, _PTX_3 = _PTX


@triton.jit
def _codes(packed, SHIFT: tl.constexpr, PTX: tl.constexpr, IS_PTX: tl.constexpr):
    """128 + code, bf16, of the nibbles at bit `SHIFT` of int16s; two at a time in PTX."""
    if IS_PTX:
        found = tl.inline_asm_elementwise(
            PTX, "=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        bits = packed.to(tl.int32) >> SHIFT & 15 | 0x4300
        found = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return found


@triton.jit
def _scaled(q, scales):
    """Queries with K's scales in them, rounded as the product reads them."""
    return (q.to(tl.float32) * tl.load(scales).to(tl.float32)[None, :]).to(tl.bfloat16)


@triton.jit
def _int4_decode(
    q, k_pages, v_pages, k_scales, v_scales, block_table, seq_lens, out, score_scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_PTX: tl.constexpr,
):  # fmt: skip
    """One program a row, whole pages only; K and V `[pages, BLOCK_N, DIM // 4]` int16, scales fp16
    `[pages, DIM]` and `[pages, BLOCK_N]`, `q` and `out` `[rows, BLOCK_M, DIM]`.
    """
    row = tl.program_id(0)
    QUARTER: tl.constexpr = DIM // 4
    dim = tl.arange(0, QUARTER)
    slot = tl.arange(0, BLOCK_N)
    places = row * BLOCK_M * DIM + tl.arange(0, BLOCK_M)[:, None] * DIM + dim[None, :]
    q0, q1 = tl.load(q + places), tl.load(q + places + QUARTER)
    q2, q3 = tl.load(q + places + 2 * QUARTER), tl.load(q + places + 3 * QUARTER)
    tile = slot[:, None] * QUARTER + dim[None, :]
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    weighed = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc0 = tl.zeros([BLOCK_M, QUARTER], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    table = block_table + row * tl.load(seq_lens + tl.num_programs(0))
    pages = tl.load(seq_lens + row) // BLOCK_N
    page = tl.load(table).to(tl.int64)
    for number in range(pages):
        following = tl.load(table + number + 1, mask=number + 1 < pages, other=0).to(tl.int64)
        k = tl.load(k_pages + tile + page * BLOCK_N * QUARTER)
        scales = k_scales + page * DIM + dim
        s0, s1 = _scaled(q0, scales), _scaled(q1, scales + QUARTER)
        s2, s3 = _scaled(q2, scales + 2 * QUARTER), _scaled(q3, scales + 3 * QUARTER)
        # The very numbers that the products read: so 136 times their sum is what is to come off.
        both = s0.to(tl.float32) + s1.to(tl.float32) + s2.to(tl.float32) + s3.to(tl.float32)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) - tl.sum(both, 1)[:, None] * _OFFSET
        scores = dot(s0, tl.trans(_codes(k, 0, _PTX_0, IS_PTX)), scores)
        scores = dot(s1, tl.trans(_codes(k, 4, _PTX_1, IS_PTX)), scores)
        scores = dot(s2, tl.trans(_codes(k, 8, _PTX_2, IS_PTX)), scores)
        scores = dot(s3, tl.trans(_codes(k, 12, _PTX_3, IS_PTX)), scores)
        m_new = tl.maximum(m, tl.max(scores, 1) * score_scale)
        p = tl.exp2(scores * score_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha[:, None] + p
        each = tl.load(v_scales + page * BLOCK_N + slot).to(tl.float32)
        weights = (p * each[None, :]).to(tl.bfloat16)
        weighed = weighed * alpha[:, None] + weights.to(tl.float32)
        v = tl.load(v_pages + tile + page * BLOCK_N * QUARTER)
        acc0 = dot(weights, _codes(v, 0, _PTX_0, IS_PTX), acc0 * alpha[:, None])
        acc1 = dot(weights, _codes(v, 4, _PTX_1, IS_PTX), acc1 * alpha[:, None])
        acc2 = dot(weights, _codes(v, 8, _PTX_2, IS_PTX), acc2 * alpha[:, None])
        acc3 = dot(weights, _codes(v, 12, _PTX_3, IS_PTX), acc3 * alpha[:, None])
        m = m_new
        page = following
    shift = tl.sum(weighed, 1)[:, None] * _OFFSET
    over = tl.sum(total, 1)[:, None]
    tl.store(out + places, (acc0 - shift) / over)
    tl.store(out + places + QUARTER, (acc1 - shift) / over)
    tl.store(out + places + 2 * QUARTER, (acc2 - shift) / over)
    tl.store(out + places + 3 * QUARTER, (acc3 - shift) / over)


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 `[..., dim]`, each below 16, as int16 `[..., dim // 4]`."""
    parts = codes.to(torch.int32).unflatten(-1, (4, -1)).unbind(-2)
    packed = parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12
    signed: Tensor = packed - (packed >> 15 << 16)
    return signed.to(torch.int16)


def int4_launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
) -> Launch:
    """The launch of the study: 16 queries a row, pages of 128 tokens.

    `seq_lens` int32 `[rows + 1]` holds multiples of 128, and the table's row stride at its end.
    """
    rows, block_m, dim = q.shape
    return Launch(
        kernel=_int4_decode,
        grid=(rows,),
        arguments={
            "q": q,
            "k_pages": k_pages,
            "v_pages": v_pages,
            "k_scales": k_scales,
            "v_scales": v_scales,
            "block_table": block_table,
            "seq_lens": seq_lens,
            "out": out,
            "score_scale": dim**-0.5 * LOG2_E,
            "DIM": dim,
            "BLOCK_M": block_m,
            "BLOCK_N": GROUP,
            "IS_PTX": not INTERPRETED,
        },
        num_stages=3,
    )
