"""Numbers without loss: bytes that hold exponents are entropy-coded, mantissas kept as they are.

The highest byte of a float is its sign and the upper bits of its exponent (seven of a bf16's eight,
a float32's too). It varies little among the values of a tensor, 3.0 bits of entropy in K and V of
SmolLM2, while the lowest bytes are as good as noise. So a value is cut into blocks, a block into
planes of bytes (`kvpaged.codecs.planes`), and each plane that a sample says is worth it becomes a
zstd frame of Huffman codes. Usually that is the highest one; zeros, numbers that came from a
narrower format, and integers have others.

Encoded bytes, little-endian:

    | version u8 = 1 | width u8 | log2 of block bytes u8 | 0 u8 | value bytes u64 |
    | blocks x width x (bytes of its frame u32; 0: the plane is kept as it is) |
    | planes that are kept | frames | the value's last bytes |

`width` is 2, 4 or 8, of a dtype as `WIDTHS` has it. The last bytes are what is left of a multiple
of `2 width` and belong to no block. A block has the bytes that the header says, the last one what
is left. Planes and frames are in the order of the table: block by block, lowest bytes first.
"""

import struct
import sys
from typing import NamedTuple

import numpy as np
import torch

from kvpaged.codecs.base import WORTH, Bytes, Codec
from kvpaged.codecs.planes import merge, split
from kvpaged.codecs.zstd import Zstd, compress_entropy, decompress_into
from kvpaged.errors import IntegrityError

assert sys.byteorder == "little"

VERSION = 1
LOG_BLOCK = 18
"""Of bytes of a block. What is worked on stays in a core's second-level cache, and a bf16 block's
plane is a zstd block of the largest size; half of it costs 10 % of speed.
"""
LOG_BLOCKS = range(14, 23)
"""What a reader accepts, so that a wrong header costs neither memory nor time."""
PLANE_WORTH = 15 / 16
"""As `WORTH`, of a plane: a coded one takes 0.5 ns a byte to decode, one kept nearly nothing."""
RUNS = 64
"""A plane's sample: so many runs, evenly spread, of as many elements."""

WIDTHS = {
    torch.bfloat16: 2, torch.float16: 2, torch.float32: 4, torch.float64: 8,
    torch.complex32: 2, torch.complex64: 4, torch.complex128: 8,
    torch.int16: 2, torch.int32: 4, torch.int64: 8,
    torch.uint16: 2, torch.uint32: 4, torch.uint64: 8,
}  # fmt: skip
"""dtypes that are cut into planes, with the bytes of an element (of a complex one's part). Others,
of one byte, are coded as `Zstd` does: fp8 no worse, and bytes and booleans often repeat in rows.
"""

_HEADER = struct.Struct("<BBBBQ")


class Lossless(Codec):
    """Elements by planes of bytes; dtypes that are not in `WIDTHS` as `Zstd` has them."""

    id = 2
    name = "lossless"

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """See `Codec.encode`; `None` after a look at a sample where nothing is to be gained."""
        width = WIDTHS.get(dtype)
        if width is None:
            return Zstd().encode(data, dtype)
        whole = len(data) - len(data) % (2 * width)
        chosen = worthwhile(data[:whole], width)
        if not any(chosen):
            return None
        sizes: list[int] = []
        kept: list[Bytes] = []
        frames: list[bytes] = []
        for at in range(0, whole, 1 << LOG_BLOCK):
            planes = split(data[at : min(at + (1 << LOG_BLOCK), whole)], width)
            for plane, coded in zip(planes, chosen, strict=True):
                frame = compress_entropy(plane) if coded else b""
                if coded and len(frame) <= PLANE_WORTH * len(plane):
                    frames.append(frame)
                    sizes.append(len(frame))
                else:
                    kept.append(plane)
                    sizes.append(0)
        header = _HEADER.pack(VERSION, width, LOG_BLOCK, 0, len(data))
        table = np.array(sizes, np.uint32)
        coded_bytes = b"".join(
            [header, table.data, *(plane.data for plane in kept), *frames, data[whole:].data]
        )
        if len(coded_bytes) > WORTH * len(data):
            return None
        return np.frombuffer(coded_bytes, np.uint8)

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """See `Codec.decode_into`."""
        width = WIDTHS.get(dtype)
        if width is None:
            Zstd().decode_into(stored, out, dtype)
            return
        parts = _parts(stored, len(out), width)
        whole = len(out) - len(out) % (2 * width)
        memory = np.empty(min(parts.block, whole), np.uint8)
        at_kept, at_frame, number = parts.kept, parts.frames, 0
        for at in range(0, whole, parts.block):
            target = out[at : min(at + parts.block, whole)]
            length = len(target) // width
            planes = []
            for row in range(width):
                size = parts.sizes[number]
                number += 1
                if size:
                    plane = memory[row * length : (row + 1) * length]
                    decompress_into(stored[at_frame : at_frame + size], plane)
                    at_frame += size
                else:
                    plane = stored[at_kept : at_kept + length]
                    at_kept += length
                planes.append(plane)
            merge(planes, target)
        out[whole:] = stored[at_frame:]


class _Parts(NamedTuple):
    """Where things are in encoded bytes."""

    block: int
    sizes: list[int]
    kept: int
    frames: int


def _parts(stored: Bytes, value_bytes: int, width: int) -> _Parts:
    """Header and table, checked against each other and the number of stored bytes."""
    if len(stored) < _HEADER.size:
        raise IntegrityError(f"lossless: {len(stored)} bytes, a header has {_HEADER.size}")
    version, its_width, log_block, zero, its_bytes = _HEADER.unpack_from(stored.data)
    for what, found, wanted in (
        ("version", version, VERSION), ("width", its_width, width), ("fourth byte", zero, 0),
        ("value bytes", its_bytes, value_bytes),
    ):  # fmt: skip
        if found != wanted:
            raise IntegrityError(f"lossless: {what} {found} in the header, not {wanted}")
    if log_block not in LOG_BLOCKS:
        raise IntegrityError(f"lossless: blocks of 2**{log_block} bytes in the header")
    block, whole = 1 << log_block, value_bytes - value_bytes % (2 * width)
    blocks = -(-whole // block)
    kept = _HEADER.size + 4 * blocks * width
    if len(stored) < kept:
        raise IntegrityError(f"lossless: {len(stored)} bytes, header and table have {kept}")
    sizes = np.frombuffer(stored[_HEADER.size : kept], np.uint32).tolist()
    last = whole - block * (blocks - 1)
    kept_last = sizes[-width:].count(0)
    kept_bytes = (sizes.count(0) - kept_last) * (block // width) + kept_last * (last // width)
    end = kept + kept_bytes + sum(sizes) + value_bytes - whole
    if end != len(stored):
        raise IntegrityError(f"lossless: {len(stored)} bytes are stored, the table says {end}")
    return _Parts(block, sizes, kept, kept + kept_bytes)


def worthwhile(data: Bytes, width: int) -> list[bool]:
    """Which planes of a value are to be coded, from the entropy of a sample; none if all that
    would be saved is less than 3 % of the value.

    Args:
        data: uint8 [bytes], a multiple of `width`.
        width: bytes of an element.
    """
    rows = data.reshape(-1, width)
    if len(rows) > RUNS * RUNS:
        each = len(rows) // RUNS
        rows = rows[: RUNS * each].reshape(RUNS, each, width)[:, :RUNS].reshape(-1, width)
    shares = [entropy(rows[:, place]) / 8 for place in range(width)]
    chosen = [share < PLANE_WORTH for share in shares]
    saved = sum(1 - share for share, coded in zip(shares, chosen, strict=True) if coded)
    return chosen if saved > (1 - WORTH) * width else [False] * width


def entropy(sample: Bytes) -> float:
    """Bits a byte that a code for single bytes needs at least; uint8 [any number]."""
    if not len(sample):
        return 8.0
    counts = np.bincount(sample, minlength=256)
    counts = counts[counts > 0]
    return float(np.log2(len(sample)) - (counts * np.log2(counts)).sum() / len(sample))
