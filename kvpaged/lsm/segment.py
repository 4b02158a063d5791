"""A sealed file: values that never change, found by key."""

import itertools
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import IntegrityError
from kvpaged.lsm import filters
from kvpaged.lsm.files import Bytes, File, Files
from kvpaged.lsm.groups import MAGIC, Group, unpack_group
from kvpaged.lsm.index import (
    COLUMNS,
    FOOTER_BYTES,
    INDEX_BYTES,
    Footer,
    IndexHeader,
    pack_footer,
    pack_index_header,
    unpack_footer,
    unpack_index_header,
)
from kvpaged.lsm.layout import (
    BLOCK,
    DELETE,
    VALUE,
    Entry,
    checksum,
    damaged,
    lone_tensor,
    pack_entry,
    part_offsets,
    unpack_entry,
    up,
)


def file_name(number: int) -> str:
    """Of a log or a segment: a log becomes a segment where it lies."""
    return f"{number:08}.seg"


def prefix_of(key: bytes) -> int:
    """The first 8 bytes as a number that sorts as they do."""
    return int.from_bytes(key[:8].ljust(8, b"\0"), "big")


class Row(NamedTuple):
    """A value for an index: its entry, the entry's bytes, and its number among those written."""

    entry: Entry
    packed: bytes
    number: int

    @property
    def cost(self) -> int:
        """Bytes that the value takes up in a segment: payload, its entry twice, columns, filter."""
        return self.entry.room + 2 * len(self.packed) + 64


def index_bytes(rows: Sequence[Row], written: int) -> bytes:
    """The index of values of distinct keys, sorted by key, of a file of `written` values."""
    heap = b"".join(row.packed for row in rows)
    bits = filters.bits_for(len(rows))
    columns = (
        [prefix_of(row.entry.key) for row in rows],
        list(itertools.accumulate(len(row.packed) for row in rows)),
        [row.entry.sequence for row in rows],
        [row.cost for row in rows],
        [row.entry.expires for row in rows],
        [row.number for row in rows],
    )
    linked, broken = links(rows)
    return b"".join((
        pack_index_header(IndexHeader(len(rows), written, linked, broken, len(heap), bits)),
        np.array(columns, np.uint64).tobytes(),
        heap,
        filters.make((row.entry.key for row in rows), bits).tobytes(),
    ))  # fmt: skip


def links(rows: Sequence[Row]) -> tuple[int, int]:
    """How many values have a parent, and how many of them do not lie right behind it."""
    linked = broken = 0
    before = b""
    for row in sorted(rows, key=lambda row: row.number):
        if row.entry.parent:
            linked += 1
            broken += row.entry.parent != before
        before = row.entry.key
    return linked, broken


def write_index(
    file: File, number: int, level: int, at: int, rows: Sequence[Row], written: int
) -> int:
    """Make a log of `at` bytes a segment: its index and footer, synced. Returns its bytes then.

    Where a write that failed, or was under way when the process ended, left bytes behind `at`, the
    segment ends where they do: a footer is the last of a file, and files that may be mapped are
    never cut.
    """
    index = index_bytes(rows, written)
    footer = pack_footer(Footer(number, level, at, len(index), checksum(index)))
    size = up(max(len(index) + FOOTER_BYTES, file.size() - at), BLOCK)
    whole = index.ljust(size - FOOTER_BYTES, b"\0") + footer
    file.write(at, np.frombuffer(whole, np.uint8), direct=False)
    file.sync()
    return at + size


def index_room(count: int, packed_bytes: int) -> int:
    """The most bytes that index and footer of so many values can have."""
    header = IndexHeader(count, count, 0, 0, packed_bytes, filters.bits_for(count))
    return up(header.size + FOOTER_BYTES, BLOCK)


class Segment:
    """A sealed file, mapped. Its columns are views of the file; what changes is beside it.

    Any thread may read; `live`, `stamps`, `checked` and the counts of what lives are written under
    the store's lock, and by one element at a time.

    Attributes:
        data: uint8 [bytes], the file.
        holders: of what else keeps the file's bytes on disk once it is removed.
        count: values of its index.
        filter: its bloom filter's bytes.
        written: values of the file, those replaced by later ones of the same file included.
        sequences, costs, expires, numbers: uint64 [count], see `layout.COLUMNS`.
        live: bool [count]: it may be found.
        live_values, live_bytes: how many, and what they take up.
        stamps: uint64 [count]: when it was last asked for, milliseconds since 1970.
        checked: bool [count]: its checksums were right when it was first read.
        expiring: some value of it may expire.
        repaired: its index was made anew from its groups, because it was damaged: what was wrong.
    """

    def __init__(self, files: Files, number: int):
        self.number, self.name = number, file_name(number)
        self.where = f"{files}: {self.name}"
        file = files.open(self.name)
        self.data: Bytes = file.map()
        file.close()
        self.holders: list[weakref.ref[Any]] = [weakref.ref(self.data)]
        self.file_bytes = len(self.data)
        self.repaired: str | None = None
        try:
            self._read_index()
        except IntegrityError as error:
            self.repaired = str(error)
            self._rebuild()
        self.live = np.ones(self.count, bool)
        self._count_live()
        self.stamps = np.zeros(self.count, np.uint64)
        self.checked = np.zeros(self.count, bool)
        self.expiring = bool(self.expires.any())

    def __repr__(self) -> str:
        return f"Segment({self.number})"

    def _read_index(self) -> None:
        if len(self.data) < BLOCK:
            raise damaged(self.where, f"{len(self.data)} bytes are too few for a segment")
        footer = unpack_footer(self.data[-FOOTER_BYTES:], self.where)
        if footer.segment != self.number:
            raise damaged(self.where, f"its footer is of segment {footer.segment}")
        end = footer.index_offset + footer.index_bytes
        if end + FOOTER_BYTES > len(self.data):
            raise damaged(self.where, f"its index ends at {end} of {len(self.data)} bytes")
        raw = self.data[footer.index_offset : end]
        seen = checksum(raw)
        if seen != footer.index_checksum:
            raise damaged(
                self.where,
                f"index has checksum {footer.index_checksum:016x}, its bytes {seen:016x}",
            )
        self.level, self.groups_end = footer.level, footer.index_offset
        self._take_index(raw)

    def _take_index(self, raw: Bytes) -> None:
        header = unpack_index_header(raw, self.where)
        if header.size != len(raw):
            raise damaged(self.where, f"index of {len(raw)} bytes, its fields say {header.size}")
        self.count, self.written = header.keys, header.written
        self.linked, self.broken = header.linked, header.broken
        at = INDEX_BYTES + 8 * COLUMNS * self.count
        columns = raw[INDEX_BYTES:at].view(np.uint64).reshape(COLUMNS, self.count)
        view = raw.data
        step = 8 * self.count
        self._prefixes = view[INDEX_BYTES : INDEX_BYTES + step].cast("Q")
        self._ends = view[INDEX_BYTES + step : INDEX_BYTES + 2 * step].cast("Q")
        self.prefixes = columns[0]
        self.sequences, self.costs, self.expires, self.numbers = columns[2:]
        self.heap = view[at : at + header.heap]
        self.filter: Bytes = raw[at + header.heap :]

    def _rebuild(self) -> None:
        """The index anew from the groups. Behind a gap nothing is taken: which of the values there
        live is known by their number.
        """
        rows: dict[bytes, Row] = {}
        end = written = 0
        for at, group in scan(self.data, self.number, self.where):
            if at != end:
                break
            end = at + group.size
            for entry in group.entries:
                if entry.kind == VALUE:
                    rows[entry.key] = Row(entry, pack_entry(entry), written)
                written += entry.kind != DELETE
        self.level, self.groups_end = 0, end
        kept = sorted(rows.values(), key=lambda row: row.entry.key)
        self._take_index(np.frombuffer(index_bytes(kept, written), np.uint8))

    def take_live(self, bits: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
        """Which values live: bool, by their number in the file. How many of them are not there."""
        if not self.repaired and len(bits) != self.written:
            raise damaged(self.where, f"{self.written} values, the manifest has {len(bits)}")
        known = self.numbers < len(bits)
        self.live[:] = False
        self.live[known] = bits[self.numbers[known]]
        self._count_live()
        return int(np.count_nonzero(bits)) - self.live_values

    def take_live_numbers(self, numbers: Collection[int]) -> None:
        """The same, by the numbers of those that live."""
        bits = np.zeros(self.written, bool)
        bits[list(numbers)] = True
        self.take_live(bits)

    def _count_live(self) -> None:
        self.live_values = int(np.count_nonzero(self.live))
        self.live_bytes = int(self.costs[self.live].sum(dtype=np.int64))

    def kill(self, row: int) -> None:
        """It may not be found any more."""
        self.live[row] = False
        self.live_values -= 1
        self.live_bytes -= int(self.costs[row])

    def live_bits(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """What `take_live` takes."""
        bits = np.zeros(self.written, bool)
        bits[self.numbers] = self.live
        return bits

    def find(self, key: bytes) -> int | None:
        """The row of a key, alive or not."""
        prefix = prefix_of(key)
        row = bisect_left(self._prefixes, prefix)
        if row == self.count or self._prefixes[row] != prefix:
            return None
        if row + 1 == self.count or self._prefixes[row + 1] != prefix:
            return row if self.key(row) == key else None
        end = bisect_right(self._prefixes, prefix, row)
        row = bisect_left(range(end), key, row, end, key=self.key)
        return row if row < end and self.key(row) == key else None

    def rows_from(self, key: bytes) -> int:
        """The first row whose key is not below `key`."""
        prefix = prefix_of(key)
        start = bisect_left(self._prefixes, prefix)
        end = bisect_right(self._prefixes, prefix, start)
        return bisect_left(range(end), key, start, end, key=self.key)

    def _start(self, row: int) -> int:
        return self._ends[row - 1] if row else 0

    def packed(self, row: int) -> bytes:
        """The entry's bytes."""
        return bytes(self.heap[self._start(row) : self._ends[row]])

    def key(self, row: int) -> bytes:
        """The key of a row."""
        at = self._start(row)
        heap = self.heap
        size = heap[at + 6] | heap[at + 7] << 8
        parts = heap[at + 10] | heap[at + 11] << 8
        at += 56 + 24 * parts
        return bytes(heap[at : at + size])

    def entry(self, row: int) -> Entry:
        """What the index says of a row."""
        return unpack_entry(self.heap, self._start(row), self.where)[0]

    def lone(self, row: int) -> Tensor | None:
        """A value that is one raw tensor, where it lies; its checksum was right before. `None` for
        other values.
        """
        found = lone_tensor(self.heap, self._start(row))
        if found is None or not found[0].nbytes:
            return None
        form, offset = found
        size = form.nbytes // form.dtype.itemsize
        flat = torch.frombuffer(self.data, dtype=form.dtype, count=size, offset=offset)
        return flat if len(form.shape) == 1 else flat.view(form.shape)

    def payload(self, entry: Entry) -> Bytes:
        """A value's stored bytes, of the mapping; shorter where the file was cut."""
        return self.data[entry.offset : entry.offset + entry.stored]


def scan(data: Bytes, number: int, where: str, at: int = 0) -> Iterator[tuple[int, Group]]:
    """All whole groups of a file and where each begins.

    Where there is none the search goes on at the next block that looks like one: a group that was
    lost or torn does not hide those behind it.
    """
    while at + BLOCK <= len(data):
        try:
            group = unpack_group(data, at, len(data), number, where)
        except IntegrityError:
            at = next_magic(data, at + BLOCK)
            continue
        yield at, group
        at += group.size


def next_magic(data: Bytes, at: int) -> int:
    """The next block from `at` on that begins as a group does, or the end."""
    blocks = (len(data) - at) // BLOCK
    if blocks <= 0:
        return len(data)
    firsts = data[at : at + blocks * BLOCK].reshape(blocks, BLOCK)[:, :4]
    found = np.flatnonzero((firsts == np.frombuffer(MAGIC, np.uint8)).all(axis=1))
    return at + int(found[0]) * BLOCK if len(found) else len(data)


def check_parts(
    entry: Entry, stored: Mapping[int, Bytes], where: str, numbers: Iterable[int]
) -> None:
    """Raises `IntegrityError`, naming the key and the part, unless every checksum is right.

    Args:
        entry: of the value.
        stored: uint8 [bytes], by part.
        where: the file, for the message.
        numbers: the parts to look at.
    """
    for number in numbers:
        part, raw = entry.parts[number], stored[number]
        if len(raw) != part.stored:
            raise damaged(where, f"{name_of(entry, number)} has {len(raw)} of {part.stored} bytes")
        seen = checksum(raw)
        if seen != part.checksum:
            raise damaged(
                where,
                f"{name_of(entry, number)} has checksum {part.checksum:016x}, not {seen:016x}",
            )


def check_payload(entry: Entry, payload: Bytes, where: str) -> None:
    """The same for all parts of a payload, uint8 [bytes]."""
    offsets = part_offsets(entry.parts)
    stored = {
        number: payload[at : at + part.stored]
        for number, (part, at) in enumerate(zip(entry.parts, offsets, strict=True))
    }
    check_parts(entry, stored, where, stored)


def name_of(entry: Entry, part: int) -> str:
    """A value's part, for messages."""
    named = entry.forms[part].name
    return f"value {entry.key[:32].hex()}" + (f", part {named!r}" if named else "")
