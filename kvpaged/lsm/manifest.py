"""The manifest: which files make up a store, and which of their values still live.

It is written anew whole, twice (`MANIFEST`, then `MANIFEST.copy`), each under another name first
and renamed when its bytes are safe: of the two at least one is whole at any moment, and a flipped
byte in one costs nothing.

    | KVMANIFE | version u32 | segments u32 | logs u32 | 0 u32 | generation u64 | next id u64 |
    | next sequence u64 | checksum of all that follows u64 | checksum of this header u64 |
    | segments x (id u64, bytes u64, values u64, touched i64, level u32, 0 u32) | logs x id u64 |
    | for each segment a bit a value, from the lowest, in whole bytes: set if it lives |
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvpaged.errors import IntegrityError
from kvpaged.lsm.files import Files
from kvpaged.lsm.layout import BLOCK, VERSION, checksum, damaged, up

_HEADER = struct.Struct("<8sIIIIQQQQ")
_SEGMENT = struct.Struct("<QQQQII")
_MAGIC = b"KVMANIFE"
NAMES = ("MANIFEST", "MANIFEST.copy")
NEW = "MANIFEST.new"

Live = np.ndarray[Any, np.dtype[np.bool_]]


class SegmentRecord(NamedTuple):
    """A segment: its file's bytes, how often it was merged, when one of its values was last asked
    for (milliseconds since 1970), and which of its values live, in the order they were written.
    """

    id: int
    file_bytes: int
    level: int
    touched: int
    live: Live

    @property
    def size(self) -> int:
        """Bytes in a manifest."""
        return record_bytes(len(self.live))


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
        *(
            _SEGMENT.pack(s.id, s.file_bytes, len(s.live), s.touched, s.level, 0)
            for s in manifest.segments
        ),
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
    for number, file_bytes, values, touched, level, _ in rows:
        size = -(-values // 8)
        bits = np.frombuffer(raw, np.uint8, size, at)
        live = np.unpackbits(bits, count=values, bitorder="little").astype(bool)
        segments.append(SegmentRecord(number, file_bytes, level, touched, live))
        at += size
    if at != len(raw):
        raise damaged(where, f"{len(raw)} bytes, its fields say {at}")
    return Manifest(generation, next_id, next_sequence, segments, ids)


def record_bytes(values: int) -> int:
    """What a segment of so many values takes up in a manifest."""
    return _SEGMENT.size + -(-values // 8)


def files_bytes(records: int, logs: int) -> int:
    """Of both copies and the one being written, for `records` bytes of segments and some logs."""
    return 3 * up(_HEADER.size + 8 + 8 * logs + records, BLOCK)


class Loaded(NamedTuple):
    """The newest whole manifest (`EMPTY` where there is none at all), and what is wrong."""

    manifest: Manifest
    damage: list[str]


def load(files: Files) -> Loaded:
    """Read both copies.

    Raises:
        IntegrityError: there are some and none is whole, or there is none and there are segments.
    """
    found, errors = [], []
    names = set(files.list())
    for name in NAMES:
        if name in names:
            try:
                found.append(unpack(read(files, name), f"{files}: {name}"))
            except (OSError, IntegrityError) as error:
                errors.append(str(error))
    if found:
        return Loaded(max(found, key=lambda manifest: manifest.generation), errors)
    if errors:
        raise IntegrityError("no manifest is whole: " + "; ".join(errors))
    stray = sorted(name for name in names if name.endswith(".seg"))
    if stray:
        raise IntegrityError(f"{files} has {stray[0]} and no manifest")
    return Loaded(EMPTY, [])


def read(files: Files, name: str) -> bytes:
    """A small file's bytes."""
    file = files.open(name)
    try:
        data = np.empty(file.size(), np.uint8)
        return data[: file.read(0, [data], direct=False)].tobytes()
    finally:
        file.close()


def save(files: Files, manifest: Manifest) -> int:
    """Write it, twice; it has survived a loss of power when this returns. Returns bytes written.

    The directory is synced before, for the files it names, and after each renaming: until then what
    the manifest before names must not be removed.
    """
    data = np.frombuffer(pack(manifest), np.uint8)
    if NEW in files.list():
        files.remove(NEW)
    for name in NAMES:
        file = files.open(NEW, create=True)
        try:
            file.write(0, data, direct=False)
            file.sync()
        finally:
            file.close()
        files.sync()
        files.rename(NEW, name)
    files.sync()
    return 2 * len(data)
