"""Groups: what a file is made of while it is written; docs/format.md draws them."""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from kvpaged.lsm.layout import BLOCK, VERSION, Buffer, Entry, checksum, damaged, unpack_entry

_GROUP = struct.Struct("<4sIQQIIQIIQQ")
MAGIC = b"KVG1"
GROUP_BYTES = _GROUP.size


class Group(NamedTuple):
    """What a group's header says.

    Attributes:
        header: bytes of the header with its padding.
        size: bytes of the group.
        sequence: of its first entry.
        atomic: its entries hold together or not at all.
        segment: id of the file it was written to.
        settled: bytes of the file that had been written (under durability `power`: synced) when
            this was written, so what is not whole before it is damage; what is not whole behind the
            largest one was never acknowledged.
        entries: in the order they were written.
    """

    header: int
    size: int
    sequence: int
    atomic: bool
    segment: int
    settled: int
    entries: tuple[Entry, ...]


def pack_group(
    entries: Sequence[bytes],
    *,
    header: int,
    size: int,
    sequence: int,
    atomic: bool,
    segment: int,
    settled: int,
) -> bytes:
    """The first `header` bytes of a group of `size` bytes.

    | KVG1 | header u32 | size u64 | sequence u64 | entries u32 | atomic u32 | segment u64 |
    | bytes of entries u32 | version u32 | settled u64 | checksum u64 | entries | 0... |
    """
    body = b"".join(entries)
    fields = (
        MAGIC, header, size, sequence, len(entries), int(atomic), segment, len(body), VERSION,
        settled,
    )  # fmt: skip
    rest = body.ljust(header - GROUP_BYTES, b"\0")
    whole = _GROUP.pack(*fields, 0)[:-8]
    return whole + checksum(whole + rest).to_bytes(8, "little") + rest


def unpack_group(raw: Buffer, at: int, end: int, segment: int, where: str) -> Group:
    """The group that begins at byte `at` of a file, of which there are `end` bytes.

    Raises:
        IntegrityError: there is none; the message names the field that says so.
    """
    view = memoryview(raw)
    if at + GROUP_BYTES > end:
        raise damaged(where, f"a group at byte {at} of {end}")
    (
        magic, header, size, sequence, count, atomic, owner, body, version, settled, digest,
    ) = _GROUP.unpack_from(view, at)  # fmt: skip
    if magic != MAGIC:
        raise damaged(where, f"no group at byte {at}: {magic.hex()}")
    whole = header % BLOCK == size % BLOCK == 0 and GROUP_BYTES + body <= header <= size
    if not whole or at + header > end:
        raise damaged(where, f"group at byte {at}: a header of {header} bytes in {size}")
    seen = checksum(
        b"".join((view[at : at + GROUP_BYTES - 8], view[at + GROUP_BYTES : at + header]))
    )
    if seen != digest:
        raise damaged(where, f"group at byte {at}: checksum {digest:016x}, its header {seen:016x}")
    if version != VERSION:
        raise damaged(where, f"group at byte {at} has version {version}; this reads {VERSION}")
    if owner != segment:
        raise damaged(where, f"group at byte {at} is of file {owner}, this is {segment}")
    entries, place = [], at + GROUP_BYTES
    for _ in range(count):
        entry, place = unpack_entry(view, place, where)
        if not at + header <= entry.offset <= at + size - entry.stored:
            raise damaged(where, f"group at byte {at}: a payload at {entry.offset} is not in it")
        entries.append(entry)
    if place != at + GROUP_BYTES + body:
        raise damaged(where, f"group at byte {at}: {body} bytes of entries, {place - at} read")
    return Group(header, size, sequence, bool(atomic), segment, settled, tuple(entries))
