"""Device functions that attend to tiles of sealed and of exact pages, in pieces (`sealed_pieces`).

Integers become fp16 numbers in registers, two at a time: `0x4c00 | n << 6`, n below 16, *is* 16 +
n, and `0x6400 | n`, n below 256, is 1024 + n. A multiply-add then gives what a code stands for, so
nothing is converted, and what a group shares is worked out once for it. (In PTX: three operations
for two numbers of 4 bits, and for two bytes.) Of fp32 models numbers are fp32.
"""

import triton
import triton.language as tl

from kvpaged_kernels.gpu.launch import E4M3_SCALE
from kvpaged_kernels.gpu.primitives import dot, e4m3_even, e4m3_odd
from kvpaged_kernels.gpu.sealed_pieces import EXACT, FP8, INT4, INT8
from kvpaged_kernels.sealed import SCALE_SHIFT, ZERO_SHIFT, ZERO_UNIT

_EXACT = tl.constexpr(EXACT)
_FP8 = tl.constexpr(FP8)
_INT8 = tl.constexpr(INT8)
_INT4 = tl.constexpr(INT4)
_E4M3_SCALE = tl.constexpr(E4M3_SCALE)
_SCALE_SHIFT = tl.constexpr(SCALE_SHIFT)
_ZERO_SHIFT = tl.constexpr(ZERO_SHIFT)
_ZERO_UNIT = tl.constexpr(ZERO_UNIT)
_NIBBLE = """
{{
.reg .b32 a;
{} a, $1, {};
lop3.b32 a, a, 0x03c003c0, 0x4c004c00, 0xEA;
fma.rn.f16x2 $0, a, $2, $3;
}}
"""
_BYTE = """
{{
.reg .b32 a, b;
prmt.b32 a, $1, 0x64646464, {};
mov.b32 b, 0xe400e400;
add.rn.f16x2 a, a, b;
fma.rn.f16x2 $0, a, $2, $3;
}}
"""
_PTX_0 = tl.constexpr(_NIBBLE.format("shl.b32", 6))
_PTX_1 = tl.constexpr(_NIBBLE.format("shl.b32", 2))
_PTX_2 = tl.constexpr(_NIBBLE.format("shr.b32", 2))
_PTX_3 = tl.constexpr(_NIBBLE.format("shr.b32", 6))
_PTX_EVEN = tl.constexpr(_BYTE.format("0x4240"))
_PTX_ODD = tl.constexpr(_BYTE.format("0x4341"))


_MEANING = """
{{
.reg .b32 z, t;
and.b32 $0, $2, 0xff00ff00;
shr.b32 $0, $0, 1;
shl.b32 z, $2, 6;
and.b32 z, z, 0x1fc01fc0;
shl.b32 t, $2, 8;
lop3.b32 z, t, 0x80008000, z, 0xEA;
mov.b32 t, 0x78007800;
{}
mul.rn.f16x2 $1, $0, z;
}}
"""
_PTX_MEANING_4 = tl.constexpr(
    _MEANING.format(".reg .b32 u; mov.b32 u, 0xcc00cc00; fma.rn.f16x2 z, z, t, u;")
)
_PTX_MEANING_8 = tl.constexpr(
    _MEANING.format("mul.rn.f16x2 z, z, t; mov.b32 t, 0x4c004c00; mul.rn.f16x2 z, z, t;")
)


@triton.jit
def meaning(params, FORM: tl.constexpr, FP32: tl.constexpr, PTX: tl.constexpr):
    """Of parameters (int16): the scale, and what `values` adds to a code times it."""
    if PTX and not FP32:
        ASM: tl.constexpr = _PTX_MEANING_4 if FORM == _INT4 else _PTX_MEANING_8
        return tl.inline_asm_elementwise(
            ASM, "=&r,=&r,r", [params], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    bits = params.to(tl.int32)
    scale = ((bits >> 8 & 0xFF) << _SCALE_SHIFT).to(tl.int16).to(tl.float16, bitcast=True)
    zero = ((bits & 0x80) << 8 | (bits & 0x7F) << _ZERO_SHIFT).to(tl.int16)
    zero = zero.to(tl.float16, bitcast=True).to(tl.float32)
    UNIT: tl.constexpr = _ZERO_UNIT if FORM == _INT4 else _ZERO_UNIT * 16
    LESS: tl.constexpr = 16.0 if FORM == _INT4 and not FP32 else 0.0
    low = scale.to(tl.float32) * (zero * UNIT - LESS)
    if FP32:
        return scale.to(tl.float32), low
    return scale, low.to(tl.float16)


@triton.jit
def values(
    words, scale, low, PART: tl.constexpr, FORM: tl.constexpr, FP32: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """What the codes of a piece stand for: of words their part `PART`."""
    if PTX and not FP32:
        if FORM == _INT4:
            ASM: tl.constexpr = (
                _PTX_0 if PART == 0 else _PTX_1 if PART == 1 else _PTX_2 if PART == 2 else _PTX_3
            )
        else:
            ASM: tl.constexpr = _PTX_EVEN if PART == 0 else _PTX_ODD
        found = tl.inline_asm_elementwise(
            ASM, "=r,r,r,r", [words, scale, low], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        if FORM == _INT4:
            code = words.to(tl.int32) >> 4 * PART & 15
        else:
            code = words.to(tl.int32) >> 8 * PART & 255
        if FP32:
            found = code.to(tl.float32) * scale + low
        elif FORM == _INT4:
            number = (code << 6 | 0x4C00).to(tl.int16).to(tl.float16, bitcast=True)
            found = tl.fma(number, scale + number * 0, low + number * 0)
        else:
            number = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
            found = tl.fma(number, scale + number * 0, low + number * 0)
    return found


@triton.jit
def columns(
    PIECE: tl.constexpr, FORM: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns of a piece, and which of them there are."""
    PARTS: tl.constexpr = 4 if FORM == _INT4 else 1 if FORM == _EXACT else 2
    word = PIECE // PARTS * WIDTH + tl.arange(0, BLOCK)
    there = tl.arange(0, BLOCK) < WIDTH
    if FORM == _INT4:
        found = PIECE % PARTS * WORDS + word
    elif FORM == _EXACT:
        found = word
    else:
        found = 2 * word + PIECE % PARTS
    return found, there


@triton.jit
def _words(pointers, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if BLOCK > WIDTH:
        return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0)
    return tl.load(pointers)


@triton.jit
def k_scores(
    q, codes, params, slot,
    FORM: tl.constexpr, DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, TOKENS: tl.constexpr, FP32: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Products of queries, in pieces, with the sealed tokens `slot .. slot + TOKENS` of a page, all
    of one group. `codes` are the head's words, `params` its parameters. Of e4m3 numbers they are
    `E4M3_SCALE` times too small.
    """
    column = tl.arange(0, BLOCK)
    lanes = (slot + tl.arange(0, TOKENS))[:, None] * WORDS + column[None, :]
    words = _words(codes + lanes, column, WORDS, BLOCK)
    scores = tl.zeros([q[0].shape[0], TOKENS], tl.float32)
    if FORM == _EXACT:
        scores = dot(q[0], tl.trans(words), scores)
    elif FORM == _FP8:
        scores = dot(q[0], tl.trans(e4m3_even(words, PTX * 2).to(q[0].dtype)), scores)
        scores = dot(q[1], tl.trans(e4m3_odd(words, PTX * 2).to(q[1].dtype)), scores)
        rest = tl.zeros([q[0].shape[0], BLOCK], tl.float32)
        for piece in tl.static_range(2):
            dim, there = columns(piece, FORM, WORDS, WORDS, BLOCK)
            middle = tl.load(params + dim, mask=there, other=0).to(tl.float16, bitcast=True)
            rest += q[piece].to(tl.float32) * middle.to(tl.float32)[None, :]
        scores += tl.sum(rest, 1)[:, None] * (1 / _E4M3_SCALE)
    else:
        params += slot // GROUP * DIM
        for piece in tl.static_range(4 if FORM == _INT4 else 2):
            dim, there = columns(piece, FORM, WORDS, WORDS, BLOCK)
            scale, low = meaning(tl.load(params + dim, mask=there, other=0), FORM, FP32, PTX)
            k = values(words, scale[None, :], low[None, :], piece, FORM, FP32, PTX)
            scores = dot(q[piece], tl.trans(k), scores)
    return scores


@triton.jit
def add_v(
    acc, p, alpha, codes, params, slot,
    FORM: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, FP32: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Sums `acc`, in pieces, times `alpha` (None: as they were) and with the sealed tokens
    `slot .. slot + TOKENS` of a page, weighed by `p`.
    """
    token = slot + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)
    lanes = token[:, None] * WORDS + column[None, :]
    PARTS: tl.constexpr = 4 if FORM == _INT4 else 1 if FORM == _EXACT else 2
    scales = ()
    if FORM >= _INT8:
        for group in tl.static_range(GROUPS):
            scale, low = meaning(tl.load(params + group * PAGE_SIZE + token), FORM, FP32, PTX)
            scales = scales + (scale[:, None], low[:, None])
    sums = ()
    for tile in tl.static_range(TILES):
        words = _words(codes + (lanes + tile * WIDTH), column, WIDTH, BLOCK)
        for part in tl.static_range(PARTS):
            total = acc[tile * PARTS + part]
            if alpha is not None:
                total = total * alpha[:, None]
            if FORM == _EXACT:
                v = words
                weight = p
            elif FORM == _FP8:
                v = e4m3_even(words, PTX * 2) if part == 0 else e4m3_odd(words, PTX * 2)
                weight = p * _E4M3_SCALE
            elif FORM == _INT8:
                v = values(
                    words, scales[2 * (2 * tile * WIDTH // GROUP)],
                    scales[2 * (2 * tile * WIDTH // GROUP) + 1], part, FORM, FP32, PTX,
                )  # fmt: skip
                weight = p
            else:
                v = values(
                    words, scales[2 * ((part * WORDS + tile * WIDTH) // GROUP)],
                    scales[2 * ((part * WORDS + tile * WIDTH) // GROUP) + 1], part, FORM, FP32, PTX,
                )  # fmt: skip
                weight = p
            if FP32:
                v = v.to(tl.float32)
            sums = sums + (dot(weight.to(v.dtype), v, total),)
    return sums


@triton.jit
def load_exact_v(
    head, token, valid, TILE: tl.constexpr, STRIDE_SLOT: tl.constexpr,
    FORM: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pieces of one tile of exact tokens, zeros where not `valid`."""
    lanes = head + (token * STRIDE_SLOT)[:, None]
    PAIRS: tl.constexpr = (FORM == _FP8) | (FORM == _INT8)
    pieces = ()
    if PAIRS:
        # Adjacent columns of a row lie in one thread: they come apart without a move.
        column = tl.arange(0, 2 * BLOCK)
        there = valid[:, None] & (column < 2 * WIDTH)[None, :]
        both = tl.load(lanes + (2 * TILE * WIDTH + column)[None, :], mask=there, other=0.0)
        pieces = tl.split(tl.reshape(both, [token.shape[0], BLOCK, 2]))
    else:
        PARTS: tl.constexpr = 4 if FORM == _INT4 else 1
        for part in tl.static_range(PARTS):
            dim, there = columns(TILE * PARTS + part, FORM, WORDS, WIDTH, BLOCK)
            value = tl.load(
                lanes + dim[None, :], mask=valid[:, None] & there[None, :], other=0.0
            )  # fmt: skip
            pieces = pieces + (value,)
    return pieces


@triton.jit
def add_exact_v(
    acc, p, alpha, head, token, valid, STRIDE_SLOT: tl.constexpr,
    FORM: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`acc`, in the pieces of sealed pages, times `alpha` and with exact tokens weighed by `p`."""
    PARTS: tl.constexpr = 4 if FORM == _INT4 else 1 if FORM == _EXACT else 2
    sums = ()
    for tile in tl.static_range(TILES):
        pieces = load_exact_v(head, token, valid, tile, STRIDE_SLOT, FORM, WORDS, WIDTH, BLOCK)
        for part in tl.static_range(PARTS):
            value = pieces[part]
            total = acc[tile * PARTS + part] * alpha[:, None]
            sums = sums + (dot(p.to(value.dtype), value, total),)
    return sums


@triton.jit
def load_q(
    places, mask, FORM: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, FP32: tl.constexpr
):  # fmt: skip
    """Queries in the pieces that K is read in; fp16 beside codes."""
    pieces = ()
    for piece in tl.static_range(1 if FORM == _EXACT else 4 if FORM > _INT8 else 2):
        dim, there = columns(piece, FORM, WORDS, WORDS, BLOCK)
        query = tl.load(
            places[:, None] + dim[None, :], mask=mask[:, None] & there[None, :], other=0.0
        )  # fmt: skip
        if FORM != _EXACT and not FP32:
            query = query.to(tl.float16)
        pieces = pieces + (query,)
    return pieces
