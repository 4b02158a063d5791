"""Bytes on disk: entries, groups, indexes and footers; docs/format.md draws them.

All numbers are little-endian. Whatever is written to disk is made of *groups*:

    | group header, entries, padding to 4,096 | payload | payload | ... padding to 4,096 |

A *log* is groups one after another; a *segment* is a log with an index and a footer behind it. The
index repeats the entries, sorted by key, so a segment has two records of where each value lies, and
either is enough. Checksums are xxh3_64.
"""

import functools
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from xxhash import xxh3_64_intdigest

from kvpaged.errors import IntegrityError

BLOCK = 4096
"""Bytes that direct reads and writes are multiples of."""
LANE = 64
"""Where the parts of a value begin within it: any dtype may be viewed there."""
VERSION = 1

VALUE, DELETE, VOID = 1, 2, 3
"""Kinds of entries; a void one is a value whose bytes never came."""
MOST_KEY, MOST_PARTS = 65_535, 65_535

DTYPES: Mapping[int, torch.dtype] = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.bfloat16, 8: torch.float32, 9: torch.float64, 10: torch.complex64,
    11: torch.complex128, 12: torch.bool, 13: torch.float8_e4m3fn, 14: torch.float8_e5m2,
    15: torch.float8_e4m3fnuz, 16: torch.float8_e5m2fnuz, 17: torch.uint16, 18: torch.uint32,
    19: torch.uint64, 20: torch.complex32, 21: torch.float8_e8m0fnu,
}  # fmt: skip
"""What a dtype is called on disk; never renumbered."""
DTYPE_IDS = {dtype: number for number, dtype in DTYPES.items()}

_ENTRY = struct.Struct("<IBBHHHIIIQQqQ")
_PART = struct.Struct("<QQQ")
_FORM = struct.Struct("<BBH")
_KIND_AT, _SEQUENCE_AT, _OFFSET_AT = 4, 24, 32

Buffer: TypeAlias = Any
"""Bytes of any kind; an array is one, which type checkers know from Python 3.12 on."""

checksum: Callable[[Buffer], int] = xxh3_64_intdigest


def up(number: int, multiple: int) -> int:
    """The next multiple, or `number` if it is one."""
    return -(-number // multiple) * multiple


def damaged(where: str, what: str) -> IntegrityError:
    """The error for bytes that are not what they must be."""
    return IntegrityError(f"{where}: {what}")


class Form(NamedTuple):
    """What a tensor is: its name (empty for a lone one), dtype, shape and bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class Part(NamedTuple):
    """How a tensor is stored: bytes, their checksum, and the codec's id."""

    stored: int
    checksum: int
    codec: int


class Entry(NamedTuple):
    """One value of a segment, or the deletion of one.

    Attributes:
        kind: `VALUE`, `DELETE` or `VOID`.
        single: a tensor was put, not a dict of them.
        key, parent: bytes; the parent may be empty.
        metadata: JSON, or nothing.
        forms, parts: of each tensor.
        sequence: grows with every entry of a store.
        offset: of the payload in the file, bytes.
        expires: milliseconds since 1970, or 0 for never.
        stored: bytes of the payload, padding between its parts included.
    """

    kind: int
    single: bool
    key: bytes
    parent: bytes
    metadata: bytes
    forms: tuple[Form, ...]
    parts: tuple[Part, ...]
    sequence: int
    offset: int
    expires: int
    stored: int

    @property
    def nbytes(self) -> int:
        """Of the tensors, decoded."""
        return sum(form.nbytes for form in self.forms)

    @property
    def packed_bytes(self) -> int:
        """The most its own bytes can be."""
        names = sum(len(form.name.encode()) + 8 * len(form.shape) + 4 for form in self.forms)
        texts = len(self.key) + len(self.parent) + len(self.metadata)
        return _ENTRY.size + _PART.size * len(self.parts) + names + texts + 8

    @property
    def room(self) -> int:
        """Bytes the payload takes up in a file."""
        return payload_room(self.stored)


def payload_room(stored: int) -> int:
    """Bytes of a payload with what is left free behind it: small ones are not worth a block."""
    return up(stored, BLOCK if stored >= BLOCK else LANE)


def part_offsets(parts: Sequence[Part]) -> Iterator[int]:
    """Where each part begins within its payload."""
    at = 0
    for part in parts:
        yield at
        at += up(part.stored, LANE)


def payload_bytes(parts: Sequence[Part]) -> int:
    """Of a payload with these parts."""
    if not parts:
        return 0
    return sum(up(part.stored, LANE) for part in parts[:-1]) + parts[-1].stored


# -- forms and entries -----------------------------------------------------------------------------


def pack_forms(forms: Sequence[Form]) -> bytes:
    """Names, dtypes and shapes: id u8, dims u8, name bytes u16, dims x u64, name."""
    out = bytearray()
    for form in forms:
        name = form.name.encode()
        out += _FORM.pack(DTYPE_IDS[form.dtype], len(form.shape), len(name))
        out += struct.pack(f"<{len(form.shape)}Q", *form.shape)
        out += name
    return bytes(out)


@functools.lru_cache(maxsize=4096)
def unpack_forms(raw: bytes, count: int) -> tuple[Form, ...]:
    """What `pack_forms` packed; the same forms come back for the same bytes."""
    forms, at = [], 0
    try:
        for _ in range(count):
            number, dims, name_bytes = _FORM.unpack_from(raw, at)
            at += _FORM.size
            shape = struct.unpack_from(f"<{dims}Q", raw, at)
            at += 8 * dims
            if number not in DTYPES:
                raise damaged("forms", f"dtype {number} is not one of {min(DTYPES)}-{max(DTYPES)}")
            if at + name_bytes > len(raw):
                raise damaged("forms", f"a name of {name_bytes} bytes in {len(raw) - at}")
            name = raw[at : at + name_bytes].decode()
            at += name_bytes
            dtype = DTYPES[number]
            forms.append(Form(name, dtype, shape, math.prod(shape) * dtype.itemsize))
    except (struct.error, UnicodeDecodeError) as error:
        raise damaged("forms", str(error)) from error
    if at != len(raw):
        raise damaged("forms", f"{len(raw) - at} bytes behind the last of {count}")
    return tuple(forms)


def pack_entry(entry: Entry, forms: bytes | None = None) -> bytes:
    """An entry's bytes, a multiple of 8; `forms` are its packed forms where they are known.

    | bytes u32 | kind u8 | single u8 | key u16 | parent u16 | parts u16 | forms u32 |
    | metadata u32 | 0 u32 | sequence u64 | offset u64 | expires i64 | stored u64 |
    | parts x (stored u64, checksum u64, codec u64) | key | parent | metadata | forms | 0... |
    """
    if forms is None:
        forms = pack_forms(entry.forms)
    body = b"".join((
        *(_PART.pack(*part) for part in entry.parts),
        entry.key, entry.parent, entry.metadata, forms,
    ))  # fmt: skip
    size = up(_ENTRY.size + len(body), 8)
    head = _ENTRY.pack(
        size, entry.kind, entry.single, len(entry.key), len(entry.parent), len(entry.parts),
        len(forms), len(entry.metadata), 0, entry.sequence, entry.offset, entry.expires,
        entry.stored,
    )  # fmt: skip
    return (head + body).ljust(size, b"\0")


def place_entry(packed: bytes, sequence: int, offset: int) -> bytes:
    """A packed entry with another sequence number and place."""
    return (
        packed[:_SEQUENCE_AT]
        + sequence.to_bytes(8, "little")
        + offset.to_bytes(8, "little")
        + packed[_OFFSET_AT + 8 :]
    )


def void_entry(packed: bytes) -> bytes:
    """The same entry, of a value whose bytes never came."""
    return packed[:_KIND_AT] + bytes([VOID]) + packed[_KIND_AT + 1 :]


def lone_tensor(heap: memoryview, at: int) -> tuple[Form, int] | None:
    """Form and offset in the file of a value that is one raw tensor, else `None`.

    What `unpack_entry` says in a quarter of the time, of an entry that it has accepted before.
    """
    fields = _ENTRY.unpack_from(heap, at)
    if fields[5] != 1 or not fields[2]:
        return None
    start = at + _ENTRY.size + _PART.size
    if heap[start - 8]:  # the codec's id, of one byte
        return None
    start += fields[3] + fields[4] + fields[7]
    return unpack_forms(bytes(heap[start : start + fields[6]]), 1)[0], fields[10]


def unpack_entry(raw: Buffer, at: int, where: str) -> tuple[Entry, int]:
    """The entry at byte `at`, and where the next begins.

    Raises:
        IntegrityError: it is not one; the message begins with `where` and names the field.
    """
    view = memoryview(raw)
    if at + _ENTRY.size > len(view):
        raise damaged(where, f"an entry at byte {at} of {len(view)}")
    (
        size, kind, single, key_bytes, parent_bytes, count, forms_bytes, metadata_bytes, zero,
        sequence, offset, expires, stored,
    ) = _ENTRY.unpack_from(view, at)  # fmt: skip
    start = at + _ENTRY.size + _PART.size * count
    end = start + key_bytes + parent_bytes + forms_bytes + metadata_bytes
    if size != up(end - at, 8) or at + size > len(view):
        raise damaged(where, f"entry at byte {at} has {size} bytes, its fields {end - at}")
    if kind not in (VALUE, DELETE, VOID) or single > 1 or zero:
        raise damaged(where, f"entry at byte {at}: kind {kind}, single {single}, {zero} for 0")
    parts = tuple(map(Part._make, _PART.iter_unpack(view[at + _ENTRY.size : start])))
    key = bytes(view[start : start + key_bytes])
    start += key_bytes
    parent = bytes(view[start : start + parent_bytes])
    start += parent_bytes
    metadata = bytes(view[start : start + metadata_bytes])
    forms = unpack_forms(bytes(view[start + metadata_bytes : end]), count)
    if stored != payload_bytes(parts):
        raise damaged(where, f"entry at byte {at}: {stored} bytes stored, its parts differ")
    for form, part in zip(forms, parts, strict=True):
        if part.codec == 0 and part.stored != form.nbytes:
            raise damaged(where, f"entry at byte {at}: {part.stored} bytes for {form.nbytes}")
    entry = Entry(
        kind, bool(single), key, parent, metadata, forms, parts, sequence, offset, expires, stored
    )
    return entry, at + size
