"""The active file: values arrive in memory and go out in groups.

The *memtable* is slabs: pieces of memory that hold exactly what a range of the file holds or will
hold. A value is copied once, to its place in a slab; groups are written from there, adjacent ones
in one call. What has been written stays readable in its slab until the slab is needed anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvpaged.lsm.files import Bytes, File, Files, aligned
from kvpaged.lsm.groups import GROUP_BYTES, pack_group
from kvpaged.lsm.layout import BLOCK, DELETE, Entry, place_entry, up, void_entry
from kvpaged.lsm.segment import Row, file_name, index_room

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


class Placed(NamedTuple):
    """An entry that has its place: number `at` of a group, and the memory for its payload."""

    group: OpenGroup
    at: int
    row: Row
    memory: Bytes


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

    Attributes:
        ghosts: keys of puts that failed: some of them may be in the file all the same.

    Invariants:
        1. Groups follow each other without a gap; `end` is where the next begins.
        2. Bytes of a slab up to `used` are the file's, once their group is written.
        3. `rows` has the last value of every key of this file; `live` those that may be found.
        4. Bytes of a slab between payloads are zeros.
    """

    def __init__(
        self, files: Files, number: int, pool: SlabPool, *, new: bool = False, write: bool = True
    ):
        self.number, self.name = number, file_name(number)
        self.where = f"{files}: {self.name}"
        self.file: File = files.open(self.name, write=write, create=new)
        self.file_bytes = self.file.size()
        self.pool = pool
        self.end = self.settled = 0
        self.slabs: list[Slab] = []
        self.open: OpenGroup | None = None
        self.closed: list[OpenGroup] = []
        self.rows: dict[bytes, Row] = {}
        self.live: dict[bytes, Row] = {}
        self.stamps: dict[bytes, int] = {}
        self.live_bytes = 0
        self.ghosts: set[bytes] = set()
        self.written = 0
        self.packed_bytes = 0
        self.entries = 0
        self.last_sequence = 0
        self.failed: OSError | None = None

    # -- what lives --------------------------------------------------------------------------------

    def add_live(self, row: Row, now: int) -> None:
        """A value may be found; none of its key lives."""
        key = row.entry.key
        self.rows[key] = self.live[key] = row
        self.stamps[key] = now
        self.live_bytes += row.cost

    def kill(self, key: bytes) -> bool:
        """It may not be found any more; whether it could be."""
        row = self.live.pop(key, None)
        if row is None:
            return False
        self.live_bytes -= row.cost
        self.stamps.pop(key, None)
        return True

    # -- arriving ----------------------------------------------------------------------------------

    def place(
        self, coming: Sequence[Coming], sequence: int | None, *, atomic: bool = False,
        together: bool = False,
    ) -> list[Placed]:  # fmt: skip
        """Give entries their places, in groups that may still be open; atomic ones, and those to be
        put `together`, have a group of their own. They get sequence numbers from `sequence` on, or
        keep theirs.

        The `arriving` count of each group is up by one for each entry, until `arrived`.
        """
        if atomic or together:
            self.close_group()
            header = up(GROUP_BYTES + sum(len(one.packed) for one in coming), BLOCK)
            size = header + sum(up(one.entry.room, BLOCK) for one in coming)
            self._begin(header, size, atomic=atomic)
        placed: list[Placed] = []
        try:
            for number, one in enumerate(coming):
                order = one.entry.sequence if sequence is None else sequence + number
                placed.append(self._place(one, order))
        except BaseException:  # no memory: what was placed will not be waited for
            self.arrived(placed, whole=False)
            self.close_group()
            raise
        if atomic or together:
            self.close_group()
        return placed

    def _place(self, one: Coming, order: int) -> Placed:
        group = self._group(one)
        group.sequence = group.sequence or order
        offset = group.start + group.size
        if one.entry.stored >= BLOCK:
            offset = up(offset, BLOCK)
            self._blank(group, offset)
        packed = place_entry(one.packed, order, offset)
        group.entries.append(packed)
        group.entry_bytes += len(packed)
        group.size = offset + one.entry.room - group.start
        slab, at = group.slab, offset - group.slab.start
        slab.memory[at + one.entry.stored : at + one.entry.room] = 0
        slab.used = max(slab.used, at + one.entry.room)
        slab.pins += 1
        group.arriving += 1
        self.entries += 1
        self.last_sequence = max(self.last_sequence, order)
        self.packed_bytes += len(packed)
        row = Row(one.entry._replace(sequence=order, offset=offset), packed, self.written)
        self.written += one.entry.kind != DELETE
        memory = slab.memory[at : at + one.entry.stored]
        return Placed(group, len(group.entries) - 1, row, memory)

    def arrived(self, placed: Sequence[Placed], *, whole: bool) -> None:
        """Their bytes are in their places; not `whole`: they never will be."""
        for one in placed:
            if not whole:
                one.group.entries[one.at] = void_entry(one.group.entries[one.at])
                one.memory[:] = 0
            one.group.arriving -= 1
            one.group.slab.pins -= 1

    def _blank(self, group: OpenGroup, end: int) -> None:
        """Zeros from the end of a group's last payload to `end`: slabs are used again."""
        start = group.slab.start
        group.slab.memory[group.start + group.size - start : end - start] = 0

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
        self._blank(group, group.start + size)
        group.size = size
        group.slab.used = max(group.slab.used, group.start + size - group.slab.start)
        self.end = group.start + size
        self.closed.append(group)

    def written_end(self) -> int:
        """Where what has been written ends."""
        return self.closed[0].start if self.closed else self.end

    def pending(self) -> int:
        """Bytes that have not been written."""
        return self.end - self.written_end() + (self.open.size if self.open else 0)

    def projected(self) -> int:
        """Bytes of the file once it is sealed as it is."""
        end = self.end + (up(self.open.size, BLOCK) if self.open else 0)
        if not self.entries:
            return max(end, self.file_bytes)
        return max(end + index_room(self.written, self.packed_bytes), self.file_bytes)

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
                atomic=group.atomic, segment=self.number, settled=run[0].start,
            )  # fmt: skip
            group.slab.memory[at : at + group.header] = np.frombuffer(raw, np.uint8)
        slab, first, end = run[0].slab, run[0].start, run[-1].start + run[-1].size
        data = slab.memory[first - slab.start : end - slab.start]
        self.file.write(first, data, direct=len(data) >= DIRECT_FROM)
        if sync:
            self.file.sync()

    def wrote(self, run: Sequence[OpenGroup]) -> None:
        """What `write` wrote is in the file."""
        for group in run:
            group.written = True
        del self.closed[: len(run)]

    def fail(self, error: OSError) -> int:
        """A write failed: nothing is written behind a hole, so the file ends before it.

        Returns where that is; values from there on are lost.
        """
        self.close_group()
        end, self.end = self.end, self.closed[0].start
        self.file_bytes = max(self.file_bytes, end)
        self.failed = error
        for group in self.closed:
            group.written, group.error = True, error
        self.closed.clear()
        return self.end

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
        unwritten = self.written_end()
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
