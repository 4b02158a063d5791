"""Floats without loss: exponents are entropy-coded, signs and mantissas are kept as they are.

The high 16 bits of a float (all of a bf16 or fp16) are `s eeeeeeee mmmmmmm` for bf16 and fp32; other
formats have other fields at those places, and what is said of the middle byte here holds of whatever
is there. That byte varies little among the values of a tensor (2.6 bits of entropy in K and V of
SmolLM2), the other bits hardly less than noise, so only it is coded.

A block of `2 h` elements pairs element `j` with element `j + h`, and makes two words of 16 bits of
each pair, so that coding and decoding are a few shifts and masks over whole arrays, 64 bits at a
time, in memory that stays in a core's own cache:

    coded word   exponent of j + h (8 bits) | exponent of j (8 bits)
    plain word   s of j | s and m of j + h (8 bits) | m of j (7 bits)

Coded words are a zstd frame a block. Encoded bytes, little-endian:

    | version u8 | words u8 | 0 u16 | block elements u32 | elements u64 |
    | blocks x (bytes of its frame u32; 0: its coded words are as they are) |
    | low words of all elements ((words - 1) x u16 each) | plain words of all blocks |
    | the last element's high word, if elements are odd | frames |

`words` are 16-bit words of an element: 1, 2 or 4. The last block is what is left, an even number.
"""

import struct
import sys
import threading

import numpy as np
import torch

from kvpaged.codecs.base import WORTH, Bytes, Codec
from kvpaged.codecs.zstd import Zstd, compress, decompress
from kvpaged.errors import IntegrityError

assert sys.byteorder == "little"

VERSION = 1
BLOCK = 1 << 17
"""Elements of a block: 128 KiB each of coded and plain words, a zstd block of the largest size."""
_HEADER = struct.Struct("<BBHIQ")
_LANES = 0x0001_0001_0001_0001

_WORDS = {
    torch.bfloat16: 1, torch.float16: 1, torch.float32: 2, torch.float64: 4,
    torch.complex32: 1, torch.complex64: 2, torch.complex128: 4,
}  # fmt: skip

_local = threading.local()


def _scratch() -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of uint64, a half block of elements each; a thread's own."""
    found = getattr(_local, "scratch", None)
    if found is None:
        found = _local.scratch = tuple(np.empty(BLOCK // 8, np.uint64) for _ in range(2))
    return found


def _wide(words: np.ndarray, pairs: int) -> tuple[np.ndarray, int]:
    """uint16 words as uint64 where there is a multiple of four, with the masks' factor."""
    return (words.view(np.uint64), _LANES) if pairs % 4 == 0 else (words, 1)


def split(high: np.ndarray, coded: np.ndarray, plain: np.ndarray) -> None:
    """Coded and plain words (uint16 [h] each) of a block (uint16 [2 h])."""
    h = len(coded)
    first, second = high[:h], high[h:]
    np.right_shift(first, 7, out=coded)
    coded &= 0x00FF
    np.left_shift(second, 1, out=plain)
    plain &= 0xFF00
    coded |= plain
    np.bitwise_and(second, 0x007F, out=plain)
    plain <<= 7
    plain |= (second >> 1) & 0x4000
    plain |= first & 0x807F


def join(coded: np.ndarray, plain: np.ndarray, high: np.ndarray) -> None:
    """What `split` split; `high` is contiguous and its address even."""
    h = len(coded)
    e, lanes = _wide(coded, h)
    p, _ = _wide(plain, h)
    first, second = _wide(high[:h], h)[0], _wide(high[h:], h)[0]
    scratch = _scratch()[0].view(e.dtype)[: len(e)]
    number = e.dtype.type
    np.bitwise_and(e, number(0x00FF * lanes), out=scratch)
    np.left_shift(scratch, number(7), out=scratch)
    np.bitwise_and(p, number(0x807F * lanes), out=first)
    np.bitwise_or(first, scratch, out=first)
    # The sign of the second is bit 7 of eight; adding 0x7f80 carries it to bit 15 only.
    np.right_shift(p, number(7), out=scratch)
    np.bitwise_and(scratch, number(0x00FF * lanes), out=scratch)
    np.add(scratch, number(0x7F80 * lanes), out=scratch)
    np.bitwise_and(scratch, number(0x807F * lanes), out=scratch)
    np.right_shift(e, number(1), out=second)
    np.bitwise_and(second, number(0x7F80 * lanes), out=second)
    np.bitwise_or(second, scratch, out=second)


def _halves(elements: int) -> list[int]:
    """Pairs of each block."""
    pairs, most = elements // 2, BLOCK // 2
    return [most] * (pairs // most) + ([pairs % most] if pairs % most else [])


class Lossless(Codec):
    """Floats by their exponents; other dtypes as `zstd` has them."""

    id = 2
    name = "lossless"

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """See `Codec.encode`."""
        count = _WORDS.get(dtype)
        if count is None:
            return Zstd().encode(data, dtype)
        words = data.view(np.uint16) if data.ctypes.data % 2 == 0 else data.copy().view(np.uint16)
        words = words.reshape(-1, count)
        elements, odd = len(words), len(words) % 2
        high = np.ascontiguousarray(words[:, -1])
        halves = _halves(elements)
        plain = np.empty(elements // 2, np.uint16)
        coded = np.empty(BLOCK // 2, np.uint16)
        frames, sizes, at = [], [], 0
        left = WORTH * len(data) - 2 * elements // 2 - 2 * (count - 1) * elements
        for h in halves:
            split(high[2 * at : 2 * (at + h)], coded[:h], plain[at : at + h])
            raw = coded[:h].view(np.uint8)
            frame = compress(raw)
            kept = len(frame) < len(raw)
            frames.append(frame if kept else raw.tobytes())
            sizes.append(len(frame) if kept else 0)
            left -= len(frames[-1])
            if left < 0:
                return None
            at += h
        whole = b"".join((
            _HEADER.pack(VERSION, count, 0, BLOCK, elements),
            np.array(sizes, np.uint32).tobytes(),
            words[:, :-1].tobytes(), plain.tobytes(), high[elements - odd :].tobytes(), *frames,
        ))  # fmt: skip
        return np.frombuffer(whole, np.uint8) if len(whole) <= WORTH * len(data) else None

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """See `Codec.decode_into`."""
        count = _WORDS.get(dtype)
        if count is None:
            Zstd().decode_into(stored, out, dtype)
            return
        elements = len(out) // (2 * count)
        halves = _halves(elements)
        low_bytes, odd = 2 * (count - 1) * elements, elements % 2
        plain_at = _HEADER.size + 4 * len(halves) + low_bytes
        at = plain_at + 2 * (elements // 2) + 2 * odd
        if len(stored) < at or len(out) != 2 * count * elements:
            raise IntegrityError(f"lossless: {len(stored)} bytes stored for {len(out)} of {dtype}")
        wanted = (VERSION, count, 0, BLOCK, elements)
        header = _HEADER.unpack_from(stored.data)
        if header != wanted:
            raise IntegrityError(f"lossless: the header is {header}, not {wanted}")
        sizes = np.frombuffer(stored[_HEADER.size :], np.uint32, len(halves)).tolist()
        ends = [n or 2 * h for n, h in zip(sizes, halves, strict=True)]
        if at + sum(ends) != len(stored):
            raise IntegrityError(f"lossless: {len(stored)} bytes, its lengths say {at + sum(ends)}")
        aligned = out.ctypes.data % 2 == 0 and out.flags.c_contiguous
        target = out if aligned else np.empty(len(out), np.uint8)
        words = target.view(np.uint16).reshape(elements, count)
        high = words[:, 0] if count == 1 else np.empty(elements, np.uint16)
        if odd:
            high[-1:] = np.frombuffer(stored[at - 2 : at].tobytes(), np.uint16)
        done = 0
        for size, stored_bytes, h in zip(sizes, ends, halves, strict=True):
            frame = stored[at : at + stored_bytes]
            raw = decompress(frame, 2 * h) if size else frame.tobytes()
            plain = stored[plain_at + 2 * done : plain_at + 2 * (done + h)]
            if plain.ctypes.data % 2:
                plain = plain.copy()
            join(
                np.frombuffer(raw, np.uint16),
                plain.view(np.uint16),
                high[2 * done : 2 * (done + h)],
            )
            done += h
            at += stored_bytes
        if count > 1:
            low = stored[plain_at - low_bytes : plain_at].tobytes()
            words[:, :-1] = np.frombuffer(low, np.uint16).reshape(elements, count - 1)
            words[:, -1] = high
        if target is not out:
            out[:] = target
