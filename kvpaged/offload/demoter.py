"""Demotion: pages go down to the tiers."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvpaged.offload.levels import Levels
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.policy import pressing
from kvpaged.offload.pool import PoolView
from kvpaged.offload.stack import Stack
from kvpaged.offload.staging import Staging
from kvpaged.pages.trail import Node
from kvpaged.tiers.base import Demotion, Record
from kvpaged.tiers.record import Head, record_key

LOOKED_AT = 256
"""Pages looked at in one go, of those that wait to be evicted."""


class Due(NamedTuple):
    """A page that is to go to some tiers."""

    node: Node
    group: int
    page: int
    since: float
    targets: tuple[int, ...]


class _Rescued(NamedTuple):
    """A page that has left the pool, in staging."""

    record: Record
    targets: tuple[int, ...]
    give_back: Callable[[], None]
    counts: bool
    since: float


@dataclass(slots=True)
class DemotionCounts:
    """What became of pages that left the pool.

    Attributes:
        demoted: a tier had their bytes.
        dropped: none had.
        pending: being written.
        lag_s, longest_lag_s: from a page's entry in the prefix index until a write-through tier
            had it: of the latest, and of all. Where the tier did not take it at first, from when it
            began to lack pages; of a page that left the pool before, from then.
    """

    demoted: int = 0
    dropped: int = 0
    pending: int = 0
    lag_s: float = 0.0
    longest_lag_s: float = 0.0


class Demoter:
    """Chooses pages, copies them out under leases, puts them to tiers.

    `note_entered`, `note_used` and `note_leaving` come with the cache's lock held; `run` from the
    mover's thread alone.
    """

    def __init__(
        self, pool: PoolView, stack: Stack, staging: Staging, options: OffloadOptions,
        wake: Callable[[], None],
    ) -> None:  # fmt: skip
        self._pool, self._stack, self._staging, self._options = pool, stack, staging, options
        self._levels = Levels(stack, staging, options)
        self._wake = wake
        self._fresh: deque[tuple[Node, int, int, float]] = deque()
        self._again: deque[tuple[Node, int, int, float]] = deque()  # used a second time
        self._swept: deque[tuple[Node, int, int, float]] = deque()  # for the tiers of `_sweep_to`
        self._sweep_to: set[int] = set()
        self._parting: deque[tuple[Node, int, int, float]] = deque()  # for the first tier
        self._ahead: deque[list[bytes]] = deque()  # keys that are soon asked for
        self._rescued: deque[_Rescued] = deque()
        self._busy = 0
        self._pressed: list[dict[int, Node]] = [{} for _ in pool.classes]
        """Of each group, pages that wait to be evicted and were offered to the first tier."""
        self.counts = DemotionCounts()

    def _with(self, policy: Demotion) -> list[int]:
        return [n for n, tier in enumerate(self._stack.levels) if tier.policy == policy]

    # -- what happens in the pool ------------------------------------------------------------------

    def note_entered(self, node: Node, group: int, page: int) -> None:
        """A page has entered the prefix index."""
        if self._with("write-through"):
            self._fresh.append((node, group, page, time.monotonic()))
            self._wake()

    def note_used(self, nodes: list[Node]) -> None:
        """A sequence begins with these pages."""
        if not self._with("second-use"):
            return
        now = time.monotonic()
        for node in nodes:
            for group, page in enumerate(node.pages):
                if page is not None:
                    self._again.append((node, group, page, now))
        self._wake()

    def note_parting(self, node: Node) -> None:
        """Nobody holds this page and those before it any more, and somebody will come back."""
        now = time.monotonic()
        while node.tokens and any(page is not None for page in node.pages):
            for group, page in enumerate(node.pages):
                if page is not None:
                    self._parting.append((node, group, page, now))
            if node.parent is None:
                break
            node = node.parent
        self._wake()

    def note_ahead(self, keys: list[bytes]) -> None:
        """Records that will soon be asked for: they come up to the first tier."""
        if keys:
            self._ahead.append(keys)
            self._wake()

    def note_leaving(self, node: Node, group: int, page: int) -> None:
        """A page nobody holds is about to be evicted: its bytes are there for the last time."""
        self._wake()
        key = record_key(node.key, group)
        with self._stack.lock:
            self._stack.settle()
            below = self._stack.below(key)
        rescued = False
        targets = self._last_chance(key) if self._pool.immediate[group] else ()
        if targets:
            rescued = self._rescue(node, group, page, targets, counts=not below)
        if below:
            self.counts.demoted += 1
        elif not rescued:
            self.counts.dropped += 1

    def _last_chance(self, key: bytes) -> tuple[int, ...]:
        """The tiers that a page which leaves the pool should be in, and is not."""
        return tuple(
            number
            for number, tier in enumerate(self._stack.levels)
            if (tier.policy == "write-through" or (not number and tier.policy == "write-back"))
            and key not in self._stack.directory.held[number]
            and self._stack.workers[number].takes
        )

    def _rescue(
        self, node: Node, group: int, page: int, targets: tuple[int, ...], *, counts: bool
    ) -> bool:
        """Copy a page into staging for some tiers, now, if there is room; `counts`: none has it."""
        taken = self._staging.take(1, self._pool.body_bytes(group, node.depth - 1))
        if taken is None:
            return False
        room, give_back = taken
        try:
            ticket = self._pool.copies[group].out(np.array([page], np.int32), room)
            ticket.wait()
            record = self._record(node, group, ticket.sums()[0], room[0])
        except BaseException:
            give_back()
            raise
        self.counts.pending += counts
        end = self._stack.leaves(record, give_back)
        self._rescued.append(_Rescued(record, targets, end, counts, time.monotonic()))
        return True

    def _record(self, node: Node, group: int, sums: np.ndarray, body: Tensor) -> Record:
        before = node.parent
        assert before is not None
        return Head.of(
            self._pool.geometry(group, node.depth - 1), group=group, depth=node.depth,
            key=node.key, before=before.key, tokens=node.tokens, sums=sums,
        ).record(body)  # fmt: skip

    # -- the mover's thread ------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Pages that are to go down and have not."""
        pages = len(self._fresh) + len(self._again) + len(self._swept) + len(self._parting)
        return pages + len(self._rescued) + self._busy

    def behind(self, *, down: bool) -> bool:
        """Whether a write-through tier lacks pages it should have; also one that is not asked now,
        if `down`.
        """
        stack = self._stack
        return any(
            n in stack.incomplete and (down or stack.workers[n].takes)
            for n in self._with("write-through")
        )

    def oldest(self) -> float | None:
        """How long the page that has waited longest for a write-through tier has waited, in
        seconds: for one that is not asked now, too; not counting what is being put. The cache's
        lock is held.
        """
        since = [queue[0][3] for queue in (self._fresh, self._swept) if queue]
        with suppress(IndexError):  # its thread takes them without the lock
            since.append(self._rescued[0].since)
        with self._stack.lock:
            lacking = dict(self._stack.incomplete)
        since += [lacking[n] for n in self._with("write-through") if n in lacking]
        return time.monotonic() - min(since) if since else None

    def run(self) -> bool:
        """Move some; whether there was anything."""
        self._stack.settle()
        spilled = self._levels.spill()  # before more is put: what is put costs a full tier as much
        if self._rescued:
            self._put_rescued()
            return True
        if self._ahead:
            self._levels.bring_up(self._ahead.popleft())
            return True
        due = self._choose()
        if due:
            self._busy = len(due)
            try:
                self._demote(due)
            finally:
                self._busy = 0
            return True
        return spilled

    def sweep(self, tiers: list[int], since: float) -> None:
        """Note every page of the index that one of some tiers lacks, to go there; `since` when."""
        with self._pool.lock, self._stack.lock:
            self._sweep_to.update(tiers)
            held = [self._stack.directory.held[n] for n in tiers]
            for node in self._pool.index.nodes():
                for group, page in enumerate(node.pages):
                    key = record_key(node.key, group)
                    if page is not None and any(key not in keys for keys in held):
                        self._swept.append((node, group, page, since))
        self._wake()

    def _choose(self) -> list[Due]:
        for number in self._with("write-through"):
            if self._stack.workers[number].takes:
                since = self._stack.made_good(number)
                if since is not None:
                    self.sweep([number], since)
        with self._pool.lock, self._stack.lock:
            if not self._swept:
                self._sweep_to.clear()
            due: list[Due] = []
            size = 0
            for queue, targets in (
                (self._fresh, self._with("write-through")),
                (self._again, self._with("second-use")),
                (self._swept, sorted(self._sweep_to)),
                (self._parting, [0]),
            ):
                while queue and size < self._options.call_bytes:
                    node, group, page, since = queue.popleft()
                    if self._take(due, node, group, page, since, targets):
                        size += self._pool.body_bytes(group, node.depth - 1)
            if size < self._options.call_bytes and self._stack.tiers[0].policy == "write-back":
                self._press(due, size)
        return due

    def _take(
        self, due: list[Due], node: Node, group: int, page: int, since: float, targets: list[int]
    ) -> bool:
        """Note a page for the tiers that lack it."""
        if node.pages[group] != page or not node.attached:
            return False
        key = record_key(node.key, group)
        lacking = []
        for number in targets:
            if key in self._stack.directory.held[number]:
                continue
            if self._stack.workers[number].takes:
                lacking.append(number)
            else:
                self._stack.lacks(number, since)
        if lacking:
            due.append(Due(node, group, page, since, tuple(lacking)))
        return bool(lacking)

    def _press(self, due: list[Due], size: int) -> None:
        """Note pages that will be evicted first and are not in the first tier, each once: what it
        refuses or gives up again would come for ever.
        """
        if not self._stack.workers[0].takes:
            return
        again = self._stack.made_good(0) is not None
        index, now = self._pool.index, time.monotonic()
        for group, page_class in enumerate(self._pool.classes):
            allocator = page_class.allocator
            many = pressing(page_class.room_units(), page_class.units())
            known, seen = {} if again else self._pressed[group], {}
            for page in allocator.oldest_cached(min(many, LOOKED_AT)):
                node = index.node_of(group, page)
                if node is None:
                    continue
                if known.get(page) is not node:
                    if size >= self._options.call_bytes:
                        break
                    if self._take(due, node, group, page, now, [0]):
                        size += self._pool.body_bytes(group, node.depth - 1)
                seen[page] = node
            self._pressed[group] = seen

    def _demote(self, due: list[Due]) -> None:
        """Copy pages out and put them, those of a group, of one size and of the same tiers
        together.
        """
        kinds: dict[tuple[int, int, tuple[int, ...]], list[Due]] = {}
        for one in due:
            size = self._pool.body_bytes(one.group, one.node.depth - 1)
            kinds.setdefault((one.group, size, one.targets), []).append(one)
        for (group, size, targets), some in kinds.items():
            most = max(1, self._staging.size // 2 // size)
            for start in range(0, len(some), most):
                self._demote_some(group, size, targets, some[start : start + most])

    def _demote_some(self, group: int, size: int, targets: tuple[int, ...], due: list[Due]) -> None:
        room = self._staging.take(len(due), size, self._options.write_deadline_s)
        if room is None:  # whoever has it all does not answer: these are tried again
            for number in targets:
                self._stack.lacks(number, min(one.since for one in due))
            return
        bodies, give_back = room
        allocator = self._pool.classes[group].allocator
        with self._pool.lock:
            due = [one for one in due if one.node.pages[group] == one.page]
            ids = np.array([one.page for one in due], np.int32)
            lease = allocator.lease(ids)
        try:
            ticket = self._pool.copies[group].out(ids, bodies[: len(ids)])
            ticket.wait()
            sums = ticket.sums()
        except BaseException:
            give_back()
            raise
        finally:
            with self._pool.lock:
                allocator.end_lease(lease)
        records = [self._record(one.node, group, sums[n], bodies[n]) for n, one in enumerate(due)]
        since = min((one.since for one in due), default=time.monotonic())
        self._note_lag(self._stack.put_to(targets, records, give_back, since), since)

    def _note_lag(self, kept: list[int], since: float) -> None:
        """Tiers have pages, the first of which was to be there `since`."""
        if any(self._stack.tiers[number].policy == "write-through" for number in kept):
            lag = self.counts.lag_s = time.monotonic() - since
            self.counts.longest_lag_s = max(lag, self.counts.longest_lag_s)

    def _put_rescued(self) -> None:
        """Put pages that were copied out as they left."""
        targets = self._rescued[0].targets
        some: list[_Rescued] = []
        size = 0
        while self._rescued and self._rescued[0].targets == targets:
            size += self._rescued[0].record.body.numel()
            if some and size > self._options.call_bytes:
                break
            some.append(self._rescued.popleft())
        counted = sum(one.counts for one in some)

        def give_back() -> None:
            for one in some:
                one.give_back()

        self._busy = len(some)
        try:
            records, since = [one.record for one in some], min(one.since for one in some)
            self._note_lag(self._stack.put_to(targets, records, give_back, since), since)
        finally:
            self._busy = 0
        with self._pool.lock, self._stack.lock:
            kept = sum(one.counts and self._stack.below(one.record.key) for one in some)
            self.counts.pending -= counted
            self.counts.demoted += kept
            self.counts.dropped += counted - kept
