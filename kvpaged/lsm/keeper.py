"""What happens behind puts: sealing, manifests, eviction, compaction, removing files."""

import threading
import time

from kvpaged.errors import IntegrityError, StorageError, UsageError
from kvpaged.lsm import manifest as manifests
from kvpaged.lsm.compaction import Budget, budget
from kvpaged.lsm.compactor import Compactor, Stopped
from kvpaged.lsm.eviction import Policy
from kvpaged.lsm.living import Living
from kvpaged.lsm.log import Log
from kvpaged.lsm.options import StoreOptions
from kvpaged.lsm.segment import Segment, write_index
from kvpaged.lsm.tree import Tree
from kvpaged.lsm.writer import Writer

EVICT = 1 / 64
"""Of the bytes that may live: evicted at a time, so that values are not sorted for every put."""
IDLE_S = 0.2
"""How often the thread looks whether something is due."""
AGAIN_S = 0.1
"""How long nothing is tried after the disk refused."""


class Keeper:
    """Keeps a store in order. `work` and what it does run in one thread at a time (`working`);
    `obstacle` and what it does under the store's lock.

    Invariants:
        1. Bytes on disk never exceed `max_bytes`: puts keep to `budget`, and a task is
           planned to write no more than what is free.
        2. A file is removed after a manifest was saved that does not name it.
    """

    def __init__(
        self, tree: Tree, cond: threading.Condition, writer: Writer, options: StoreOptions,
        policy: Policy,
    ):  # fmt: skip
        self.tree, self.cond, self.writer = tree, cond, writer
        self.options, self.policy = options, policy
        self.working = threading.RLock()
        self.short = self.closing = self.closed = self.dirty = self.asked = False
        self.waiting = 0  # bytes that the last put could not have
        self.evicted = self.evicted_bytes = self.expired = 0
        self.manifest_bytes = self.sealed_bytes = 0
        self.error: str | None = None
        self._again = 0.0
        self.compactor = Compactor(tree, cond, options, self._pace)
        self.thread: threading.Thread | None = None

    # -- room --------------------------------------------------------------------------------------

    def budget(self, need: int = 0) -> Budget | None:
        """Bytes there may be, and may live, when a put of `need` bytes has come; `None` for any
        number.
        """
        most, full = self.options.max_bytes, self.options.file_bytes
        if most is None:
            return None
        share = budget(most, full, self.compactor.largest)
        if self.compactor.largest > most // 4 or need > share.live:
            return budget(most, full, 0)  # a file that large is to be dropped, not rewritten
        return share

    def obstacle(self, need: int) -> str | None:
        """See `writer.Keeper.obstacle`."""
        budget = self.budget(need)
        if budget is None:
            return None
        if need > budget.live:  # with no other value and no other file
            raise StorageError(
                f"{self.tree.files}: {need:,} bytes come at once; of {self.options.max_bytes:,} "
                f"there can be {max(budget.live, 0):,} for values"
            )
        over = self.tree.live_bytes + need - budget.live
        if over > 0:
            self._evict(over + int(budget.live * EVICT))
            if self.tree.live_bytes + need > budget.live:
                raise StorageError(
                    f"{self.tree.files}: {need:,} bytes come, and {self.tree.live_bytes:,} of "
                    f"{budget.live:,} may not be evicted"
                )
        used = self.tree.used_bytes()
        self.short = used + need > budget.puts - self.options.file_bytes
        self.waiting = need if used + need > budget.puts else 0
        self.asked = self.waiting > 0
        if not self.waiting:
            return None
        why = f"; {self.error}" if self.error else ""
        return (
            f"{need:,} bytes come, {used:,} of {budget.puts:,} are taken until they are "
            f"compacted{why}"
        )

    def _evict(self, need: int) -> None:
        living = Living(self.tree)
        values = living.columns()
        now = self.options.clock()
        for number in self.policy(values, need, now).tolist():
            expired = 0 < int(values.expires[number]) <= now
            self.expired += expired
            self.evicted += not expired
            self.evicted_bytes += int(values.costs[number])
            self.tree.give_up(living.found(number))

    # -- work --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Save a first manifest, seal what was left, and start the thread."""
        with self.working:
            self.dirty = True
            while self._seal():
                pass
            self._save()
        if self.options.background:
            self.thread = threading.Thread(target=self._run, name="kvpaged-keeper", daemon=True)
            self.thread.start()

    def help(self) -> bool:
        """See `writer.Keeper.help`."""
        self._again = 0.0
        return self.work()

    def work(self) -> bool:
        """Do the next thing that is due; whether there was any."""
        with self.working:
            if self.closed or time.monotonic() < self._again:
                return False
            return self._seal() or self._compact(None) or self._save()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # a fault of ours: puts say so, and do not wait for ever
            self.error = f"the thread that keeps the store has ended: {error!r}"
            raise

    def _loop(self) -> None:
        while True:
            if not self.work():
                with self.cond:
                    if self.closing:
                        return
                    self.cond.wait_for(self._called, IDLE_S)
                    self.asked = False
                    if time.monotonic() < self._again and not self.closing:
                        self.cond.wait(IDLE_S)
            if self.closing:
                return

    def _called(self) -> bool:
        return self.closing or self.asked or bool(self.tree.sealing)

    def _refused(self, what: str, error: OSError) -> bool:
        self.error = f"{what}: {error}"
        self._again = time.monotonic() + AGAIN_S
        return False

    def _pace(self, size: int) -> None:
        """Called while a task runs: files are sealed meanwhile, or puts would wait for its end."""
        rate = self.options.compact_bytes_per_s
        until = time.monotonic() + (0 if rate is None else size / rate)
        while True:
            if self.closing and self.thread is threading.current_thread():
                raise Stopped
            if time.monotonic() >= self._again and self._seal():
                self._save()
                continue
            left = until - time.monotonic()
            if rate is None or left <= 0:
                return
            with self.cond:
                if not self.cond.wait_for(self._hurried, left) or self.closing or self.short:
                    return

    def _hurried(self) -> bool:
        if self.closing or self.short:
            return True
        return time.monotonic() >= self._again and self._sealable() is not None

    # -- sealing -----------------------------------------------------------------------------------

    def _seal(self) -> bool:
        with self.cond:
            log = self._sealable()
            if log is None:
                return False
        try:
            segment = self._index(log)
        except OSError as error:
            return self._refused(f"{log.where} cannot be sealed", error)
        except IntegrityError as error:
            return self._refused(f"{log.where} cannot be sealed", OSError(str(error)))
        with self.cond:
            self.tree.sealed(log, segment)
            if segment is not None:
                self.compactor.largest = max(self.compactor.largest, segment.file_bytes)
                self.sealed_bytes += segment.file_bytes - log.end
            self.dirty = True
            self.cond.notify_all()
        return True

    def _sealable(self) -> Log | None:
        if not self.tree.sealing:
            return None
        log = self.tree.sealing[0]
        busy = log.pending() or any(batch.log is log for batch in self.writer.queue)
        return None if busy else log

    def _index(self, log: Log) -> Segment | None:
        rows = sorted(log.rows.values(), key=lambda row: row.entry.key)
        if not rows:
            return None
        write_index(log.file, log.number, 0, log.end, rows, log.written)
        segment = Segment(self.tree.files, log.number)
        if segment.repaired:
            raise IntegrityError(segment.repaired)
        return segment

    # -- the manifest ------------------------------------------------------------------------------

    def _save(self) -> bool:
        with self.cond:
            if not self.dirty:
                return False
            self.dirty = False
            manifest = self.tree.manifest()
            obsolete, empty = list(self.tree.obsolete), list(self.tree.empty)
        try:
            self.manifest_bytes += manifests.save(self.tree.files, manifest)
        except OSError as error:
            self.dirty = True
            return self._refused("the manifest cannot be saved", error)
        with self.cond:
            self.tree.saved()
            self.error = None
            self.cond.notify_all()
        for segment in obsolete:
            self.tree.opened.drop(segment.name)
            if self._remove(segment.name):
                with self.cond:
                    self.tree.removed(segment)
        for name in list(self.tree.strays):
            if self._remove(name):
                with self.cond:
                    del self.tree.strays[name]
        for log in empty:
            if self._remove(log.name):
                with self.cond:
                    self.tree.empty.remove(log)
        with self.cond:
            self.cond.notify_all()
        return True

    def _remove(self, name: str) -> bool:
        try:
            self.tree.files.remove(name)
        except FileNotFoundError:
            return True
        except OSError as error:
            self.dirty = True
            return self._refused(f"{name} cannot be removed", error)
        return True

    # -- compaction --------------------------------------------------------------------------------

    def _compact(self, done: set[int] | None) -> bool:
        """One task; `done` are the outputs of a rewriting of everything."""
        try:
            did = self.compactor.step(done, short=self.short)
        except Stopped:
            return False
        except OSError as error:
            self.dirty |= bool(self.tree.strays)
            return self._refused("compaction", error)
        if not did and done is None:
            with self.cond:
                did = self._make_room()
        self.dirty |= did
        return did and (self._save() or True)

    def _make_room(self) -> bool:
        """Where a put waits, nothing can be compacted, and it is not for bytes that are in use:
        seal the active file, for what is dead in it, and then drop what lives in a segment.
        """
        budget = self.budget(self.waiting)
        if budget is None or not self.waiting or self.tree.sealing:
            return False
        if self.tree.used_bytes() - self.tree.read_bytes() + self.waiting <= budget.puts:
            return False
        if self.tree.active is not None and self.tree.active.entries:
            self.tree.retire_active()
            return True
        return self.compactor.shed(self.policy)

    # -- on request --------------------------------------------------------------------------------

    def flush(self) -> None:
        """Everything put so far is in sealed files that survive a loss of power.

        Raises:
            StorageError: the disk refuses.
        """
        with self.working:
            self._check_open()
            self._again = 0.0
            with self.cond:
                if self.tree.active is not None and self.tree.active.entries:
                    self.tree.retire_active()
                self.dirty = True
            self._drain()

    def _drain(self) -> None:
        """Seal what is to be sealed by now; puts that go on meanwhile are not waited for."""
        with self.cond:
            logs = list(self.tree.sealing)
        for log in logs:
            while self._unwritten(log):
                self.writer.write_some()
            self._seal()
        self._save()
        if self.dirty or not set(logs).isdisjoint(self.tree.sealing):
            raise StorageError(f"{self.tree.files}: not all is on disk: {self.error}")

    def _unwritten(self, log: Log) -> int:
        with self.cond:
            return log.pending()

    def _check_open(self) -> None:
        """Whoever waited for `working` while the store was closed would save a manifest of what is
        left of it: nothing.
        """
        if self.closed:
            raise UsageError("the store is closed")

    def compact(self) -> int:
        """Rewrite everything: nothing dead is left, and chains lie in one piece, as far as there is
        room for both the old and the new. Returns the number of tasks.

        Raises:
            StorageError: the disk refuses.
        """
        self.flush()
        tasks, done = 0, set[int]()
        with self.working:
            self._check_open()
            while self._compact(done):
                tasks += 1
            if self.error is not None:
                raise StorageError(f"{self.tree.files}: {self.error}")
        return tasks

    def close(self) -> None:
        """End the thread; everything put so far is in sealed files.

        Raises:
            StorageError: the disk refuses.
        """
        with self.cond:
            self.closing = True
            self.cond.notify_all()
        if self.thread is not None:
            self.thread.join()
        self.writer.close()
        with self.working:
            self._again = 0.0
            try:
                with self.cond:
                    self.tree.retire_active()
                    self.dirty = True
                self._drain()
            finally:
                self.closed = True
