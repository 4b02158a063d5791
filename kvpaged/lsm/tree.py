"""What a store knows: its files, where each key lives, and how many bytes that takes."""

import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from kvpaged.errors import IntegrityError, StorageError
from kvpaged.lsm import manifest as manifests
from kvpaged.lsm.files import Bytes, Files
from kvpaged.lsm.filters import Filters
from kvpaged.lsm.layout import Entry, unpack_entry
from kvpaged.lsm.log import Log, SlabPool, replay
from kvpaged.lsm.manifest import Manifest, SegmentRecord
from kvpaged.lsm.segment import Row, Segment, file_name

RESERVED = 4
"""Ids of logs that a manifest names before the files exist, so that a new log needs no manifest."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


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
           first; a file is in one of `active`, `sealing`, `segments`.
        3. Files that no saved manifest names hold nothing that lives, except logs among the ids it
           reserved.
    """

    def __init__(self, files: Files, pool: SlabPool, *, writable: bool):
        self.files, self.pool, self.writable = files, pool, writable
        self.active: Log | None = None
        self.sealing: list[Log] = []
        self.segments: dict[int, Segment] = {}
        self.filters = Filters[Segment]()
        self.generation = 0
        self.next_id = 1
        self.next_sequence = 1
        self.reserved: deque[int] = deque()
        self.gone: list[tuple[weakref.ref[Bytes], int]] = []
        self.damage: list[str] = []
        self.live_values = 0

    # -- opening -----------------------------------------------------------------------------------

    def load(self) -> None:
        """Open what the manifest names, and bring logs up to date.

        Raises:
            IntegrityError: there are manifests and none is whole.
        """
        saved = manifests.load(self.files)
        names = set(self.files.list())
        if saved is None:
            stray = sorted(name for name in names if name.endswith(".seg"))
            if stray:
                raise IntegrityError(f"{self.files} has {stray[0]} and no manifest")
            saved = manifests.EMPTY
        self.generation, self.next_id = saved.generation, saved.next_id
        self.next_sequence = saved.next_sequence
        opened = [self._open_segment(record) for record in saved.segments]
        self._add_segments([segment for segment in opened if segment is not None])
        for number in saved.logs:
            if file_name(number) in names:
                self._open_log(number)
        if self.writable:
            listed = {file_name(n) for n in (*saved.logs, *(s.id for s in saved.segments))}
            for name in names - listed:
                if name.endswith(".seg") or name == manifests.NEW:
                    self.files.remove(name)

    def _open_segment(self, record: SegmentRecord) -> Segment | None:
        try:
            segment = Segment(self.files, record.id)
            segment.take_live(record.live)
        except (OSError, IntegrityError) as error:
            if isinstance(error, FileNotFoundError) and not self.writable:
                raise  # the writer has compacted it away: the reader starts again
            self.damage.append(f"{file_name(record.id)} is lost: {error}")
            return None
        if segment.repaired:
            self.damage.append(segment.repaired)
        return segment

    def _open_log(self, number: int) -> None:
        log = Log(self.files, number, self.pool, new=False)
        touched, lost = replay(log, log.file.map())
        self.damage += lost
        for key in touched:
            self.kill(key)
        self.live_values += len(log.live)
        last = max((row.entry.sequence for row in log.rows.values()), default=0)
        self.next_sequence = max(self.next_sequence, last + log.entries + 1)
        self.sealing.append(log)

    def _add_segments(self, segments: Iterable[Segment]) -> None:
        added = list(segments)
        self.filters.add((segment, segment.filter) for segment in added)
        for segment in added:
            self.segments[segment.number] = segment
            self.live_values += int(segment.live.sum())

    # -- finding -----------------------------------------------------------------------------------

    def logs(self) -> Iterator[Log]:
        """The newest first."""
        if self.active is not None:
            yield self.active
        yield from reversed(self.sealing)

    def find(self, key: bytes, now: int | None = None) -> Found | None:
        """Where a key lives; `now` (`now_ms`) leaves out what has expired."""
        for log in self.logs():
            row = log.live.get(key)
            if row is not None:
                if now is not None and 0 < row.entry.expires <= now:
                    return None
                return InLog(log, row)
        for segment in self.filters.owners(key):
            at = segment.find(key)
            if at is not None and segment.live[at]:
                if now is not None and 0 < segment.expires[at] <= now:
                    return None
                return InSegment(segment, at)
        return None

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
        if found is None:
            return False
        self.live_values -= 1
        if isinstance(found, InSegment):
            found.segment.live[found.row] = False
        else:
            del found.log.live[key]
            found.log.stamps.pop(key, None)
        return True

    def commit(self, log: Log, row: Row) -> None:
        """A value has arrived (or a deletion): it takes the place of what was there."""
        self.kill(row.entry.key)
        if row.entry.kind == 1:
            log.rows[row.entry.key] = log.live[row.entry.key] = row
            log.stamps[row.entry.key] = now_ms()
            self.live_values += 1

    def take_id(self) -> int:
        """A new file's."""
        self.next_id += 1
        return self.next_id - 1

    def start_log(self) -> Log:
        """A new active log; the one before is to be sealed.

        Raises:
            StorageError: the file could not be made, or no id is reserved (wait for a manifest).
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

    def sealed(self, log: Log, segment: Segment) -> None:
        """A log has become a segment."""
        bits = np.zeros(log.written, bool)
        bits[[row.number for row in log.live.values()]] = True
        segment.take_live(bits)
        for key, stamp in log.stamps.items():
            at = segment.find(key)
            if at is not None:
                segment.stamps[at] = stamp
        self.sealing.remove(log)
        self.live_values -= len(log.live)
        log.drop_slabs()
        self._add_segments([segment])

    def replaced(self, old: Iterable[Segment], new: Iterable[Segment]) -> None:
        """Segments were written anew; `new` have their live bits."""
        for segment in old:
            self.filters.remove(segment)
            del self.segments[segment.number]
            self.live_values -= int(segment.live.sum())
            self.gone.append((weakref.ref(segment.data), segment.file_bytes))
        self._add_segments(new)

    # -- the manifest ------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Ids for logs to come."""
        while len(self.reserved) < RESERVED:
            self.reserved.append(self.take_id())

    def manifest(self) -> Manifest:
        """Of the state as it is; its generation is taken by it."""
        self.generation += 1
        return Manifest(
            self.generation, self.next_id, self.next_sequence,
            [
                SegmentRecord(s.number, s.file_bytes, s.level, s.live_bits())
                for s in self.segments.values()
            ],
            [*(log.number for log in self.sealing),
             *([self.active.number] if self.active is not None else []), *self.reserved],
        )  # fmt: skip

    # -- bytes -------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Of all files, logs as they will be sealed, manifests, and files that are removed but
        still mapped.
        """
        self.gone = [(data, size) for data, size in self.gone if data() is not None]
        logs = [log.projected() for log in self.logs()]
        values = [segment.written for segment in self.segments.values()]
        return (
            sum(segment.file_bytes for segment in self.segments.values())
            + sum(logs)
            + sum(size for _, size in self.gone)
            + manifests.size_of(values, len(logs) + RESERVED)
        )

    def pending_bytes(self) -> int:
        """Not written yet."""
        return sum(log.pending() for log in self.logs())

    # -- checking ----------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises `IntegrityError` on the first thing that contradicts the invariants."""
        seen: dict[bytes, str] = {}
        for log in self.logs():
            for key, row in log.live.items():
                if log.rows[key] is not row or row.entry.key != key:
                    raise IntegrityError(f"{log.where}: {key.hex()} lives and is not its row")
                _once(seen, key, log.where)
        for segment in self.segments.values():
            end, last = 0, b""
            for row in range(segment.count):
                entry, end = unpack_entry(segment._heap, end, segment.where)
                if row and entry.key <= last:
                    raise IntegrityError(f"{segment.where}: key {row} is not above the one before")
                last = entry.key
                if segment.live[row]:
                    _once(seen, entry.key, segment.where)
                    if segment not in self.filters.owners(entry.key):
                        raise IntegrityError(f"{segment.where}: its filter hides {last.hex()}")
        if len(seen) != self.live_values:
            raise IntegrityError(f"{len(seen)} values live, {self.live_values} are counted")


def _once(seen: dict[bytes, str], key: bytes, where: str) -> None:
    if key in seen:
        raise IntegrityError(f"{key.hex()} lives in {seen[key]} and {where}")
    seen[key] = where
