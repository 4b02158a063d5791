"""Reading: from memory where a value still is, else from its file, many requests at a time."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from kvpaged.errors import IntegrityError, KVPagedError, StorageError
from kvpaged.lsm.files import Bytes, File, aligned
from kvpaged.lsm.layout import BLOCK, Entry, part_offsets, up
from kvpaged.lsm.log import Slab
from kvpaged.lsm.reads import Range, Request, plan
from kvpaged.lsm.segment import check_parts
from kvpaged.lsm.tree import Found, InLog, InSegment, Tree
from kvpaged.lsm.values import RAW, as_tensor, decode_part, new_bytes

INLINE = 2
"""Requests up to which the calling thread reads by itself: waking another costs 50 us."""


@dataclass(slots=True)
class ReadCounts:
    """What has been read.

    Attributes:
        hits, misses: keys that were asked for.
        asked_bytes: of the tensors that came back.
        read_bytes, requests, runs: bytes of files, calls, contiguous pieces.
        from_memory, viewed: values that were still in memory, or handed out where they lie.
        damaged: values that could not be read or were not what their checksums say.
    """

    hits: int = 0
    misses: int = 0
    asked_bytes: int = 0
    read_bytes: int = 0
    requests: int = 0
    runs: int = 0
    from_memory: int = 0
    viewed: int = 0
    damaged: int = 0


@dataclass(eq=False, slots=True)
class Fetch:
    """A value on its way.

    Attributes:
        found, entry: which it is.
        memory, slab: its payload, where it still is in memory; the slab is pinned.
        numbers: of the parts that are wanted.
        out: memory for each of them, decoded.
        left: requests that have not ended.
        error: why it will not come.
    """

    found: Found
    entry: Entry = field(init=False)
    numbers: Sequence[int] = ()
    out: Mapping[int, Bytes] = field(default_factory=dict)
    memory: Bytes | None = None
    slab: Slab | None = None
    stored: dict[int, Bytes] = field(default_factory=dict)
    copies: list[tuple[Bytes, Bytes]] = field(default_factory=list)
    left: int = 0
    error: KVPagedError | None = None
    alone: bool = False

    def tensors(self) -> Tensor | dict[str, Tensor]:
        """What was put, or its wanted parts."""
        forms = self.entry.forms
        made = {forms[n].name: as_tensor(self.out[n], forms[n]) for n in self.numbers}
        return made[""] if self.entry.single else made


def pin(found: Found) -> tuple[Bytes, Slab] | None:
    """A value's payload in memory, if it is there; under the store's lock. The slab stays until
    its `pins` are taken back.
    """
    if isinstance(found, InLog):
        held = found.log.memory_of(found.entry)
        if held is not None:
            held[0].pins += 1
            return held[1], held[0]
    return None


class Reader:
    """Fetches values, `threads` requests at a time. Any thread may call."""

    def __init__(self, tree: Callable[[], Tree], *, threads: int, direct: bool):
        self._tree, self._threads, self._direct = tree, threads, direct
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.counts = ReadCounts()

    def fetch(self, fetches: Sequence[Fetch]) -> None:
        """Fill each one's `out`, or set its `error`."""
        jobs: list[Callable[[], None]] = []
        by_file: dict[tuple[object, int], list[Fetch]] = {}
        asked: dict[tuple[object, int], int] = {}
        for one in fetches:
            if one.memory is not None:
                self._from_memory(one)
            else:
                holder = one.found.log if isinstance(one.found, InLog) else one.found.segment
                # A value asked for twice is read twice: ranges of one plan do not overlap.
                place = (holder, one.entry.offset)
                times = asked[place] = asked.get(place, 0) + bool(one.entry.stored)
                by_file.setdefault((holder, times), []).append(one)
        for group in by_file.values():
            jobs += self._jobs(group)
        self._run(jobs)
        failed = [one for one in fetches if one.error is not None and one.alone]
        for one in failed:  # an unreadable block fails all values of its call: each by itself now
            one.error, one.alone = None, False
            one.stored, one.copies = {}, []
            self._run(self._jobs([one]))

    def payload(self, found: Found, entry: Entry) -> Bytes:
        """A value's stored bytes, not checked; of the mapping where there is one.

        Raises:
            StorageError: the file cannot be read.
        """
        if isinstance(found, InSegment):
            return found.segment.payload(entry)
        raw = aligned(up(entry.stored, BLOCK))[: entry.stored]
        try:
            done = found.log.file.read(entry.offset, [raw], direct=False)
        except OSError as error:
            raise StorageError(f"{found.where} cannot be read: {error}") from error
        return raw[:done]

    def _run(self, jobs: Sequence[Callable[[], None]]) -> None:
        rest = iter(jobs)  # shared: a call of the pool for each job costs as much as reading
        futures: list[Future[None]] = []
        if len(jobs) > INLINE and self._threads > 1:
            with self._lock:
                if self._pool is None and not self._closed:
                    self._pool = ThreadPoolExecutor(self._threads, "kvpaged-reader")
                if self._pool is not None:
                    workers = min(self._threads, len(jobs))
                    futures = [self._pool.submit(_work, rest) for _ in range(workers)]
        if not futures:
            _work(rest)
        for future in futures:
            future.result()

    def close(self) -> None:
        """End the threads, when they have read what they were asked for; who reads from now on
        reads by itself.
        """
        with self._lock:
            pool, self._pool, self._closed = self._pool, None, True
        if pool is not None:  # not under the lock, which they need
            pool.shutdown()

    def _jobs(self, fetches: Sequence[Fetch]) -> list[Callable[[], None]]:
        """Calls that read values of one file."""
        ranges, parts = [], []
        for owner, one in enumerate(fetches):
            offsets = list(part_offsets(one.entry.parts))
            for number in one.numbers:
                part = one.entry.parts[number]
                into = one.out[number] if part.codec == RAW else None
                at = one.entry.offset + offsets[number]
                ranges.append(Range(owner, at, part.stored, into))
                parts.append(number)
        planned = plan(ranges)
        for one_range, number, place in zip(ranges, parts, planned.places, strict=True):
            fetches[one_range.owner].stored[number] = place
        for owner, copies in planned.copies.items():
            fetches[owner].copies = copies
        for request in planned.requests:
            for owner in request.owners:
                fetches[owner].left += 1
        with self._lock:
            self.counts.runs += planned.runs
            self.counts.requests += len(planned.requests)
            self.counts.read_bytes += sum(request.size for request in planned.requests)
        found = fetches[0].found
        empty = [one for one in fetches if not one.left]
        return [
            *(partial(self._read, found, request, fetches) for request in planned.requests),
            *(partial(self._finish, one) for one in empty),
        ]

    def _read(self, found: Found, request: Request, fetches: Sequence[Fetch]) -> None:
        error: KVPagedError | None = None
        try:
            file = self._file(found)
            if file is None:
                assert isinstance(found, InSegment)
                done = _copy(found.segment.data, request)
            else:
                done = file.read(request.offset, request.into, direct=self._direct)
            _blank(request.into, done)
        except OSError as caught:
            error = StorageError(f"{found.where} cannot be read: {caught}")
        with self._lock:
            finished = []
            for owner in request.owners:
                one = fetches[owner]
                one.left -= 1
                if error is not None:
                    one.error, one.alone = error, len(request.owners) > 1
                if one.left == 0 and one.error is None:
                    finished.append(one)
        for one in finished:
            self._finish(one)

    def _file(self, found: Found) -> File | None:
        if isinstance(found, InLog):
            return found.log.file
        try:
            return self._tree().opened.get(found.segment.name)
        except FileNotFoundError:  # compacted away; its mapping is still there
            return None

    def _finish(self, one: Fetch) -> None:
        try:
            for into, source in one.copies:
                np.copyto(into, source)
            check_parts(one.entry, one.stored, one.found.where, one.numbers)
            for number in one.numbers:
                decode_part(one.entry, number, one.stored[number], one.out[number])
        except IntegrityError as error:
            one.error = error
        finally:
            one.stored = {}

    def _from_memory(self, one: Fetch) -> None:
        assert one.memory is not None
        offsets = list(part_offsets(one.entry.parts))
        for number in one.numbers:
            part = one.entry.parts[number]
            stored = one.memory[offsets[number] : offsets[number] + part.stored]
            decode_part(one.entry, number, stored, one.out[number])
        with self._lock:
            self.counts.from_memory += 1


def outputs(entry: Entry, numbers: Sequence[int]) -> dict[int, Bytes]:
    """New memory for parts."""
    return {number: new_bytes(entry.forms[number].nbytes) for number in numbers}


def _work(jobs: Iterator[Callable[[], None]]) -> None:
    for job in jobs:
        job()


def _copy(data: Bytes, request: Request) -> int:
    at = request.offset
    for into in request.into:
        piece = data[at : at + len(into)]
        into[: len(piece)] = piece
        at += len(into)
    return max(0, min(request.size, len(data) - request.offset))


def _blank(into: Sequence[Bytes], done: int) -> None:
    """Where the file ends early, nothing that happened to be in memory passes for its bytes."""
    for piece in into:
        if done < len(piece):
            piece[max(done, 0) :] = 0
        done -= len(piece)
