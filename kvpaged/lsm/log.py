"""The active file: values arrive in memory and go out in groups.

The *memtable* is slabs: pieces of memory that hold exactly what a range of the file holds or will
hold. A value is copied once, to its place in a slab; groups are written from there, adjacent ones
in one call. What has been written stays readable in its slab until the slab is needed anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvpaged.errors import IntegrityError
from kvpaged.lsm.files import Bytes, File, Files, aligned
from kvpaged.lsm.layout import (
    BLOCK,
    GROUP_BYTES,
    VALUE,
    Entry,
    Group,
    pack_entry,
    pack_group,
    place_entry,
    up,
)
from kvpaged.lsm.segment import Row, check_parts, file_name, index_room, scan

DIRECT_FROM = 512 * 1024
"""Bytes of a write from which it passes by the page cache: below, copying is faster (a direct write
waits for the device); above, the device's own speed is reached with one call at a time.
"""


class Coming(NamedTuple):
    """An entry on its way: its packed bytes (its place still open) and its parts' stored bytes."""

    entry: Entry
    packed: bytes
    pieces: Sequence[Bytes]


@dataclass(eq=False, slots=True)
class Slab:
    """Memory for bytes `start` to `start + len(memory)` of a file; `pins` readers are in it."""

    start: int
    memory: Bytes
    used: int = 0
    pins: int = 0


@dataclass(eq=False, slots=True)
class OpenGroup:
    """A group that is not written yet.

    Attributes:
        start: where it begins in the file.
        header: bytes of its header.
        size: bytes so far, the last payload's padding included.
        sequence: of its first entry.
        entries: packed.
        arriving: copies into it that have not ended.
        atomic: all of it holds or nothing.
    """

    slab: Slab
    start: int
    header: int
    size: int
    sequence: int
    atomic: bool
    entries: list[bytes] = field(default_factory=list)
    entry_bytes: int = 0
    arriving: int = 0
    written: bool = False
    error: OSError | None = None


class SlabPool:
    """Memory of slabs, `slab_bytes` each unless more is asked for; `spare` are kept for reuse."""

    def __init__(self, slab_bytes: int, spare: int):
        self.slab_bytes, self.spare = slab_bytes, spare
        self._free: list[Bytes] = []

    def take(self, size: int) -> Bytes:
        """At least so many bytes."""
        if size <= self.slab_bytes:
            return self._free.pop() if self._free else aligned(self.slab_bytes)
        return aligned(up(size, BLOCK))

    def give(self, memory: Bytes) -> None:
        """Bytes nobody reads any more."""
        if len(memory) == self.slab_bytes and len(self._free) < self.spare:
            self._free.append(memory)


class Log:
    """One file being written. All methods but `write` are called under the store's lock.

    Invariants:
        1. Groups follow each other without a gap; `end` is where the next begins.
        2. Bytes of a slab up to `used` are the file's, once their group is written.
        3. `rows` has the last value of every key of this file; `live` those that may be found.
    """

    def __init__(self, files: Files, number: int, pool: SlabPool, *, new: bool):
        self.number, self.name = number, file_name(number)
        self.where = f"{files}: {self.name}"
        self.file: File = files.open(self.name, create=new)
        self.pool = pool
        self.end = 0
        self.slabs: list[Slab] = []
        self.open: OpenGroup | None = None
        self.closed: list[OpenGroup] = []
        self.rows: dict[bytes, Row] = {}
        self.live: dict[bytes, Row] = {}
        self.stamps: dict[bytes, int] = {}
        self.written = 0
        self.packed_bytes = 0
        self.entries = 0
        self.failed: OSError | None = None

    # -- arriving ----------------------------------------------------------------------------------

    def place(
        self, coming: Sequence[Coming], sequence: int | None, *, atomic: bool
    ) -> tuple[list[OpenGroup], list[Row], list[Bytes]]:
        """Give entries their places, in groups that may still be open; atomic ones have a group of
        their own. They get sequence numbers from `sequence` on, or keep theirs.

        Returns:
            The group and the place of each, and the memory for each payload. Their `arriving` count
            is up by one until `arrived`.
        """
        groups, located, memory = [], [], []
        if atomic:
            self.close_group()
            header = up(GROUP_BYTES + sum(len(one.packed) for one in coming), BLOCK)
            size = header + sum(one.entry.room for one in coming) + BLOCK * len(coming)
            self._begin(header, size, atomic=True)
        for number, one in enumerate(coming):
            order = one.entry.sequence if sequence is None else sequence + number
            group = self._group(one)
            group.sequence = group.sequence or order
            offset = group.start + group.size
            if one.entry.stored >= BLOCK:
                offset = up(offset, BLOCK)
            packed = place_entry(one.packed, order, offset)
            group.entries.append(packed)
            group.entry_bytes += len(packed)
            group.size = offset + one.entry.room - group.start
            group.slab.used = max(group.slab.used, group.start + group.size - group.slab.start)
            group.arriving += 1
            self.entries += 1
            self.packed_bytes += len(packed)
            at = offset - group.slab.start
            memory.append(group.slab.memory[at : at + one.entry.stored])
            entry = one.entry._replace(sequence=order, offset=offset)
            located.append(Row(entry, packed, self.written))
            self.written += entry.kind == VALUE
            groups.append(group)
        if atomic:
            self.close_group()
        return groups, located, memory

    def _group(self, one: Coming) -> OpenGroup:
        """The open group if the entry fits, else a new one."""
        group = self.open
        if group is not None:
            fits = GROUP_BYTES + group.entry_bytes + len(one.packed) <= group.header
            last = up(group.start + group.size, BLOCK) + up(one.entry.room, BLOCK)
            if group.atomic or (fits and last <= group.slab.start + len(group.slab.memory)):
                return group
            self.close_group()
        header = up(GROUP_BYTES + len(one.packed), BLOCK)
        return self._begin(header, header + up(one.entry.room, BLOCK), atomic=False)

    def _begin(self, header: int, size: int, *, atomic: bool) -> OpenGroup:
        slab = self.slabs[-1] if self.slabs else None
        if slab is None or self.end + size > slab.start + len(slab.memory):
            slab = Slab(self.end, self.pool.take(size))
            self.slabs.append(slab)
        self.open = OpenGroup(slab, self.end, header, header, 0, atomic)
        slab.used = max(slab.used, self.end + header - slab.start)
        return self.open

    def close_group(self) -> None:
        """No entry goes into the open group any more."""
        group, self.open = self.open, None
        if group is None:
            return
        size = up(group.size, BLOCK)
        at = group.start - group.slab.start
        group.slab.memory[at + group.size : at + size] = 0
        group.size = size
        group.slab.used = max(group.slab.used, at + size)
        self.end = group.start + size
        self.closed.append(group)

    def pending(self) -> int:
        """Bytes that have not been written."""
        started = self.closed[0].start if self.closed else self.end
        return self.end - started + (self.open.size if self.open else 0)

    def projected(self) -> int:
        """Bytes of the file once it is sealed as it is."""
        end = self.end + (up(self.open.size, BLOCK) if self.open else 0)
        return end + (index_room(len(self.rows), self.packed_bytes) if self.entries else 0)

    # -- going out ---------------------------------------------------------------------------------

    def ready(self) -> list[OpenGroup]:
        """The first groups that can be written, adjacent in one slab."""
        run: list[OpenGroup] = []
        for group in self.closed:
            if group.arriving or (run and group.slab is not run[-1].slab):
                break
            run.append(group)
        return run

    def write(self, run: Sequence[OpenGroup], *, sync: bool) -> None:
        """Write groups that `ready` gave; not under the lock, one caller at a time."""
        for group in run:
            at = group.start - group.slab.start
            raw = pack_group(
                group.entries, header=group.header, size=group.size, sequence=group.sequence,
                atomic=group.atomic, segment=self.number,
            )  # fmt: skip
            group.slab.memory[at : at + group.header] = np.frombuffer(raw, np.uint8)
        slab, first, end = run[0].slab, run[0].start, run[-1].start + run[-1].size
        data = slab.memory[first - slab.start : end - slab.start]
        self.file.write(first, data, direct=len(data) >= DIRECT_FROM)
        if sync:
            self.file.sync()

    def wrote(self, run: Sequence[OpenGroup], error: OSError | None) -> None:
        """What `write` came to."""
        for group in run:
            group.written, group.error = True, error
        del self.closed[: len(run)]

    # -- reading -----------------------------------------------------------------------------------

    def memory_of(self, entry: Entry) -> tuple[Slab, Bytes] | None:
        """Where a payload lies in memory, if it still does. The caller pins the slab."""
        for slab in reversed(self.slabs):
            if slab.start <= entry.offset:
                at = entry.offset - slab.start
                if at + entry.stored <= slab.used:
                    return slab, slab.memory[at : at + entry.stored]
                return None
        return None

    def slab_bytes(self) -> int:
        """Of all slabs."""
        return sum(len(slab.memory) for slab in self.slabs)

    def release(self, keep: int) -> None:
        """Give slabs back, the oldest first, until they hold no more than `keep` bytes; none that
        has readers or something to write.
        """
        unwritten = self.closed[0].start if self.closed else self.end
        while self.slabs and self.slab_bytes() > keep:
            slab = self.slabs[0]
            busy = slab.pins or slab.start + slab.used > unwritten
            if busy or (self.open is not None and self.open.slab is slab):
                return
            if slab is self.slabs[-1]:
                return
            self.pool.give(self.slabs.pop(0).memory)

    def drop_slabs(self) -> None:
        """Forget all memory; what has readers is left to them."""
        for slab in self.slabs:
            if not slab.pins:
                self.pool.give(slab.memory)
        self.slabs.clear()


def replay(log: Log, data: Bytes) -> tuple[list[bytes], list[str]]:
    """Read a log as it was left.

    Fills `log.rows`, `log.live` and `log.end` (behind its last whole group). A group that is
    not whole is left out, an atomic one of which a value is not whole too; otherwise such a value
    alone. In the last group that is a write that was never acknowledged, so what it was to replace
    stays; before it, it is damage, and what it replaced is not brought back.

    Returns:
        The keys that values or deletions of this log replace elsewhere, and what was left out.
    """
    touched: dict[bytes, None] = {}
    lost: list[str] = []
    end, torn = 0, None
    for at, group in scan(data, log.number, log.where):
        if at != end:
            lost.append(f"{log.where}: no whole group in bytes {end} to {at}")
        if torn is not None:  # it was not the last: what it replaced is gone, too
            touched.update(dict.fromkeys(torn))
            torn = None
        end = at + group.size
        bad = _bad(group, data, log.where, lost)
        kept = [i for i in range(len(group.entries)) if i not in bad and not (bad and group.atomic)]
        for number, entry in enumerate(group.entries):
            counted, log.written = log.written, log.written + (entry.kind == VALUE)
            if number in kept:
                log.live.pop(entry.key, None)
                touched[entry.key] = None
                if entry.kind == VALUE:
                    row = Row(entry, pack_entry(entry), counted)
                    log.rows[entry.key] = log.live[entry.key] = row
        if bad:
            torn = [e.key for i, e in enumerate(group.entries) if i not in kept]
        log.entries += len(group.entries)
    log.end = end
    return list(touched), lost


def _bad(group: Group, data: Bytes, where: str, lost: list[str]) -> set[int]:
    """Which values of a group are not what their checksums say."""
    bad = set()
    for number, entry in enumerate(group.entries):
        try:
            check_parts(entry, data[entry.offset : entry.offset + entry.stored], where)
        except IntegrityError as error:
            bad.add(number)
            lost.append(str(error))
    return bad
