"""The tiers of a cache, their threads, and what is known of them."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvpaged.errors import ConfigError
from kvpaged.offload.directory import Directory
from kvpaged.offload.leaving import Leaving
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.policy import Line
from kvpaged.offload.staging import Countdown
from kvpaged.offload.worker import Job, TierWorker
from kvpaged.tiers.base import DEMOTIONS, Record, Stored, Tier, TierDownError

log = logging.getLogger("kvpaged.offload")


@dataclass(slots=True)
class Flow:
    """What went to and from a tier: records, and bytes of their bodies."""

    demoted: int = 0
    demoted_bytes: int = 0
    refused: int = 0
    promoted: int = 0
    promoted_bytes: int = 0
    missed: int = 0


class Stack:
    """Tiers from the fastest down, asked through a thread each, with what each holds.

    Any thread may call; `lock` guards the directory and the figures, and is never held in a call
    of a tier. Where the cache's lock is held too, that was taken first.
    """

    def __init__(self, tiers: Sequence[Tier], options: OffloadOptions) -> None:
        for tier in tiers:
            if not isinstance(tier, Tier):
                raise ConfigError(f"a tier is a kvpaged.tiers.Tier, not {type(tier).__name__}")
            if tier.policy not in DEMOTIONS:
                raise ConfigError(
                    f"tier {tier.name}: policy is one of {DEMOTIONS}, not {tier.policy!r}"
                )
        self.levels = tuple(tiers)
        """What was given, from the fastest down."""
        self.leaving = Leaving()
        self.tiers = (*self.levels, self.leaving)
        """Those, and after them what is on its way there."""
        self.options = options
        self.lock = threading.RLock()
        self.directory = Directory(self.tiers)
        self.flows = [Flow() for _ in self.tiers]
        self.loads = [Line() for _ in self.tiers]
        self.loads[-1].add(1 << 30, 1.0)  # staging is memory: nothing is to be found out
        self.workers = [TierWorker(tier) for tier in self.tiers]
        self.incomplete: dict[int, float] = {}
        """Since when a tier may lack pages it should have: a call failed, or was not made."""
        self.wrong: list[set[bytes]] = [set() for _ in self.tiers]
        """Of each tier, what was not as it was sealed and could not be deleted."""
        for number in range(len(tiers)):
            self._scan(number)

    def _scan(self, number: int) -> None:
        def work(_: Job) -> None:
            found: list[Stored] = list(self.tiers[number].scan())
            with self.lock:
                for one in found:
                    self.directory.add(number, one.key, one.head_bytes + one.body_bytes)

        worker = self.workers[number]
        try:
            worker.wait(worker.submit(work, "read"), self.options.open_deadline_s)
        except Exception as error:  # the cache works without it
            log.warning("tier %s does not say what it holds: %r", worker.tier.name, error)

    # -- asking ------------------------------------------------------------------------------------

    def up(self) -> list[bool]:
        """Of each tier, whether it may be asked now."""
        return [worker.up for worker in self.workers]

    def where(self, key: bytes, allowed: Sequence[bool]) -> tuple[int, int] | None:
        """The first tier, of those allowed, that has a key, and the bytes it takes there; the lock
        is held.
        """
        number = self.directory.where(key, allowed)
        return None if number is None else (number, self.directory.held[number][key])

    def levels_up(self) -> list[bool]:
        """See `up`; what is on its way is not to be asked."""
        return [*self.up()[: len(self.levels)], False]

    def below(self, key: bytes) -> bool:
        """Whether some level has a key; the lock is held."""
        return self.directory.where(key, [*[True] * len(self.levels), False]) is not None

    def leaves(self, record: Record, give_back: Callable[[], None]) -> Callable[[], None]:
        """Have a record be found that is on its way; what says that it is no more, which lets its
        memory go by `give_back`.
        """
        end = self.leaving.note(record, give_back)
        with self.lock:
            number = len(self.levels)
            self.directory.settle()
            self.directory.add(number, record.key, len(record.head) + record.body.numel())
        return end

    def lacks(self, number: int, since: float | None = None) -> None:
        """Note that a tier may lack pages it should have, and since when (`None`: now)."""
        since = time.monotonic() if since is None else since
        with self.lock:
            self.incomplete[number] = min(self.incomplete.get(number, since), since)

    def made_good(self, number: int) -> float | None:
        """It is to get what it lacks; since when it lacks that."""
        with self.lock:
            return self.incomplete.pop(number, None)

    def settle(self) -> None:
        """Take note of what tiers have given up."""
        with self.lock:
            self.directory.settle()

    def put(
        self, number: int, records: Sequence[Record], undo: Callable[[], None] | None = None,
        since: float | None = None,
    ) -> Job | None:  # fmt: skip
        """Begin to put records to a tier; `None`, after `undo`, if it is not asked now. `since`:
        when they were to be there.
        """

        def work(_: Job) -> int:
            self._mend(number, records)
            kept = self.tiers[number].put(records)
            with self.lock:
                flow = self.flows[number]
                for record, good in zip(records, kept, strict=True):
                    if not good:
                        flow.refused += 1
                        continue
                    size = len(record.head) + record.body.numel()
                    self.directory.add(number, record.key, size)
                    flow.demoted += 1
                    flow.demoted_bytes += record.body.numel()
                self.directory.settle()
            return sum(kept)

        try:
            return self.workers[number].submit(work, "put", undo)
        except TierDownError:
            self.lacks(number, since)
            if undo is not None:
                undo()
            return None

    def _mend(self, number: int, records: Sequence[Record]) -> None:
        """Delete what is wrong of these before they are put: what has a key is kept as it is."""
        with self.lock:
            keys = [record.key for record in records if record.key in self.wrong[number]]
        if keys:
            self.tiers[number].delete(keys)
            with self.lock:
                self.wrong[number].difference_update(keys)

    def finish(self, number: int, job: Job | None, since: float | None = None) -> int | None:
        """How many records a `put` kept; `None`: it failed."""
        if job is None:
            return None
        try:
            kept: int = self.workers[number].wait(job, self.options.write_deadline_s)
            return kept
        except Exception as error:  # whatever a tier raises: the page has not gone there
            self.lacks(number, since)
            log.debug("tier %s: %r", self.tiers[number].name, error)
            return None

    def put_to(
        self, targets: Sequence[int], records: Sequence[Record], give_back: Callable[[], None],
        since: float | None = None,
    ) -> list[int]:  # fmt: skip
        """Put records to some tiers and wait for each; which of the tiers kept them all.

        `give_back` is called once no tier needs their memory any more, however late that is.
        `since`: when the first of them was to be there.
        """
        one_less = Countdown(len(targets), give_back)
        jobs = [(number, self.put(number, records, one_less, since)) for number in targets]
        kept = [(number, self.finish(number, job, since)) for number, job in jobs]
        return [number for number, count in kept if count == len(records)]

    def call(
        self, number: int, work: Callable[[Tier], Any], timeout: float,
        undo: Callable[[], None] | None = None, *, kind: str = "read",
    ) -> Any:  # fmt: skip
        """Have a tier do something and wait; `undo` is called when that is over. `kind`: see
        `TierWorker.submit`.

        Raises:
            Exception: what the tier raises, `TimeoutError`, `TierDownError`.
        """
        worker = self.workers[number]
        try:
            job = worker.submit(lambda _: work(self.tiers[number]), kind, undo)
        except TierDownError:
            if undo is not None:
                undo()
            raise
        return worker.wait(job, timeout)

    def close(self) -> None:
        """Close the tiers; one that does not answer is left to itself."""
        for worker in self.workers:
            if not worker.close(self.options.close_s):
                log.warning("tier %s does not answer: left open", worker.tier.name)
