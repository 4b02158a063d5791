"""Calls of a tier, by one thread of its own, each with a deadline."""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from kvpaged.tiers.base import Tier, TierDownError
from kvpaged.tiers.health import FAILURES, WRITES, Health

log = logging.getLogger("kvpaged.offload")


class Job:
    """One piece of work for a tier's thread."""

    def __init__(
        self, work: Callable[["Job"], Any], undo: Callable[[], None] | None, kind: str
    ) -> None:
        self._work, self._undo, self.kind = work, undo, kind
        self._done = threading.Event()
        self.cancelled = False
        self.started = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """On the tier's thread."""
        try:
            self.result = self._work(self)
        except BaseException as error:  # whatever a tier raises: whoever waits is told
            self.error = error
        finally:
            self.end()

    def end(self) -> None:
        """It is over: let go of what it held."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()
        self._done.set()

    def wait(self, timeout: float | None) -> bool:
        """Whether it ended in time."""
        return self._done.wait(timeout)


class TierWorker:
    """The one thread that calls a tier; made when first needed.

    A call that does not return in time costs this thread: nothing more is asked of the tier until
    it does, so there is never more than one such thread a tier. Reads go before writes.
    """

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.health = Health()
        self.timeouts = 0
        self._cond = threading.Condition()
        self._jobs: tuple[deque[Job], deque[Job]] = (deque(), deque())  # reads, writes
        self._running: Job | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def parked(self) -> bool:
        """Its thread is in a call that nobody waits for any more."""
        return self._running is not None and self._running.cancelled

    @property
    def up(self) -> bool:
        """It may be asked for what it has."""
        return self._asked("read")

    @property
    def takes(self) -> bool:
        """It may be given something: it need not be, where it is only read."""
        return self._asked("put")

    def _asked(self, kind: str) -> bool:
        return not (self._closed or self.parked or self.health.rests(kind))

    def submit(
        self, work: Callable[[Job], Any], kind: str, undo: Callable[[], None] | None = None
    ) -> Job:
        """Have the tier's thread do something; `undo` is called when it is over, however it ends,
        also where it never began. `kind`: `"read"`, `"put"` or `"delete"`, see `Health`.

        Raises:
            TierDownError: it is not asked now; nothing is called.
        """
        job = Job(work, undo, kind)
        with self._cond:
            if not self._asked(kind):
                raise TierDownError(f"tier {self.tier.name} is not asked now")
            self._queue(job)
        return job

    def _queue(self, job: Job) -> None:
        """Leave a job to the thread; the condition is held."""
        self._jobs[job.kind in WRITES].append(job)
        if self._thread is None:
            self._thread = threading.Thread(
                target=_serve, args=(weakref.ref(self), self._cond), daemon=True,
                name=f"kvpaged {self.tier.name}",
            )  # fmt: skip
            self._thread.start()
        self._cond.notify_all()

    def wait(self, job: Job, timeout: float | None) -> Any:
        """What a job gives.

        Raises:
            TimeoutError: it did not end in time; it is cancelled.
            BaseException: what the tier raised.
        """
        if not job.wait(timeout) and self._abandon(job):
            self.timeouts += 1
            error = TimeoutError(f"no answer in {timeout or 0:.3g} s")
            self.failed(error, job.kind)
            raise error
        if job.error is not None:
            if not isinstance(job.error, TierDownError):
                self.failed(repr(job.error), job.kind)
            raise job.error
        self.succeeded(job.kind)
        return job.result

    def succeeded(self, kind: str) -> None:
        """A call gave what was asked for."""
        ill = self.health.ill(kind)
        self.health.succeeded(kind)
        if ill and not self.health.ill(kind):
            log.warning("tier %s answers again", self.tier.name)

    def failed(self, why: object, kind: str) -> None:
        """A call failed, or did not return in time."""
        self.health.failed(why, kind)
        row = self.health.row(kind)
        if row == 1:
            log.warning("tier %s: %s", self.tier.name, why)
        if row == FAILURES:
            log.warning("tier %s: no %s for a while: %s", self.tier.name, kind, why)

    def _abandon(self, job: Job) -> bool:
        """Stop waiting for a job; false if it has ended after all."""
        with self._cond:
            if job.wait(0):
                return False
            job.cancelled = True
            for jobs in self._jobs:
                if job in jobs:
                    jobs.remove(job)
            running = job.started
        if not running:
            job.end()
        return True

    def cancel(self, job: Job) -> None:
        """Nobody needs a job any more; no failure of the tier."""
        self._abandon(job)

    def take(self) -> Job | None:
        """The next job, for its thread; the condition is held."""
        self._running = None
        for jobs in self._jobs:
            if jobs:
                self._running = jobs.popleft()
                self._running.started = True
                return self._running
        return None

    @property
    def closed(self) -> bool:
        """Its thread is to end."""
        return self._closed

    def close(self, timeout: float) -> bool:
        """End its thread, and close the tier; false if that did not happen in time (the thread is
        left to itself).
        """
        last = Job(lambda _: self.tier.close(), None, "read")
        with self._cond:
            if self._closed:
                return True
            self._closed = True
            waiting = [job for jobs in self._jobs for job in jobs]
            for jobs in self._jobs:
                jobs.clear()
            parked = self.parked
            if not parked:  # it may rest: that is no reason not to close it, nor to wait for ever
                self._queue(last)
        for job in waiting:
            job.cancelled = True
            job.error = TierDownError(f"tier {self.tier.name} is closed")
            job.end()
        if parked:
            return False
        try:
            self.wait(last, timeout)
        except Exception as error:  # a tier's own: there is nothing left to lose
            log.warning("tier %s did not close: %s", self.tier.name, error)
            return not isinstance(error, TimeoutError)
        return True


def _serve(of: "weakref.ref[TierWorker]", cond: threading.Condition) -> None:
    while True:
        with cond:
            worker = of()
            if worker is None or (worker.closed and not any(worker._jobs)):
                return
            job = worker.take()
            del worker
            if job is None:
                cond.wait(1.0)
                continue
        job.run()
        del job
