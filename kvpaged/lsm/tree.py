"""What a store knows: its files, where each key lives, and how many bytes that takes."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from kvpaged.errors import IntegrityError, StorageError
from kvpaged.lsm import manifest as manifests
from kvpaged.lsm.files import Files, OpenFiles
from kvpaged.lsm.filters import Filters
from kvpaged.lsm.layout import VALUE, Entry, unpack_entry
from kvpaged.lsm.log import Log, SlabPool
from kvpaged.lsm.manifest import Manifest, SegmentRecord
from kvpaged.lsm.segment import Row, Segment, file_name

RESERVED = 4
"""Ids of logs that a manifest names before the files exist, so that a new log needs no manifest."""


class InLog(NamedTuple):
    """A value of a file that is still being written."""

    log: Log
    row: Row

    @property
    def entry(self) -> Entry:
        """Of the value."""
        return self.row.entry

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self.log.where


class InSegment(NamedTuple):
    """A value of a sealed file."""

    segment: Segment
    row: int

    @property
    def entry(self) -> Entry:
        """Of the value."""
        return self.segment.entry(self.row)

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self.segment.where


Found = InLog | InSegment


class Tree:
    """The files of a store and what lives in them. Every method is called under the store's lock.

    Invariants:
        1. Of all values of a key at most one lives: the one with the highest sequence number that
           was committed, unless that was deleted, evicted or found expired.
        2. `active` is the only log that values are placed in; `sealing` are older ones, oldest
           first; a file is in one of `active`, `sealing`, `segments`, `obsolete`.
        3. A file that no saved manifest names holds nothing that lives, except logs among the ids
           it reserved; a file that one names is not removed before another one is saved.
        4. `segment_bytes`, `record_bytes`, `live_values` and `live_bytes` are sums of what they
           are said to be.
    """

    def __init__(self, files: Files, pool: SlabPool, *, writable: bool):
        self.files, self.pool, self.writable = files, pool, writable
        self.on_gone: Callable[[bytes], None] | None = None
        self.opened = OpenFiles(files)
        self.active: Log | None = None
        self.sealing: list[Log] = []
        self.segments: dict[int, Segment] = {}
        self.filters = Filters[Segment]()
        self.generation = 0
        self.next_id = 1
        self.next_sequence = 1
        self.reserved: deque[int] = deque()
        self.fresh: list[int] = []
        self.obsolete: list[Segment] = []
        self.empty: list[Log] = []
        self.gone: list[tuple[list[weakref.ref[Any]], int]] = []
        self.damage: list[str] = []
        self.live_values = self.live_bytes = 0
        self.segment_bytes = self.record_bytes = 0
        self.planned = 0
        self.strays: dict[str, int] = {}

    def add_segments(self, segments: Iterable[Segment]) -> None:
        """Take segments in."""
        added = list(segments)
        self.filters.add([(segment, segment.filter) for segment in added])
        for segment in added:
            self.segments[segment.number] = segment
            self.live_values += segment.live_values
            self.live_bytes += segment.live_bytes
            self.segment_bytes += segment.file_bytes
            self.record_bytes += manifests.record_bytes(segment.written)

    # -- finding -----------------------------------------------------------------------------------

    def logs(self) -> Iterator[Log]:
        """The newest first."""
        if self.active is not None:
            yield self.active
        yield from reversed(self.sealing)

    def find(self, key: bytes, clock: Callable[[], int] | None = None) -> Found | None:
        """Where a key lives; with a `clock` (milliseconds since 1970) not what has expired."""
        for log in self.logs():
            row = log.live.get(key)
            if row is not None:
                expires = row.entry.expires
                if expires and clock is not None and expires <= clock():
                    return None
                return InLog(log, row)
        for segment in self.filters.owners(key):
            at = segment.find(key)
            if at is not None and segment.live[at]:
                expires = int(segment.expires[at]) if segment.expiring else 0
                if expires and clock is not None and expires <= clock():
                    return None
                return InSegment(segment, at)
        return None

    def remembers(self, key: bytes) -> bool:
        """Whether some file has a value of a key that does not live: one that was evicted, say, and
        would live again after a crash, as the last manifest says.
        """
        return (
            any(key in log.rows or key in log.ghosts for log in (*self.logs(), *self.empty))
            or any(segment.find(key) is not None for segment in self.filters.owners(key))
            or any(segment.find(key) is not None for segment in self.obsolete)
        )

    def touch(self, found: Found, now: int) -> None:
        """It has been asked for."""
        if isinstance(found, InSegment):
            found.segment.stamps[found.row] = now
        else:
            found.log.stamps[found.row.entry.key] = now

    # -- changing ----------------------------------------------------------------------------------

    def kill(self, key: bytes) -> bool:
        """A key does not live any more; whether it did."""
        found = self.find(key)
        if found is not None:
            self.drop(found)
        return found is not None

    def drop(self, found: Found) -> None:
        """A value that lives does not any more."""
        self.live_values -= 1
        if isinstance(found, InSegment):
            self.live_bytes -= int(found.segment.costs[found.row])
            found.segment.kill(found.row)
        else:
            self.live_bytes -= found.row.cost
            found.log.kill(found.row.entry.key)

    def give_up(self, found: Found) -> None:
        """`drop` what nobody deleted or replaced: the store's owner is told, if it asked to be."""
        key = found.entry.key if self.on_gone is not None else b""
        self.drop(found)
        if self.on_gone is not None:
            self.on_gone(key)

    def commit(self, log: Log, row: Row, now: int) -> None:
        """A value has arrived (or a deletion): it takes the place of what was there."""
        self.kill(row.entry.key)
        if row.entry.kind == VALUE:
            log.add_live(row, now)
            self.live_values += 1
            self.live_bytes += row.cost

    def take_id(self) -> int:
        """A new file's."""
        self.next_id += 1
        return self.next_id - 1

    def start_log(self) -> Log:
        """A new active log; the one before is to be sealed.

        Raises:
            StorageError: the file could not be made.
        """
        assert self.reserved, "no id is reserved for a log"
        number = self.reserved[0]
        try:
            log = Log(self.files, number, self.pool, new=True)
        except OSError as error:
            raise StorageError(
                f"{self.files}: {file_name(number)} cannot be made: {error}"
            ) from error
        self.reserved.popleft()
        self.retire_active()
        self.active = log
        return log

    def retire_active(self) -> None:
        """No value is placed in the active log any more."""
        if self.active is not None:
            self.active.close_group()
            self.sealing.append(self.active)
            self.active = None

    def sealed(self, log: Log, segment: Segment | None) -> None:
        """A log has become a segment, or nothing if it has no values."""
        self.sealing.remove(log)
        self.live_values -= len(log.live)
        self.live_bytes -= log.live_bytes
        if segment is None:
            self.empty.append(log)
            return
        numbers = {row.number for row in log.live.values()}
        segment.take_live_numbers(numbers)
        for key, stamp in log.stamps.items():
            at = segment.find(key)
            if at is not None:
                segment.stamps[at] = stamp
        segment.holders.append(weakref.ref(log.file))
        log.drop_slabs()
        self.add_segments([segment])

    def replaced(self, old: Iterable[Segment], new: Iterable[Segment]) -> None:
        """Segments were written anew; `new` have their live bits. The old ones' files are to be
        removed when a manifest does not name them any more.
        """
        for segment in old:
            self.filters.remove(segment)
            del self.segments[segment.number]
            self.live_values -= segment.live_values
            self.live_bytes -= segment.live_bytes
            self.record_bytes -= manifests.record_bytes(segment.written)
            self.obsolete.append(segment)
        self.add_segments(new)

    def removed(self, segment: Segment) -> None:
        """An obsolete segment's file is removed; its bytes are free when nobody reads it."""
        self.obsolete.remove(segment)
        self.segment_bytes -= segment.file_bytes
        self.gone.append((segment.holders, segment.file_bytes))

    # -- the manifest ------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """Of the state as it is; its generation is taken by it. `fresh` are ids for logs to come,
        which may be used when it is saved.
        """
        self.generation += 1
        while len(self.reserved) + len(self.fresh) < RESERVED:
            self.fresh.append(self.take_id())
        logs = [log.number for log in self.sealing]
        if self.active is not None:
            logs.append(self.active.number)
        return Manifest(
            self.generation, self.next_id, self.next_sequence,
            [self._record(segment) for segment in self.segments.values()],
            [*logs, *self.reserved, *self.fresh],
        )  # fmt: skip

    def saved(self) -> None:
        """What `manifest` gave last is on disk."""
        self.reserved.extend(self.fresh)
        self.fresh.clear()

    def _record(self, segment: Segment) -> SegmentRecord:
        touched = int(segment.stamps.max(initial=0))
        return SegmentRecord(
            segment.number, segment.file_bytes, segment.level, touched, segment.live_bits()
        )

    def close(self) -> None:
        """Let all files go that no reader, view or snapshot holds: they may be removed by whoever
        opens the store next, and their bytes should come free then.
        """
        self.opened.clear()
        self.segments, self.filters = {}, Filters[Segment]()
        self.obsolete, self.sealing, self.empty, self.active = [], [], [], None

    # -- bytes -------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Of all files, logs as they will be sealed, what compaction is about to write, manifests,
        and files that are removed but still read by this process.
        """
        logs = list(self.logs())
        coming = len(logs) + RESERVED
        records = sum(manifests.record_bytes(log.written) for log in logs)
        return (
            self.segment_bytes
            + sum(log.projected() for log in logs)
            + sum(log.file_bytes for log in self.empty)
            + self.planned
            + sum(self.strays.values())
            + self.read_bytes()
            + manifests.files_bytes(self.record_bytes + records, coming)
        )

    def read_bytes(self) -> int:
        """Of files that are removed but still read by this process."""
        self.gone = [
            (holders, size) for holders, size in self.gone if any(h() is not None for h in holders)
        ]
        return sum(size for _, size in self.gone)

    def pending_bytes(self) -> int:
        """Not written yet."""
        return sum(log.pending() for log in self.logs())

    # -- checking ----------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises `IntegrityError` on the first thing that contradicts the invariants."""
        seen: dict[bytes, str] = {}
        live_bytes = 0
        for log in self.logs():
            for key, row in log.live.items():
                if log.rows[key] is not row or row.entry.key != key:
                    raise IntegrityError(f"{log.where}: {key.hex()} lives and is not its row")
                _once(seen, key, log.where)
            costs = sum(row.cost for row in log.live.values())
            _equal(f"{log.where}: live bytes", log.live_bytes, costs)
            live_bytes += costs
        for segment in self.segments.values():
            end, last = 0, b""
            for at in range(segment.count):
                entry, end = unpack_entry(segment.heap, end, segment.where)
                if at and entry.key <= last:
                    raise IntegrityError(f"{segment.where}: key {at} is not above the one before")
                last = entry.key
                if segment.live[at]:
                    _once(seen, entry.key, segment.where)
                    if segment not in self.filters.owners(entry.key):
                        raise IntegrityError(f"{segment.where}: its filter hides {last.hex()}")
            live = int(segment.costs[segment.live].sum())
            _equal(f"{segment.where}: live bytes", segment.live_bytes, live)
            _equal(f"{segment.where}: live values", segment.live_values, int(segment.live.sum()))
            live_bytes += live
        _equal("live values", self.live_values, len(seen))
        _equal("live bytes", self.live_bytes, live_bytes)
        files = [*self.segments.values(), *self.obsolete]
        _equal("bytes of segments", self.segment_bytes, sum(one.file_bytes for one in files))
        records = sum(manifests.record_bytes(one.written) for one in self.segments.values())
        _equal("bytes of records", self.record_bytes, records)


def _equal(what: str, counted: int, found: int) -> None:
    if counted != found:
        raise IntegrityError(f"{what}: {counted} are counted, {found} are there")


def _once(seen: dict[bytes, str], key: bytes, where: str) -> None:
    if key in seen:
        raise IntegrityError(f"{key.hex()} lives in {seen[key]} and {where}")
    seen[key] = where
