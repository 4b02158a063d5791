"""A store's values in one file: groups, one after another, and an empty group that ends it.

It is what a log is (docs/format.md), of file 0, so whatever reads logs reads it. Values are copied
as they are stored, with their codecs, checksums, metadata, parents and expiry.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvpaged.errors import IntegrityError, StorageError
from kvpaged.lsm.files import Bytes, LocalFiles
from kvpaged.lsm.groups import GROUP_BYTES, pack_group, unpack_group
from kvpaged.lsm.layout import BLOCK, VALUE, Entry, pack_entry, part_offsets, place_entry, up
from kvpaged.lsm.log import Coming
from kvpaged.lsm.lookup import Lookup
from kvpaged.lsm.segment import check_payload
from kvpaged.lsm.store import TensorStore

TOGETHER = 8 << 20
"""Bytes of a group."""


def export_values(store: Lookup, path: str | os.PathLike[str], prefix: bytes = b"") -> int:
    """Write the values whose keys begin with `prefix` to a file that comes into being at the end,
    whole. Returns how many.

    Raises:
        IntegrityError: a value is damaged.
        StorageError: a file cannot be read or written.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    count = at = 0
    try:
        with part.open("wb") as file:
            for values in _together(store.stored(prefix)):
                raw = _group(values, at, count)
                file.write(raw.data)
                count, at = count + len(values), at + len(raw)
            file.write(_group([], at, count).data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"{target} cannot be written: {error}") from error
    except IntegrityError:
        part.unlink(missing_ok=True)
        raise
    return count


def import_values(store: TensorStore, path: str | os.PathLike[str]) -> int:
    """Put all values of an exported file, in place of what is there; those that have expired are
    left out. The file is checked whole before anything is put. Returns how many.

    Raises:
        IntegrityError: the file is damaged, or its end is missing.
        StorageError: it cannot be read, or the store refuses.
    """
    target = Path(path)
    try:
        file = LocalFiles(target.parent, make=False).open(target.name)
        data = file.map()
        file.close()
    except OSError as error:
        raise StorageError(f"{target} cannot be read: {error}") from error
    for entry, payload in _values(data, str(target)):
        check_payload(entry, payload, str(target))
    now = store.options.clock()
    count = 0

    def coming() -> Iterator[Coming]:
        nonlocal count
        for entry, payload in _values(data, str(target)):
            if not 0 < entry.expires <= now:
                count += 1
                yield as_coming(entry, payload)

    store.put_stored(coming())
    return count


def as_coming(entry: Entry, payload: Bytes) -> Coming:
    """A stored value, to be stored again as it is."""
    pieces = [
        payload[at : at + part.stored]
        for part, at in zip(entry.parts, part_offsets(entry.parts), strict=True)
    ]
    return Coming(entry, pack_entry(entry), pieces)


def _together(values: Iterator[tuple[Entry, Bytes]]) -> Iterator[list[tuple[Entry, Bytes]]]:
    some: list[tuple[Entry, Bytes]] = []
    size = 0
    for entry, payload in values:
        if some and size + entry.room > TOGETHER:
            yield some
            some, size = [], 0
        some.append((entry, payload))
        size += entry.room
    if some:
        yield some


def _group(values: Sequence[tuple[Entry, Bytes]], start: int, sequence: int) -> Bytes:
    """A group's bytes, at byte `start` of the file."""
    packed = [pack_entry(entry) for entry, _ in values]
    header = up(GROUP_BYTES + sum(map(len, packed)), BLOCK)
    offset, offsets = header, []
    for entry, _ in values:
        offset = up(offset, BLOCK) if entry.stored >= BLOCK else offset
        offsets.append(offset)
        offset += entry.room
    raw = np.zeros(up(offset, BLOCK), np.uint8)
    placed = [
        place_entry(one, sequence + number, start + at)
        for number, (one, at) in enumerate(zip(packed, offsets, strict=True))
    ]
    for (_, payload), at in zip(values, offsets, strict=True):
        raw[at : at + len(payload)] = payload
    head = pack_group(
        placed, header=header, size=len(raw), sequence=sequence, atomic=False, segment=0,
        settled=start,
    )  # fmt: skip
    raw[:header] = np.frombuffer(head, np.uint8)
    return raw


def _values(data: Bytes, where: str) -> Iterator[tuple[Entry, Bytes]]:
    at = count = 0
    while True:
        group = unpack_group(data, at, len(data), 0, where)
        if not group.entries:
            break
        for entry in group.entries:
            if entry.kind == VALUE:
                count += 1
                yield entry, data[entry.offset : entry.offset + entry.stored]
        at += group.size
    if group.sequence != count or at + group.size != len(data):
        raise IntegrityError(f"{where}: {count} values and {len(data) - at} bytes at its end")
