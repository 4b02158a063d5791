"""Promotion: pages of one sequence come up from the tiers."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpaged.errors import IntegrityError, KVPagedError
from kvpaged.offload.arrivals import Bundle, Rooms, Wanted, bundles
from kvpaged.offload.copies import InTicket
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.policy import patience
from kvpaged.offload.pool import PoolView
from kvpaged.offload.stack import Stack, log
from kvpaged.offload.staging import Staging
from kvpaged.offload.worker import Job
from kvpaged.pages.allocator import Lease
from kvpaged.pages.mixed import AnyAllocator
from kvpaged.tiers.base import Record, TierDownError
from kvpaged.tiers.record import Head, record_key


class LoadError(KVPagedError):
    """Pages that a pass reads have not come, or not as they were sealed."""


class Outcome(NamedTuple):
    """How a promotion ended.

    Attributes:
        pages: of those asked for, how many from the first on are there, in every group.
        seconds: it took.
        predicted_s: what had been expected; `None`: nothing.
        error: why it ended early, or `None`.
    """

    pages: int
    seconds: float
    predicted_s: float | None
    error: str | None


class Promotion:
    """Records on their way into pages that a row holds, by the threads of the tiers.

    Calls follow one another. What the last one gives is copied layer by layer, so that a pass may
    begin once `ready` says so and wait for each layer (`wait_layer`). Nothing is valid before its
    bytes were summed, as they lie or as they were written. The pages stay leased until nothing is
    copied into them any more; a tier that does not answer copies nothing, so it takes no pages from
    the pool.

    `start`, `ready`, `poll`, `wait` and `wait_layer` come from whoever computes; none holds the
    cache's lock.
    """

    def __init__(
        self, pool: PoolView, stack: Stack, staging: Staging, options: OffloadOptions,
        wanted: Sequence[Wanted], *, predicted_s: float | None,
        compute: Callable[[int], float | None], on_end: Callable[["Promotion"], None],
    ) -> None:  # fmt: skip
        """The cache's lock is held.

        Args:
            wanted: pages, by ascending places; each held by the row they are for.
            predicted_s: what all of it should take.
            compute: what computing so many pages would take, in seconds.
            on_end: told when it is over, on whichever thread.
        """
        self._pool, self._stack, self._staging, self._options = pool, stack, staging, options
        self._compute, self._on_end, self._predicted = compute, on_end, predicted_s
        self._first = wanted[0].place
        self._missing: npt.NDArray[np.int64] = np.zeros(
            wanted[-1].place + 1 - self._first, np.int64
        )
        for one in wanted:
            self._missing[one.place - self._first] += 1
        self._calls = self._cut(wanted)
        self._leaving = ExitStack()  # what is on its way into a tier stays where it was found
        keys = [record_key(p.key, p.group) for p in wanted if p.tier == len(stack.levels)]
        self._leaving.enter_context(stack.leaving.read(keys, ()))
        self._leases: list[tuple[AnyAllocator, Lease]] = []
        for group, page_class in enumerate(pool.classes):
            ids = np.array([one.page for one in wanted if one.group == group], np.int32)
            if len(ids):
                self._leases.append((page_class.allocator, page_class.allocator.lease(ids)))
        self._writing = False  # a call copies into pages; it ends their leases where it is over
        self._cond = threading.Condition()
        self._turn = 0
        self._job: tuple[int, Job] | None = None
        self._tickets: dict[tuple[int, int], list[InTicket]] = {}  # of layers that were begun
        self._landing = False
        self._began = self._moved = time.monotonic()
        self.outcome: Outcome | None = None

    def _cut(self, wanted: Sequence[Wanted]) -> list[list[Wanted]]:
        """Calls: of one tier each, all at once if that should not take long."""
        calls: list[list[Wanted]] = []
        size = most = 0
        for one in wanted:
            if not calls or calls[-1][-1].tier != one.tier or size + one.size > most:
                rest = sum(each.size for each in wanted if each.tier == one.tier)
                expected = self._stack.loads[one.tier].at(rest)
                quick = expected is not None and expected < self._options.deadline_s / 2
                most = self._staging.size // 2 if quick else self._options.call_bytes
                most = min(most, self._staging.size // 2)
                calls.append([])
                size = 0
            calls[-1].append(one)
            size += one.size
        return calls

    # -- for whoever computes ----------------------------------------------------------------------

    def start(self) -> None:
        """Begin."""
        self._began = self._moved = time.monotonic()
        self._submit()

    @property
    def first(self) -> int:
        """The place of the first page asked for: `outcome.pages` counts from there."""
        return self._first

    @property
    def over(self) -> bool:
        """`outcome` says how it ended."""
        return self.outcome is not None

    def ready(self) -> bool:
        """Whether a pass may begin: all is there, or comes layer by layer."""
        self.poll()
        return self.over or self._landing

    def wait(self) -> Outcome:
        """Wait until it is over, as long as its deadline allows."""
        while True:
            with self._cond:
                left = self._left()
                if self.outcome is None and left > 0:
                    self._cond.wait(left)
                if self.outcome is not None:
                    return self.outcome
            self.poll()

    def wait_ready(self, timeout: float) -> None:
        """Wait until `ready`, so long at most, and as long as its deadline allows."""
        with self._cond:
            if not (self.over or self._landing):
                self._cond.wait(max(min(self._left(), timeout), 0.0))
        self.poll()

    def poll(self) -> None:
        """Give it up if it is late."""
        if self.outcome is None and self._left() <= 0:
            self.cancel(f"no progress in {self._options.deadline_s:g} s")

    def wait_layer(self, group: int, place: int) -> None:
        """Have what the caller does next come after a layer has landed.

        Raises:
            LoadError: it has not come, or not as it was sealed.
        """
        with self._cond:
            while (group, place) not in self._tickets and self.outcome is None:
                if not self._cond.wait(max(self._left(), 0.0)) and self._left() <= 0:
                    break
            tickets = self._tickets.get((group, place))
            outcome = self.outcome
        if outcome is not None and outcome.error is None:
            return
        if outcome is not None or tickets is None:
            self.poll()
            raise LoadError(f"pages were not loaded: {outcome.error if outcome else 'too late'}")
        for ticket in tickets:
            ticket.order()

    def cancel(self, why: str) -> None:
        """Nobody waits for it any more, or it takes too long."""
        with self._cond:
            job, writing = self._job, self._writing
            if self.outcome is not None:
                return
            self._end(why)
        if not writing:
            self._end_leases()
        if job is not None:
            number, one = job
            worker = self._stack.workers[number]
            if why and one.started:  # else it is of the call before it
                worker.timeouts += 1
                worker.failed(why, "read")
            worker.cancel(one)

    def _left(self) -> float:
        """Seconds that it still has."""
        now, arrived = time.monotonic(), self._arrived()
        saved = (self._compute(arrived) or 0.0) if arrived else 0.0
        total = patience(self._options.deadline_s, now - self._began, saved)
        return min(total, self._options.deadline_s - (now - self._moved))

    def _arrived(self) -> int:
        """Pages from the first on that are there."""
        missing = np.flatnonzero(self._missing)
        return int(missing[0]) if len(missing) else len(self._missing)

    def _end(self, error: str | None) -> None:
        """It is over; the condition is held."""
        if self.outcome is not None:
            return
        seconds = time.monotonic() - self._began
        self.outcome = Outcome(self._arrived(), seconds, self._predicted, error)
        self._cond.notify_all()
        self._on_end(self)

    def _end_leases(self) -> None:
        """Nothing is copied into the pages any more. The condition is not held: the cache's lock
        comes before it.
        """
        with self._cond:
            leaving, self._leaving = self._leaving, ExitStack()
        leaving.close()
        with self._pool.lock:
            leases, self._leases = self._leases, []
            for allocator, lease in leases:
                allocator.end_lease(lease)

    def _finish(self, error: str | None) -> None:
        """End it, leases first: whoever waits may want the pages at once."""
        self._end_leases()
        with self._cond:
            self._end(error)

    # -- the tiers' threads ------------------------------------------------------------------------

    def _submit(self) -> None:
        """Make the next call, or end."""
        error: str | None = None
        with self._cond:
            if self.outcome is not None:
                return
            if self._turn < len(self._calls):
                call = self._calls[self._turn]
                number = call[0].tier
                try:
                    job = self._stack.workers[number].submit(lambda _: self._run(call), "read")
                except TierDownError as down:
                    error = str(down)
                else:
                    self._turn += 1
                    self._job = (number, job)
                    return
        self._finish(error)

    def _run(self, call: list[Wanted]) -> None:
        """A call of a tier, and what it gave into pages."""
        number, start = call[0].tier, time.monotonic()
        tier, worker = self._stack.tiers[number], self._stack.workers[number]
        rooms = Rooms(
            self._staging, [self._pool.body_bytes(one.group, one.place) for one in call],
            self._options.deadline_s / 2,  # else it would be late for want of room, and blamed
        )  # fmt: skip
        good, error = 0, None
        try:
            with tier.read([record_key(one.key, one.group) for one in call], rooms) as found:
                good = self._usable(number, call, found)
                if good and self._begin_writing():
                    bad = self._land(call[:good], found, last=call is self._calls[-1])
                    self._forget(number, [record_key(call[n].key, call[n].group) for n in bad])
                    good = min(bad, default=good)
            if not self.over:  # else it was too slow: an answer that nobody awaits is no success
                worker.succeeded("read")
        except Exception as failure:  # whatever a tier raises: what has not come is computed
            good, error = 0, f"tier {tier.name}: {failure!r}"
            if not (self.over or rooms.short or isinstance(failure, TierDownError)):
                worker.failed(repr(failure), "read")
        finally:
            rooms.give_back()
        self._note(number, call, good, time.monotonic() - start, failed=error is not None)
        if good < len(call) or self.over:
            self._finish(error or f"tier {tier.name} has lost a page, or its bytes")
        else:
            self._submit()

    def _begin_writing(self) -> bool:
        """Whether there is still somebody to copy pages for; leases last until `_note`."""
        with self._cond:
            self._writing = self.outcome is None
            return self._writing

    def _note(
        self, number: int, call: list[Wanted], good: int, seconds: float, *, failed: bool
    ) -> None:
        """A call has ended, with so many of its pages, from the first on, in their places."""
        with self._cond:
            self._writing, self._moved = False, time.monotonic()
            if self.outcome is not None:  # they may not be all there, and nobody asks
                return
            for one in call[:good]:
                self._missing[one.place - self._first] -= 1
        size = sum(one.size for one in call[:good])
        with self._stack.lock:
            flow = self._stack.flows[number]
            flow.promoted += good
            flow.promoted_bytes += size
            flow.missed += 0 if failed else len(call) - good
            for one in call[:good]:
                self._stack.directory.touch(number, record_key(one.key, one.group))
            if good == len(call):
                self._stack.loads[number].add(size, seconds)

    def _usable(self, number: int, call: list[Wanted], found: list[Record | None]) -> int:
        """How many of a call's records, from the first on, are what was asked for; the tier forgets
        the first that is not.
        """
        for place, (one, record) in enumerate(zip(call, found, strict=True)):
            key = record_key(one.key, one.group)
            if record is None:
                with self._stack.lock:
                    self._stack.directory.remove(number, [key])
                return place
            try:
                geometry = self._pool.geometry(one.group, one.place)
                head = Head.decode(record.head)
                head.check(one.key, one.group, one.tokens, geometry, record.body.numel())
            except IntegrityError as error:
                log.warning("tier %s, %s: %s", self._stack.tiers[number].name, key.hex(), error)
                self._forget(number, [key])
                return place
        return len(call)

    def _forget(self, number: int, keys: list[bytes]) -> None:
        """Have a tier delete records that are wrong; on its own thread. One that can't is not taken
        to have them, whatever it says.
        """
        if not keys:
            return
        with self._stack.lock:
            self._stack.directory.remove(number, keys)
        self._stack.lacks(number)  # it may be put again from the pool
        try:
            self._stack.tiers[number].delete(keys)
        except Exception as error:  # a tier's own: it can be read, and not written
            with self._stack.lock:
                self._stack.wrong[number].update(keys)
            self._stack.workers[number].failed(repr(error), "delete")

    def _land(self, call: list[Wanted], found: list[Record | None], *, last: bool) -> list[int]:
        """Copy records into pages; returns the places within the call of those that are wrong. No
        copy is under way when this returns or raises.
        """
        groups = range(len(self._pool.classes))
        stacks = [one for group in groups for one in bundles(group, call, found)]
        begun: list[tuple[Bundle, InTicket]] = []
        try:
            if last:
                self._land_layers(stacks, begun)
            else:
                for stack in stacks:
                    whole = slice(0, self._pool.classes[stack.group].geometry.layers)
                    begun.append((stack, self._into(stack, whole)))
        finally:
            for _, ticket in begun:
                ticket.wait()
        wrong: set[tuple[int, int]] = set()
        for stack, ticket in begun:
            wrong.update((stack.group, page) for page in stack.ids[ticket.wrong()].tolist())
        return [n for n, one in enumerate(call) if (one.group, one.page) in wrong]

    def _into(self, stack: Bundle, layers: slice) -> InTicket:
        copies = self._pool.copies[stack.group]
        return copies.into(stack.ids, stack.bodies, stack.sums, layers)

    def _land_layers(self, stacks: list[Bundle], begun: list[tuple[Bundle, InTicket]]) -> None:
        """Copy layer by layer, and say so, until one is found to be wrong: the rest is for the
        pages before it.
        """
        wrong = False
        for block in self._pool.blocks:
            if self.over:
                return
            for group, layers in block:
                tickets = [self._into(stack, layers) for stack in stacks if stack.group == group]
                begun += zip((s for s in stacks if s.group == group), tickets, strict=True)
                if self._pool.immediate[group]:
                    wrong = wrong or any(ticket.wrong().any() for ticket in tickets)
                if not wrong:
                    with self._cond:
                        self._landing = True
                        self._moved = time.monotonic()
                        for place in range(layers.start, layers.stop):
                            self._tickets[group, place] = tickets
                        self._cond.notify_all()
