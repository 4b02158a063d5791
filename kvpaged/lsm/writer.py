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
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from kvpaged.errors import ConfigError, StorageError, UsageError
from kvpaged.lsm.filters import MOST_KEYS
from kvpaged.lsm.layout import BLOCK, VALUE, up
from kvpaged.lsm.log import Coming, Log, OpenGroup
from kvpaged.lsm.options import StoreOptions
from kvpaged.lsm.tree import InLog, Tree
from kvpaged.lsm.values import fill
from kvpaged.lsm.writes import Batch, Begun, Fate, WriteCounts

LINGER_S = 0.05
WRITE_FROM = 4 << 20
"""Unwritten bytes from which the thread writes without waiting for more."""
MOST_SEALING = 4
"""Logs that may wait for their index."""


class Keeper(Protocol):
    """Who makes room."""

    error: str | None
    """Why the disk refuses, if it does."""

    def obstacle(self, need: int) -> str | None:
        """Why so many bytes cannot come now; evicts what it takes. Under the store's lock."""

    def help(self) -> bool:
        """Do a piece of work that makes room, in the calling thread; whether there was any."""


class Writer:
    """Places, writes and commits. Any thread may call; `cond` is the store's one lock.

    Invariants:
        1. `queue` has every batch that is placed and not done, in the order of sequence numbers.
        2. One thread at a time writes (`writing`), logs oldest first, groups in order.
        3. A batch is committed only when all batches before it are done.
    """

    def __init__(self, tree: Tree, cond: threading.Condition, options: StoreOptions):
        self.tree, self.cond, self.options = tree, cond, options
        self.durability = options.durability
        self.keeper: Keeper | None = None
        self.queue: deque[Batch] = deque()
        self.future: dict[bytes, tuple[int, bool]] = {}
        self.writing = threading.Lock()
        self.counts = WriteCounts()
        self.closed = False
        self.urgent = False
        self.broken: str | None = None
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """The thread that writes what nobody waits for, or not yet."""
        if self.durability != "power" and self.options.background:
            self.thread = threading.Thread(target=self._run, name="kvpaged-writer", daemon=True)
            self.thread.start()

    @property
    def ahead(self) -> bool:
        """Whether a thread writes while a call goes on: not where each write would be synced."""
        return self.durability == "process" and self.thread is not None

    # -- putting -----------------------------------------------------------------------------------

    def put(
        self, coming: Sequence[Coming], *, atomic: bool = False, present: bool | None = None
    ) -> list[bool]:
        """Put entries; which of them had their way (`present`: only those whose key is there, or is
        not). Atomic ones are put together or, after a crash, not at all.

        Raises:
            StorageError: the disk refuses, or there was no room within `max_stall_s`; nothing of
                this call is found then.
        """
        return self.finish(self.begin(coming, atomic=atomic, present=present))

    def begin(
        self, coming: Sequence[Coming], *, atomic: bool = False, present: bool | None = None,
        ahead: bool = False,
    ) -> Begun:  # fmt: skip
        """The first half of `put`: entries are in the memtable. `ahead`: the store's thread begins
        to write them, while the caller gets the next ready.
        """
        with self.cond:
            self._admit(_room(coming, atomic=atomic))
            wanted, answers = self._wanted(coming, present)
            if not wanted:
                return Begun(None, answers)
            batch = self._place(wanted, atomic=atomic)
        filled = False
        try:
            for place, one in zip(batch.placed, wanted, strict=True):
                fill(place.memory, one)
            filled = True
        finally:
            with self.cond:
                batch.log.arrived(batch.placed, whole=filled)
                batch.arrived = True
                if not filled:
                    batch.fate.error = InterruptedError("its bytes were not copied to the end")
                if ahead and batch.log is self.tree.active:
                    batch.log.close_group()  # else it would wait for what comes next
                    self.urgent = True
                self._commit()
                self.cond.notify_all()
        return Begun(batch.fate, answers)

    def finish(self, begun: Begun) -> list[bool]:
        """The second half: they are as durable as was asked for; which of them were put."""
        fate = begun.fate
        if fate is not None:
            self._wait(fate)
            if fate.error is not None:
                raise StorageError(f"{fate.where} cannot be written: {fate.error}") from fate.error
        return begun.put

    def _wait(self, fate: Fate) -> None:
        if self.durability == "none":
            with self.cond:
                self.cond.wait_for(lambda: fate.done)
            return
        while not fate.done:
            with self.writing:
                if not fate.done:
                    self._write_some()

    def _admit(self, need: int) -> None:
        """Wait until the entries may come; raises if they never may. The lock is held, and let go
        while it waits.
        """
        deadline = 0.0
        while True:
            if self.closed:
                raise UsageError("the store is closed")
            if self.broken is not None:
                raise StorageError(f"{self.tree.files}: {self.broken}")
            reason = self._obstacle(need)
            if reason is None:
                return
            now = time.monotonic()
            if not deadline:
                deadline = now + self.options.max_stall_s
                self.counts.stalls += 1
            self.urgent = True
            self.cond.notify_all()
            if not self._help() and (now >= deadline or not self.options.background):
                self.counts.refused += 1
                raise StorageError(f"{self.tree.files}: no room in time: {reason}")
            if now >= deadline:
                self.counts.refused += 1
                raise StorageError(
                    f"{self.tree.files}: waited {self.options.max_stall_s:g} s: {reason}"
                )
            if self.options.background:
                self.cond.wait(min(LINGER_S, deadline - now))

    def _help(self) -> bool:
        """Write what is unwritten; without threads of its own, do what they would do."""
        release = self.cond.release
        release()
        try:
            wrote = self.write_some()
            if wrote or self.options.background or self.keeper is None:
                return wrote
            return self.keeper.help()
        finally:
            self.cond.acquire()

    def _obstacle(self, need: int) -> str | None:
        tree = self.tree
        pending = tree.pending_bytes()
        if pending and pending + need > self.options.memtable_bytes:
            return (
                f"{need:,} bytes come, {pending:,} of {self.options.memtable_bytes:,} in memory "
                "are not written yet"
            )
        if self._full(1, need) and (not tree.reserved or len(tree.sealing) >= MOST_SEALING):
            error = None if self.keeper is None else self.keeper.error
            why = f"; {error}" if error else ""
            return f"{len(tree.sealing)} full files wait for their index{why}"
        return None if self.keeper is None else self.keeper.obstacle(need)

    def _wanted(
        self, coming: Sequence[Coming], present: bool | None
    ) -> tuple[list[Coming], list[bool]]:
        """The entries to be put, and what to answer for each that came."""
        wanted: list[Coming] = []
        answers: list[bool] = []
        for one in coming:
            key, value = one.entry.key, one.entry.kind == VALUE
            answers.append(present is None or self._exists(key) == present)
            # A deletion is written down also where only a crash would bring a value back.
            if answers[-1] or (not value and self.tree.remembers(key)):
                self.future[key] = (self.tree.next_sequence + len(wanted), value)
                wanted.append(one)
        return wanted, answers

    def _exists(self, key: bytes) -> bool:
        if key in self.future:
            return self.future[key][1]
        return self.tree.find(key, self.options.clock) is not None

    def _full(self, more: int, need: int) -> bool:
        log = self.tree.active
        return (
            log is None
            or log.failed is not None
            or log.entries + more > MOST_KEYS
            or (log.entries > 0 and log.projected() + need > self.options.file_bytes)
        )

    def _place(self, coming: Sequence[Coming], *, atomic: bool) -> Batch:
        try:
            if len(coming) > MOST_KEYS:
                raise ConfigError(f"{len(coming):,} entries at once; {MOST_KEYS:,} are the most")
            if self._full(len(coming), _room(coming, atomic=atomic)):
                self.tree.start_log()
            log = self.tree.active
            assert log is not None
            placed = log.place(coming, self.tree.next_sequence, atomic=atomic)
            batch = Batch(log, placed, Fate(log.where))
        except BaseException:
            self.future = {
                one.row.entry.key: (one.row.entry.sequence, one.row.entry.kind == VALUE)
                for batch in self.queue for one in batch.placed
            }  # fmt: skip
            raise
        self.tree.next_sequence += len(coming)
        self.queue.append(batch)
        values = [one.entry for one in coming if one.entry.kind == VALUE]
        self.counts.puts += len(values)
        self.counts.deletes += len(coming) - len(values)
        self.counts.put_bytes += sum(entry.stored for entry in values)
        self.counts.tensor_bytes += sum(entry.nbytes for entry in values)
        return batch

    def _commit(self) -> None:
        """Make found what is in its turn."""
        early = self.durability == "none"
        while self.queue:
            batch = self.queue[0]
            if not batch.arrived:
                return
            groups = [one.group for one in batch.placed]
            errors = [group.error for group in groups if group.error is not None]
            if errors:
                batch.fate.error = batch.fate.error or errors[0]
            elif batch.fate.error is None and not early and not all(g.written for g in groups):
                return
            self.queue.popleft()
            batch.fate.done = True
            now = self.options.clock()
            for one in batch.placed:
                if batch.fate.error is None:
                    self.tree.commit(batch.log, one.row, now)
                else:
                    batch.log.ghosts.add(one.row.entry.key)
                key, sequence = one.row.entry.key, one.row.entry.sequence
                if self.future.get(key, (sequence, True))[0] <= sequence:
                    self.future.pop(key, None)

    # -- writing -----------------------------------------------------------------------------------

    def _write_some(self) -> bool:
        """One write of the oldest groups there are; whether there were any. `writing` is held."""
        with self.cond:
            log = next((log for log in reversed(list(self.tree.logs())) if log.pending()), None)
            if log is None:
                return False
            if not log.closed:
                log.close_group()
            run = log.ready()
            while not run:
                self.cond.wait()
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
            log.wrote(run)
        else:
            self._drop_failed(log, log.fail(error))
        self._commit()
        log.release(self.options.memtable_bytes if log is self.tree.active else 0)
        self.cond.notify_all()

    def _drop_failed(self, log: Log, start: int) -> None:
        """Values that were found before they were written (durability `none`) are lost."""
        for row in list(log.live.values()):
            if row.entry.offset >= start:
                self.tree.give_up(InLog(log, row))
                self.counts.dropped += 1
        for key, row in list(log.rows.items()):
            if row.entry.offset >= start:
                del log.rows[key]

    def write_some(self) -> bool:
        """Write the oldest that is unwritten; whether there was any."""
        with self.writing:
            return self._write_some()

    def write_all(self) -> None:
        """Return when nothing is unwritten."""
        while self.write_some():
            pass

    def close(self) -> None:
        """Nothing can be put any more; what was put is written."""
        with self.cond:
            self.closed = True
            self.cond.notify_all()
        if self.thread is not None:
            self.thread.join()
        self.write_all()

    def _due(self) -> bool:
        return self.closed or self.urgent or self.tree.pending_bytes() >= WRITE_FROM

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # a fault of ours: puts say so, and are not lost later
            self.broken = f"the thread that writes has ended: {error!r}"
            raise

    def _loop(self) -> None:
        while True:
            with self.cond:
                if self.durability == "none":
                    self.cond.wait_for(self._due, LINGER_S)
                else:
                    self.cond.wait_for(lambda: self.closed or self.urgent)
                self.urgent = False
                if self.closed:
                    return
            self.write_some()


def _room(coming: Sequence[Coming], *, atomic: bool) -> int:
    """The most bytes that entries add to a log, its index included."""
    payloads = sum(up(one.entry.room, BLOCK) for one in coming)
    packed = sum(up(len(one.packed) + 64, BLOCK if not atomic else 8) for one in coming)
    index = sum(len(one.packed) + 64 for one in coming)
    return payloads + packed + up(index, BLOCK) + 8 * BLOCK
