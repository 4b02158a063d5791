"""The manifest: which files make up a store, and which of their values still live.

It is written anew whole, twice (`MANIFEST`, then `MANIFEST.copy`), each under another name first
and renamed when its bytes are safe: of the two at least one is whole at any moment, and a flipped
byte in one costs nothing.

    | KVMANIFE | version u32 | segments u32 | logs u32 | 0 u32 | generation u64 | next id u64 |
    | next sequence u64 | checksum of all that follows u64 | checksum of this header u64 |
    | segments x (id u64, bytes u64, values u64, level u32, 0 u32) | logs x id u64 |
    | for each segment a bit a value, from the lowest, in whole bytes: set if it lives |
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvpaged.errors import IntegrityError
from kvpaged.lsm.files import Files
from kvpaged.lsm.layout import VERSION, checksum, damaged

_HEADER = struct.Struct("<8sIIIIQQQQ")
_SEGMENT = struct.Struct("<QQQII")
_MAGIC = b"KVMANIFE"
NAMES = ("MANIFEST", "MANIFEST.copy")
NEW = "MANIFEST.new"

Live = np.ndarray[Any, np.dtype[np.bool_]]


class SegmentRecord(NamedTuple):
    """A segment: its file's bytes, its level, and which of its values live (in the order
    they were written)."""

    id: int
    file_bytes: int
    level: int
    live: Live


class Manifest(NamedTuple):
    """A state of a store.

    Attributes:
        generation: grows with every manifest.
        next_id: of the next file.
        next_sequence: no entry of a segment has this sequence number or a higher one.
        segments: sealed files.
        logs: files that have no index yet, oldest first.
    """

    generation: int
    next_id: int
    next_sequence: int
    segments: Sequence[SegmentRecord]
    logs: Sequence[int]


EMPTY = Manifest(0, 1, 1, (), ())


def pack(manifest: Manifest) -> bytes:
    """The bytes of a manifest."""
    body = b"".join((
        *(_SEGMENT.pack(s.id, s.file_bytes, len(s.live), s.level, 0) for s in manifest.segments),
        struct.pack(f"<{len(manifest.logs)}Q", *manifest.logs),
        *(np.packbits(s.live, bitorder="little").tobytes() for s in manifest.segments),
    ))  # fmt: skip
    head = _HEADER.pack(
        _MAGIC, VERSION, len(manifest.segments), len(manifest.logs), 0, manifest.generation,
        manifest.next_id, manifest.next_sequence, checksum(body),
    )  # fmt: skip
    return head + checksum(head).to_bytes(8, "little") + body


def unpack(raw: bytes, where: str) -> Manifest:
    """What `pack` packed.

    Raises:
        IntegrityError: a field or a length is wrong, or the version is another.
    """
    start = _HEADER.size + 8
    if len(raw) < start:
        raise damaged(where, f"{len(raw)} bytes, a header has {start}")
    magic, version, count, logs, zero, generation, next_id, next_sequence, digest = (
        _HEADER.unpack_from(raw)
    )
    if magic != _MAGIC:
        raise damaged(where, f"begins with {magic.hex()}")
    if checksum(raw[: start - 8]).to_bytes(8, "little") != raw[start - 8 : start]:
        raise damaged(where, "the checksum of its header differs")
    if version != VERSION or zero:
        raise damaged(where, f"version {version}; this reads {VERSION}")
    if checksum(raw[start:]) != digest:
        raise damaged(where, f"the checksum of its {len(raw) - start} bytes differs")
    rows = list(_SEGMENT.iter_unpack(raw[start : start + _SEGMENT.size * count]))
    at = start + _SEGMENT.size * count
    ids = struct.unpack_from(f"<{logs}Q", raw, at)
    at += 8 * logs
    segments = []
    for number, file_bytes, values, level, _ in rows:
        size = -(-values // 8)
        bits = np.frombuffer(raw, np.uint8, size, at)
        live = np.unpackbits(bits, count=values, bitorder="little").astype(bool)
        segments.append(SegmentRecord(number, file_bytes, level, live))
        at += size
    if at != len(raw):
        raise damaged(where, f"{len(raw)} bytes, its fields say {at}")
    return Manifest(generation, next_id, next_sequence, segments, ids)


def size_of(values: Sequence[int], logs: int) -> int:
    """Bytes of both copies and the one being written, for segments of so many values."""
    one = _HEADER.size + 8 + 8 * logs + sum(_SEGMENT.size + -(-n // 8) for n in values)
    return 3 * one


def load(files: Files) -> Manifest | None:
    """The newest whole manifest; `None` where there is none at all.

    Raises:
        IntegrityError: there are some and none is whole.
    """
    found, errors = [], []
    names = set(files.list())
    for name in NAMES:
        if name not in names:
            continue
        try:
            found.append(unpack(read(files, name), f"{files}: {name}"))
        except (OSError, IntegrityError) as error:
            errors.append(str(error))
    if found:
        return max(found, key=lambda manifest: manifest.generation)
    if errors:
        raise IntegrityError("no manifest is whole: " + "; ".join(errors))
    return None


def read(files: Files, name: str) -> bytes:
    """A small file's bytes."""
    file = files.open(name)
    try:
        data = np.empty(file.size(), np.uint8)
        return data[: file.read(0, [data], direct=False)].tobytes()
    finally:
        file.close()


def save(files: Files, manifest: Manifest, *, sync: bool) -> None:
    """Write it, twice; with `sync` it has survived a loss of power when this returns.

    The bytes are synced before each renaming in any case: a name never stands for half a manifest.
    """
    data = np.frombuffer(pack(manifest), np.uint8)
    for name in NAMES:
        if NEW in files.list():
            files.remove(NEW)
        file = files.open(NEW, create=True)
        try:
            file.write(0, data, direct=False)
            file.sync()
        finally:
            file.close()
        files.rename(NEW, name)
    if sync:
        files.sync()
