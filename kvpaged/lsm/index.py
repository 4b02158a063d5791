"""Indexes and footers of segments; docs/format.md draws them."""

import struct
from typing import NamedTuple

from kvpaged.lsm.layout import VERSION, Buffer, checksum, damaged

_INDEX = struct.Struct("<4sIQQQQQQ")
_FOOTER = struct.Struct("<8sIIQQQQQ")
INDEX_MAGIC, _FOOTER_MAGIC = b"KVI1", b"KVSEGEND"
INDEX_BYTES, FOOTER_BYTES = _INDEX.size, _FOOTER.size

COLUMNS = 6
"""Of an index, u64 each: the key's first 8 bytes as a big-endian number, where its entry ends in
the heap, sequence, bytes that the value costs (`Row.cost`), when it expires, and its number among
the values of the file in the order they were written.
"""


class IndexHeader(NamedTuple):
    """What follows it: `COLUMNS` columns of `count` u64, `heap` bytes of entries sorted by key,
    `filter_bits` bits.

    Attributes:
        keys: how many.
        written: values of the file, those that later ones of the same file replaced included.
        linked: values that have a parent.
        broken: those of them that do not lie right behind it.
        heap: bytes of the entries.
        filter_bits: of the bloom filter.
    """

    keys: int
    written: int
    linked: int
    broken: int
    heap: int
    filter_bits: int

    @property
    def size(self) -> int:
        """Of the whole index."""
        return INDEX_BYTES + 8 * COLUMNS * self.keys + self.heap + self.filter_bits // 8


def pack_index_header(header: IndexHeader) -> bytes:
    """| KVI1 | version u32 | keys u64 | written u64 | linked u64 | broken u64 | heap u64 |
    | filter bits u64 |.
    """
    return _INDEX.pack(INDEX_MAGIC, VERSION, *header)


def unpack_index_header(raw: Buffer, where: str) -> IndexHeader:
    """Raises `IntegrityError` if it is none."""
    magic, version, *fields = _INDEX.unpack_from(raw, 0)
    if magic != INDEX_MAGIC or version != VERSION:
        raise damaged(where, f"index begins with {magic!r}, version {version}")
    return IndexHeader(*fields)


class Footer(NamedTuple):
    """The last bytes of a segment: where its index lies and what it must be."""

    segment: int
    level: int
    index_offset: int
    index_bytes: int
    index_checksum: int


def pack_footer(footer: Footer) -> bytes:
    """| KVSEGEND | version u32 | level u32 | segment u64 | offset u64 | bytes u64 | checksum u64 |
    | checksum of this u64 |.
    """
    whole = _FOOTER.pack(
        _FOOTER_MAGIC, VERSION, footer.level, footer.segment, footer.index_offset,
        footer.index_bytes, footer.index_checksum, 0,
    )[:-8]  # fmt: skip
    return whole + checksum(whole).to_bytes(8, "little")


def unpack_footer(raw: Buffer, where: str) -> Footer:
    """Raises `IntegrityError` if it is none, or one of another version."""
    magic, version, level, segment, offset, size, digest, own = _FOOTER.unpack_from(raw, 0)
    seen = checksum(memoryview(raw)[: FOOTER_BYTES - 8])
    if magic != _FOOTER_MAGIC:
        raise damaged(where, f"no footer: {magic.hex()}")
    if own != seen:
        raise damaged(where, f"footer has checksum {own:016x}, its bytes {seen:016x}")
    if version != VERSION:
        raise damaged(where, f"segment has version {version}; this reads {VERSION}")
    return Footer(segment, level, offset, size, digest)
