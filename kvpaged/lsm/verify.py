"""Reading every byte of a file and saying what is wrong with it."""

from collections.abc import Iterator
from typing import NamedTuple

from kvpaged.errors import IntegrityError
from kvpaged.lsm import manifest as manifests
from kvpaged.lsm.files import Bytes, Files, aligned
from kvpaged.lsm.groups import Group, unpack_group
from kvpaged.lsm.index import (
    FOOTER_BYTES,
    INDEX_BYTES,
    Footer,
    unpack_footer,
    unpack_index_header,
)
from kvpaged.lsm.layout import BLOCK, VALUE, Entry, checksum, unpack_entry, up
from kvpaged.lsm.segment import check_payload, file_name, next_magic

STEP = 8 << 20
"""Bytes of a read call."""


class Damage(NamedTuple):
    """Something wrong: the file, the key of the value if it is one, and what."""

    file: str
    key: bytes | None
    what: str


def read_all(files: Files, name: str) -> Bytes:
    """A file's bytes as the disk has them, past the page cache where that can be; uint8. Raises
    `OSError`.
    """
    file = files.open(name)
    try:
        data = aligned(up(file.size(), BLOCK))
        done = 0
        while done < len(data):
            step = file.read(done, [data[done : done + STEP]], direct=True)
            done += step
            if step < min(STEP, len(data) - done + step):
                break
        return data[:done]
    finally:
        file.close()


def verify_manifests(files: Files) -> Iterator[Damage]:
    """Both copies of the manifest."""
    for name in manifests.NAMES:
        try:
            manifests.unpack(manifests.read(files, name), name)
        except (OSError, IntegrityError) as error:
            yield Damage(name, None, str(error))


def verify_segment(files: Files, number: int) -> Iterator[Damage]:
    """A sealed file: footer, index, groups, values (those that are dead as well), and that nothing
    stands between them.
    """
    name = file_name(number)
    try:
        data = read_all(files, name)
    except OSError as error:
        yield Damage(name, None, f"cannot be read: {error}")
        return
    end = len(data)
    indexed: dict[bytes, Entry] = {}
    try:
        footer = _footer(data, number, name)
        end = footer.index_offset
        indexed = _index(data, footer, name)
    except IntegrityError as error:
        yield Damage(name, None, str(error))
    seen: dict[bytes, Entry] = {}
    yield from _verify_groups(data, end, number, name, seen)
    for key, entry in indexed.items():
        if key not in seen:
            try:  # its group's header is damaged, and the index still knows it
                check_payload(entry, data[entry.offset : entry.offset + entry.stored], name)
            except IntegrityError as error:
                yield Damage(name, key, str(error))
        elif seen[key] != entry:
            yield Damage(name, key, f"index and group of value {key[:32].hex()} differ")


def verify_log(files: Files, number: int, end: int) -> Iterator[Damage]:
    """The first `end` bytes of a file that is not sealed."""
    name = file_name(number)
    try:
        data = read_all(files, name)
    except OSError as error:
        yield Damage(name, None, f"cannot be read: {error}")
        return
    yield from _verify_groups(data[:end], min(end, len(data)), number, name, {})


def _footer(data: Bytes, number: int, name: str) -> Footer:
    if len(data) < BLOCK:
        raise IntegrityError(f"{name}: {len(data)} bytes are too few for a segment")
    footer = unpack_footer(data[-FOOTER_BYTES:], name)
    end = footer.index_offset + footer.index_bytes
    if footer.segment != number or end + FOOTER_BYTES > len(data):
        raise IntegrityError(f"{name}: a footer of segment {footer.segment}, index to {end}")
    if data[end : len(data) - FOOTER_BYTES].any():
        raise IntegrityError(f"{name}: not all is zero between index and footer")
    return footer


def _index(data: Bytes, footer: Footer, name: str) -> dict[bytes, Entry]:
    raw = data[footer.index_offset : footer.index_offset + footer.index_bytes]
    if checksum(raw) != footer.index_checksum:
        raise IntegrityError(f"{name}: the checksum of the index differs")
    header = unpack_index_header(raw, name)
    at = len(raw) - header.filter_bits // 8 - header.heap
    if header.size != len(raw) or at < INDEX_BYTES:
        raise IntegrityError(f"{name}: index of {len(raw)} bytes, its fields say {header.size}")
    entries = {}
    for _ in range(header.keys):
        entry, at = unpack_entry(raw, at, name)
        entries[entry.key] = entry
    return entries


def _verify_groups(
    data: Bytes, end: int, number: int, name: str, seen: dict[bytes, Entry]
) -> Iterator[Damage]:
    at = 0
    while at < end:
        try:
            group = unpack_group(data, at, end, number, name)
        except IntegrityError as error:
            yield Damage(name, None, str(error))
            at = min(end, next_magic(data[:end], at + BLOCK))
            continue
        yield from _verify_group(data, at, min(end, at + group.size), group, name, seen)
        at += group.size
    if at > end:
        yield Damage(name, None, f"{name}: the last group ends at byte {at} of {end}")


def _verify_group(
    data: Bytes, at: int, end: int, group: Group, name: str, seen: dict[bytes, Entry]
) -> Iterator[Damage]:
    place = at + group.header
    for entry in group.entries:
        if entry.kind != VALUE:
            continue
        if data[place : entry.offset].any():
            yield Damage(name, entry.key, f"{name}: not all is zero before byte {entry.offset}")
        seen[entry.key] = entry
        payload = data[entry.offset : entry.offset + entry.stored]
        try:
            check_payload(entry, payload, name)
        except IntegrityError as error:
            yield Damage(name, entry.key, str(error))
        place = entry.offset + entry.stored
        yield from _verify_lanes(entry, payload, name)
    if data[place:end].any():
        yield Damage(name, None, f"{name}: not all is zero before byte {end}")


def _verify_lanes(entry: Entry, payload: Bytes, name: str) -> Iterator[Damage]:
    at = 0
    for part in entry.parts:
        start = up(at, 64)
        if payload[at:start].any():
            yield Damage(name, entry.key, f"{name}: not all is zero between parts")
        at = start + part.stored
