"""Writing segments anew: the I/O of a compaction task."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvpaged.codecs import Codec
from kvpaged.errors import IntegrityError
from kvpaged.lsm.compaction import GROUP_BYTES
from kvpaged.lsm.files import Bytes, Files, OpenFiles, aligned
from kvpaged.lsm.filters import MOST_KEYS
from kvpaged.lsm.layout import BLOCK, Entry, pack_entry, part_offsets, up
from kvpaged.lsm.log import Coming, Log, SlabPool
from kvpaged.lsm.order import Link, locality
from kvpaged.lsm.reads import Range, plan
from kvpaged.lsm.segment import Row, Segment, check_payload, write_index
from kvpaged.lsm.values import fill, recoded


class Unreadable(OSError):
    """A segment that cannot be read."""

    def __init__(self, segment: Segment, why: str):
        super().__init__(f"{segment.where} cannot be read: {why}")
        self.segment = segment.number


class Source(NamedTuple):
    """A value to be written anew, and whether colder."""

    segment: Segment
    row: int
    entry: Entry
    cold: bool


@dataclass(eq=False, slots=True)
class Output:
    """A new segment and where each of its values came from, by key."""

    segment: Segment
    rows: list[Row]
    sources: dict[bytes, Source]


@dataclass(eq=False, slots=True)
class MergeCounts:
    """What compaction did.

    Attributes:
        tasks, inputs, outputs: tasks, segments read and written.
        read_bytes, written_bytes: of files.
        recoded, recoded_bytes: values that became colder, and what that saved.
    """

    tasks: int = 0
    inputs: int = 0
    outputs: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    recoded: int = 0
    recoded_bytes: int = 0


class Merger:
    """Rewrites segments. One task at a time; it takes no lock.

    Attributes:
        strays: files that could not be removed, and their bytes.

    Args:
        files, opened: where they lie.
        segment_bytes: of an output, at most, unless a single value has more.
        cold: the codec for what is `Source.cold`.
        pace: called with bytes that are about to be written; may wait, or raise to end the task.
        take_id: the id of a new file.
    """

    def __init__(
        self, files: Files, opened: OpenFiles, *, segment_bytes: int, cold: Codec | None,
        pace: Callable[[int], None], take_id: Callable[[], int],
    ):  # fmt: skip
        self.files, self.opened = files, opened
        self.segment_bytes, self.cold = segment_bytes, cold
        self.pace, self.take_id = pace, take_id
        self.counts = MergeCounts()
        self.strays: dict[str, int] = {}
        self._pool = SlabPool(GROUP_BYTES + BLOCK, 1)

    def rewrite(self, sources: Sequence[Source], level: int) -> list[Output]:
        """Write values to new segments, in the order of their chains.

        Raises:
            Unreadable: a segment could not be read.
        OSError: a file could not be written. Nothing is left of the new ones.
        """
        self.counts.tasks += 1
        order = locality([Link(one.entry.key, one.entry.parent) for one in sources])
        outputs: list[Output] = []
        logs: list[Log] = []
        try:
            for chunk in self._files_of([sources[number] for number in order]):
                number = self.take_id()
                log = Log(self.files, number, self._pool, new=True)
                logs.append(log)
                outputs.append(self._write(log, chunk, level))
        except BaseException:
            for log in logs:
                self._forget(log)
            raise
        return outputs

    def _forget(self, log: Log) -> None:
        try:
            self.files.remove(log.name)
        except OSError:
            self.strays[log.name] = log.projected()

    def _files_of(self, sources: Sequence[Source]) -> Iterator[list[Source]]:
        chunk: list[Source] = []
        size = 4 * BLOCK
        for one in sources:
            more = one.entry.room + 2 * one.entry.packed_bytes + 64
            if chunk and (size + more > self.segment_bytes or len(chunk) == MOST_KEYS):
                yield chunk
                chunk, size = [], 4 * BLOCK
            chunk.append(one)
            size += more
        if chunk:
            yield chunk

    def _write(self, log: Log, sources: Sequence[Source], level: int) -> Output:
        for group in _groups(sources):
            coming = self._read(group)
            self.pace(sum(one.entry.room for one in coming))
            placed = log.place(coming, None, together=True)
            for place, one in zip(placed, coming, strict=True):
                fill(place.memory, one)
                log.rows[one.entry.key] = place.row
            log.arrived(placed, whole=True)
            run = log.ready()
            log.write(run, sync=False)
            log.wrote(run)
            log.release(0)
        rows = sorted(log.rows.values(), key=lambda row: row.entry.key)
        size = write_index(log.file, log.number, level, log.end, rows, log.written)
        log.drop_slabs()
        log.file.close()
        self.counts.outputs += 1
        self.counts.written_bytes += size
        segment = Segment(self.files, log.number)
        if segment.repaired:
            raise OSError(segment.repaired)
        segment.level = level
        return Output(segment, rows, {one.entry.key: one for one in sources})

    def _read(self, group: Sequence[Source]) -> list[Coming]:
        """Values with their payloads; a damaged one comes as it is, so that it stays detected."""
        payloads = [aligned(up(one.entry.stored, BLOCK))[: one.entry.stored] for one in group]
        by_segment: dict[Segment, list[int]] = {}
        for number, one in enumerate(group):
            by_segment.setdefault(one.segment, []).append(number)
        for segment, numbers in by_segment.items():
            ranges = [
                Range(n, group[n].entry.offset, group[n].entry.stored, payloads[n]) for n in numbers
            ]
            self._fetch(segment, ranges)
        return [self._coming(one, payload) for one, payload in zip(group, payloads, strict=True)]

    def _fetch(self, segment: Segment, ranges: Sequence[Range]) -> None:
        planned = plan(ranges, request=GROUP_BYTES)
        for request in planned.requests:
            try:
                file = self.opened.get(segment.name)
                done = file.read(request.offset, request.into, direct=True)
            except OSError as error:
                raise Unreadable(segment, str(error)) from error
            self.counts.read_bytes += done
            if done < request.size:
                raise Unreadable(segment, f"it ends at byte {request.offset + done}")
        for copies in planned.copies.values():
            for into, source in copies:
                np.copyto(into, source)

    def _coming(self, one: Source, payload: Bytes) -> Coming:
        entry = one.entry
        if one.cold and self.cold is not None:
            try:
                check_payload(entry, payload, one.segment.where)
                colder = recoded(entry, payload, self.cold)
            except IntegrityError:
                colder = None
            if colder is not None and colder.entry.stored < entry.stored:
                self.counts.recoded += 1
                self.counts.recoded_bytes += entry.stored - colder.entry.stored
                return colder
        pieces = [
            payload[at : at + part.stored]
            for part, at in zip(entry.parts, part_offsets(entry.parts), strict=True)
        ]
        return Coming(entry, pack_entry(entry), pieces)


def _groups(sources: Sequence[Source]) -> Iterator[list[Source]]:
    group: list[Source] = []
    size = 0
    for one in sources:
        more = up(one.entry.room, BLOCK) + one.entry.packed_bytes
        if group and size + more > GROUP_BYTES - BLOCK:
            yield _large_first(group)
            group, size = [], 0
        group.append(one)
        size += more
    if group:
        yield _large_first(group)


def _large_first(group: list[Source]) -> list[Source]:
    """In order, but for small ones: a large one behind each would begin at a block of its own."""
    return sorted(group, key=lambda one: one.entry.stored < BLOCK)
