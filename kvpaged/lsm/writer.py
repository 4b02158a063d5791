"""Writing: values take their places in order, and go out together.

Durability says when a put returns:

    none     when its bytes are in the memtable; a thread writes them out within `LINGER_S`
    process  when they are written to the file: they survive the process, not a loss of power
    power    when the file is synced, too

Whoever waits for bytes to be written writes them, and those of all others that came by then, so
concurrent puts share writes and syncs (group commit). Values are *committed*, that is, found by
readers, in the order of their sequence numbers, and not before that.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvpaged.errors import ConfigError, StorageError, UsageError
from kvpaged.lsm.filters import MOST_KEYS
from kvpaged.lsm.layout import BLOCK, VALUE
from kvpaged.lsm.log import Coming, Log, OpenGroup
from kvpaged.lsm.segment import Row
from kvpaged.lsm.tree import Tree, now_ms
from kvpaged.lsm.values import fill

Durability = Literal["none", "process", "power"]
DURABILITIES: tuple[Durability, ...] = ("none", "process", "power")
LINGER_S = 0.05
WRITE_FROM = 4 << 20
"""Unwritten bytes from which the thread writes without waiting for more."""


@dataclass(eq=False, slots=True)
class Batch:
    """What one call put, from its place until it is committed."""

    log: Log
    rows: list[Row]
    groups: list[OpenGroup]
    arrived: bool = False
    done: bool = False
    error: OSError | None = None


@dataclass(slots=True)
class WriteCounts:
    """What has been written: payload bytes that came, bytes that went to logs, calls, waits."""

    put_bytes: int = 0
    log_bytes: int = 0
    writes: int = 0
    stalls: int = 0
    refused: int = 0
    dropped: int = 0
    puts: int = 0


class Writer:
    """Places, writes and commits. Any thread may call; `cond` is the store's one lock.

    Invariants:
        1. `queue` has every batch that is placed and not done, in the order of sequence numbers.
        2. One thread at a time writes (`writing`), logs oldest first, groups in order.
        3. A batch is committed only when all batches before it are done.
    """

    def __init__(
        self, tree: Tree, cond: threading.Condition, *, durability: Durability,
        memtable_bytes: int, segment_bytes: int, max_stall_s: float,
        room: Callable[[int], bool],
    ):  # fmt: skip
        self.tree, self.cond = tree, cond
        self.durability = durability
        self.memtable_bytes, self.segment_bytes = memtable_bytes, segment_bytes
        self.max_stall_s, self.room = max_stall_s, room
        self.queue: deque[Batch] = deque()
        self.future: dict[bytes, tuple[int, bool]] = {}
        self.writing = threading.Lock()
        self.counts = WriteCounts()
        self.closed = False
        self.urgent = False
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """The thread that writes what nobody waits for."""
        if self.durability == "none":
            self.thread = threading.Thread(target=self._run, name="kvpaged-writer", daemon=True)
            self.thread.start()

    # -- putting -----------------------------------------------------------------------------------

    def put(
        self, coming: Sequence[Coming], *, atomic: bool = False, present: bool | None = None
    ) -> list[bool]:
        """Put entries; which of them were put (`present`: only those whose key is there, or is
        not). Atomic ones are put together or, after a crash, not at all.

        Raises:
            StorageError: the disk refuses, or there was no room within `max_stall_s`; nothing of
                this call is found then.
        """
        need = sum(one.entry.room + len(one.packed) + 64 for one in coming) + 4 * BLOCK
        with self.cond:
            self._admit(need)
            puts = self._wanted(coming, present)
            if not any(puts):
                return puts
            batch, memory = self._place([one for one, put in zip(coming, puts, strict=True) if put],
                                        atomic=atomic)  # fmt: skip
        try:
            for place, one in zip(
                memory, (one for one, put in zip(coming, puts, strict=True) if put), strict=True
            ):
                fill(place, one)
        finally:
            with self.cond:
                for group in batch.groups:
                    group.arriving -= 1
                    group.slab.pins -= 1
                batch.arrived = True
                self._commit()
                self.cond.notify_all()
        if self.durability == "none":
            with self.cond:
                self.cond.wait_for(lambda: batch.done)
        else:
            self._write_until(lambda: batch.done)
        if batch.error is not None:
            raise StorageError(
                f"{batch.log.where} cannot be written: {batch.error}"
            ) from batch.error
        return puts

    def _admit(self, need: int) -> None:
        """Wait until the entries may come; raises if they never may."""
        if self.closed:
            raise UsageError("the store is closed")
        waited = False
        while True:
            reason = self._obstacle(need)
            if reason is None:
                return
            if not waited:
                self.counts.stalls += 1
                waited = True
            self.urgent = True
            self.cond.notify_all()
            if not self.cond.wait_for(
                lambda: self.closed or self._obstacle(need) is None, self.max_stall_s
            ):
                self.counts.refused += 1
                raise StorageError(f"waited {self.max_stall_s:g} s: {reason}")
            if self.closed:
                raise UsageError("the store was closed")

    def _obstacle(self, need: int) -> str | None:
        pending = self.tree.pending_bytes()
        if pending and pending + need > self.memtable_bytes:
            return (
                f"{need:,} bytes come, {pending:,} of {self.memtable_bytes:,} in memory are not "
                "written yet"
            )
        if not self.room(need):
            return f"{need:,} bytes come and nothing could be evicted for them in that time"
        if not self.tree.reserved and self._full(1):
            return "a new manifest is being written"
        return None

    def _wanted(self, coming: Sequence[Coming], present: bool | None) -> list[bool]:
        puts: list[bool] = []
        now = now_ms() if present is not None else 0
        for one in coming:
            put = True
            if present is not None:
                put = self._exists(one.entry.key, now) == present
            if put:
                self.future[one.entry.key] = (
                    self.tree.next_sequence + sum(puts), one.entry.kind == VALUE
                )  # fmt: skip
            puts.append(put)
        return puts

    def _exists(self, key: bytes, now: int) -> bool:
        if key in self.future:
            return self.future[key][1]
        return self.tree.find(key, now) is not None

    def _full(self, more: int) -> bool:
        log = self.tree.active
        return (
            log is None
            or log.failed is not None
            or log.entries + more > MOST_KEYS
            or log.projected() >= self.segment_bytes
        )

    def _place(self, coming: Sequence[Coming], *, atomic: bool) -> tuple[Batch, list]:
        if len(coming) > MOST_KEYS:
            raise ConfigError(f"{len(coming):,} entries at once; {MOST_KEYS:,} are the most")
        if self._full(len(coming)):
            try:
                self.tree.start_log()
            except StorageError:
                for one in coming:
                    self.future.pop(one.entry.key, None)
                raise
        log = self.tree.active
        assert log is not None
        groups, rows, memory = log.place(coming, self.tree.next_sequence, atomic=atomic)
        self.tree.next_sequence += len(coming)
        for group in groups:
            group.slab.pins += 1
        batch = Batch(log, rows, groups)
        self.queue.append(batch)
        self.counts.puts += len(coming)
        self.counts.put_bytes += sum(one.entry.stored for one in coming)
        return batch, memory

    def _commit(self) -> None:
        """Make found what is in its turn."""
        early = self.durability == "none"
        while self.queue:
            batch = self.queue[0]
            if not batch.arrived:
                return
            errors = [group.error for group in batch.groups if group.error is not None]
            if errors:
                batch.error = errors[0]
            elif not early and not all(group.written for group in batch.groups):
                return
            self.queue.popleft()
            batch.done = True
            for row in batch.rows:
                if batch.error is None:
                    self.tree.commit(batch.log, row)
                key, sequence = row.entry.key, row.entry.sequence
                if self.future.get(key, (sequence, True))[0] <= sequence:
                    self.future.pop(key, None)

    # -- writing -----------------------------------------------------------------------------------

    def _write_until(self, done: Callable[[], bool]) -> None:
        """Write, or wait for who writes, until it is so."""
        while not done():
            with self.writing:
                if not done():
                    self._write_some()

    def _write_some(self) -> bool:
        """One write of the oldest groups there are; whether there were any. `writing` is held."""
        with self.cond:
            log = next((log for log in reversed(list(self.tree.logs())) if log.pending()), None)
            if log is None:
                return False
            if not log.closed:
                log.close_group()
            run = log.ready()
            if not run:
                self.cond.wait_for(lambda: bool(log.ready()))
                run = log.ready()
        error = None
        try:
            log.write(run, sync=self.durability == "power")
            if self.durability == "power" and run[0].start == 0:
                self.tree.files.sync()  # the log's name
        except OSError as caught:
            error = caught
        with self.cond:
            self._wrote(log, run, error)
        return True

    def _wrote(self, log: Log, run: Sequence[OpenGroup], error: OSError | None) -> None:
        if error is None:
            self.counts.writes += 1
            self.counts.log_bytes += run[-1].start + run[-1].size - run[0].start
            log.wrote(run, None)
        else:
            # What comes behind a hole is not written either: the file ends before it.
            log.failed = error
            log.close_group()
            failed = list(log.closed)
            log.end = failed[0].start
            log.wrote(failed, error)
            self._drop_failed(log, failed)
        self._commit()
        log.release(self.memtable_bytes)
        self.cond.notify_all()

    def _drop_failed(self, log: Log, failed: Sequence[OpenGroup]) -> None:
        """Values that were found before they were written (durability `none`) are lost."""
        start = failed[0].start
        for key, row in list(log.live.items()):
            if row.entry.offset >= start:
                self.tree.kill(key)
                self.counts.dropped += 1
        for key, row in list(log.rows.items()):
            if row.entry.offset >= start:
                del log.rows[key]

    def write_all(self) -> None:
        """Return when nothing is unwritten."""
        while True:
            with self.writing:
                if not self._write_some():
                    return

    def _run(self) -> None:
        while True:
            with self.cond:
                self.cond.wait_for(
                    lambda: self.closed or self.urgent or self.tree.pending_bytes() >= WRITE_FROM,
                    LINGER_S,
                )
                self.urgent = False
                if self.closed:
                    return
            with self.writing:
                self._write_some()
