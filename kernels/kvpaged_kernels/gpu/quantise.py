"""Device functions that choose codes: of integers that share a parameter, and of e4m3 numbers."""

import triton
import triton.language as tl

from kvpaged_kernels.sealed import SCALE_SHIFT, ZERO_SHIFT, ZERO_UNIT

_SCALE_SHIFT = tl.constexpr(SCALE_SHIFT)
_SCALE_REST = tl.constexpr((1 << SCALE_SHIFT) - 1)
_MOST_SCALE = tl.constexpr((31 << 10 - SCALE_SHIFT) - 1)
_ZERO_SHIFT = tl.constexpr(ZERO_SHIFT)
_ZERO_HALF = tl.constexpr(1 << ZERO_SHIFT - 1)
_ZERO_UNIT = tl.constexpr(ZERO_UNIT)
_FARTHEST = tl.constexpr(248.0)
_HIGHEST_TRIED = tl.constexpr(2)
_E4M3_MOST = tl.constexpr(448.0)


@triton.jit
def _rounded(x, MOST: tl.constexpr):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), MOST)


@triton.jit
def _over(x, ROWS: tl.constexpr, SUM: tl.constexpr):
    """The sum or the maximum over axis 1, and with `ROWS` over axis 2."""
    x = tl.sum(x, 1, keep_dims=True) if SUM else tl.max(x, 1, keep_dims=True)
    if ROWS:
        x = tl.sum(x, 2, keep_dims=True) if SUM else tl.max(x, 2, keep_dims=True)
    return x


@triton.jit
def _tried(low, high, step, TOP: tl.constexpr, UNIT: tl.constexpr):
    """Of the scale so many steps above the first that holds a group's range: the parameter, the
    scale, and what code 0 stands for.
    """
    wanted = tl.maximum((high - low) / TOP, tl.abs(low) / (_FARTHEST * UNIT))
    wanted = tl.minimum(wanted, 65504.0)
    # The bits of a positive fp16 number rise with it: the first scale that is not below.
    near = wanted.to(tl.float16)
    most = near.to(tl.int16, bitcast=True).to(tl.int32)
    most += (near.to(tl.float32) < wanted).to(tl.int32)
    most = most + _SCALE_REST >> _SCALE_SHIFT
    kept = tl.minimum(tl.maximum(most + step, 1), _MOST_SCALE)
    scale = (kept << _SCALE_SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    begin = (low + high - TOP * scale) / 2  # what goes beyond is clipped on both sides
    zero = begin / (scale * UNIT)
    far = (tl.minimum(tl.abs(zero), _FARTHEST) / _ZERO_UNIT).to(tl.float16)
    bits = far.to(tl.int16, bitcast=True).to(tl.int32) + _ZERO_HALF >> _ZERO_SHIFT
    bits = tl.minimum(bits, 0x7F)
    far = (bits << _ZERO_SHIFT).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    base = scale * far * (_ZERO_UNIT * UNIT)
    base = tl.where(zero < 0, -base, base)
    return kept << 8 | bits | (zero < 0).to(tl.int32) << 7, scale, base


@triton.jit
def quantise(x, there, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Codes and parameters (int32 both) of `x`, fp32 of three dimensions, of which axis 1, with
    `ROWS` axis 2 too, share one; scales, and what codes stand for less `x` (fp32). Where not
    `there` nothing counts (without `ROWS`, whole groups are not there, and 0).

    The scales from two steps above the first that holds the whole range to one below are
    tried; the one with the least sum of squared errors is taken.
    """
    TOP: tl.constexpr = 2.0**BITS - 1
    UNIT: tl.constexpr = 2.0**BITS / 16
    if ROWS:
        low = -_over(tl.where(there, -x, -float("inf")), ROWS, False)
        high = _over(tl.where(there, x, -float("inf")), ROWS, False)
    else:
        low, high = -_over(-x, ROWS, False), _over(x, ROWS, False)
    least = tl.zeros(low.shape, tl.float32) + float("inf")
    chosen = tl.zeros(low.shape, tl.int32)
    for turn in range(_HIGHEST_TRIED + 2):
        _, scale, base = _tried(low, high, _HIGHEST_TRIED - turn, TOP, UNIT)
        code = _rounded((x - base) * (1.0 / scale), TOP)
        error = tl.where(there, base + scale * code - x, 0.0)
        squares = _over(error * error, ROWS, True)
        chosen = tl.where(squares < least, _HIGHEST_TRIED - turn, chosen)
        least = tl.minimum(squares, least)
    param, scale, base = _tried(low, high, chosen, TOP, UNIT)
    code = _rounded((x - base) * (1.0 / scale), TOP)
    error = tl.where(there, base + scale * code - x, 0.0)
    return code.to(tl.int32), param, scale, error


@triton.jit
def move_codes(code, scale, error, query, weight, along, TOP: tl.constexpr, MOVES: tl.constexpr):
    """Codes (int32) of some channels, the last axis, moved as `reference.moves` does it: codes,
    their errors, and `along`, which is `query . error` over all channels so far, with these. Where
    `query` is 0, codes stay.
    """
    along += tl.sum(error * query, 2, keep_dims=True)
    number = tl.arange(0, code.shape[2])[None, None, :]
    for _ in tl.static_range(MOVES):
        down = along * query > 0
        by = tl.where(down, -scale, scale)
        across = by * query
        change = across * (2 * along + across) + weight * by * (2 * error + by)
        moved = code + tl.where(down, -1, 1)
        can = (query != 0) & (moved >= 0) & (moved <= TOP)
        change = tl.where(can, change, float("inf"))
        taken = number == tl.argmin(change, 2, keep_dims=True)
        taken &= tl.min(change, 2, keep_dims=True) < 0
        code = tl.where(taken, moved, code)
        error += tl.where(taken, by, 0.0)
        along += tl.sum(tl.where(taken, across, 0.0), 2, keep_dims=True)
    return code, error, along


@triton.jit
def e4m3(x):
    """The bytes of fp32 numbers as e4m3, rounded to even and saturating, and what they stand for.

    Below 2**-6 numbers are multiples of 2**-9, which adding 2**14 rounds to; elsewhere the bits of
    an fp32 number that are too many are rounded off and its exponent, 120 more, is moved.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), _E4M3_MOST)
    raw = size.to(tl.int32, bitcast=True)
    normal = raw + 0x7FFFF + (raw >> 20 & 1) >> 20
    small = size + 16384.0 - 16384.0
    byte = tl.where(size < 0.015625, (small * 512.0).to(tl.int32), normal - (120 << 3))
    value = tl.where(size < 0.015625, small, (normal << 20).to(tl.float32, bitcast=True))
    return byte | bits >> 24 & 0x80, tl.where(bits < 0, -value, value)
