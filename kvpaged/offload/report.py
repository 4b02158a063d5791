"""What a cache reports of its tiers."""

from dataclasses import dataclass

from kvpaged.errors import IntegrityError
from kvpaged.offload.mover import Mover, Predictions
from kvpaged.pages.allocator import SEALED


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier.

    Attributes:
        name: its own.
        records, bytes, capacity: by its own count; `None`: it did not answer.
        known_records, known_bytes: by ours: what the directory says without asking.
        demoted, demoted_bytes: pages that went there.
        refused: pages it did not take.
        promoted, promoted_bytes: pages that came from there.
        missed: pages it was asked for that were not there, or not as they were sealed.
        failures, timeouts: calls that raised, and that did not return in time.
        up: it is asked for pages now; false while it rests after failures, or does not return.
        takes: it is given pages now; false, too, while it rests after failures to write.
        parked: its thread is in a call that nobody waits for any more.
        load_bytes_per_s: what loading from it has given, reading, copying and verifying together;
            `None`: nothing was loaded.
    """

    name: str
    records: int | None
    bytes: int | None
    capacity: int | None
    known_records: int
    known_bytes: int
    demoted: int
    demoted_bytes: int
    refused: int
    promoted: int
    promoted_bytes: int
    missed: int
    failures: int
    timeouts: int
    up: bool
    takes: bool
    parked: bool
    load_bytes_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadStats:
    """The tiers of a cache, and what became of its pages. Pages are counted in each layer group.

    Attributes:
        tiers: from the fastest down.
        sealed: pages that were filled; `loaded`: that came from tiers and were so begun;
            `rejoined`: of those, the ones that came back before a tier had them.
        resident: full pages in the pool.
        reopened: took tokens again after a rewind.
        demoted: left the pool, and a tier had their bytes.
        dropped: left it, and none had; also what was nobody else's to find, and what a load had
            begun and did not bring.
        pending: left it, and are being written.
        waiting: pages that are to go down.
        lag_s, longest_lag_s: see `demoter.DemotionCounts`; `oldest_s`: how long the page that waits
            longest for a write-through tier has waited, `None` if none does; not counting what is
            being put at the moment.
        promotions_failed: ended before all pages had come.
        declined: pages that a tier had and that were computed instead, being quicker.
        load_predictions: what loads took over what was expected; `compute_predictions`: the same of
            passes over prompts.
        compute_tokens_per_s: of those passes.
        staging: bytes of host memory that pages go through, and how many are in use.
    """

    tiers: tuple[TierStats, ...]
    sealed: int
    loaded: int
    rejoined: int
    resident: int
    reopened: int
    demoted: int
    dropped: int
    pending: int
    waiting: int
    lag_s: float
    longest_lag_s: float
    oldest_s: float | None
    promotions_failed: int
    declined: int
    load_predictions: Predictions
    compute_predictions: Predictions
    compute_tokens_per_s: float | None
    staging: tuple[int, int]

    def check(self) -> None:
        """Raise `IntegrityError` unless what was sealed is somewhere."""
        begun = self.sealed + self.loaded
        ended = self.resident + self.reopened + self.demoted + self.dropped + self.pending
        if begun != ended:
            raise IntegrityError(
                f"{self.sealed} pages were sealed and {self.loaded} loaded; {self.resident} are in "
                f"the pool, {self.reopened} were reopened, {self.demoted} demoted, {self.dropped} "
                f"dropped, {self.pending} are being written: {ended}"
            )


def report(mover: Mover, sealed: int) -> OffloadStats:
    """The figures of a mover; the cache's lock is held.

    Args:
        mover: whose.
        sealed: see `OffloadStats`.
    """
    resident = reopened = lost = 0
    for page_class in mover.pool.classes:
        allocator = page_class.allocator
        resident += int((allocator.states >= SEALED).sum())
        reopened += allocator.reopened
        lost += allocator.lost
    counts, stack = mover.demoter.counts, mover.stack
    with stack.lock:
        stack.directory.settle()
        tiers = tuple(_tier(mover, number) for number in range(len(stack.levels)))
    return OffloadStats(
        tiers=tiers, sealed=sealed, loaded=mover.begun,
        rejoined=stack.flows[-1].promoted, resident=resident, reopened=reopened,
        demoted=counts.demoted, dropped=counts.dropped + lost, pending=counts.pending,
        waiting=mover.demoter.waiting, lag_s=counts.lag_s, longest_lag_s=counts.longest_lag_s,
        oldest_s=mover.demoter.oldest(), promotions_failed=mover.load_failures,
        declined=mover.search.declined,
        load_predictions=Predictions(tuple(mover.load_errors.counts)),
        compute_predictions=Predictions(tuple(mover.compute_errors.counts)),
        compute_tokens_per_s=mover.compute.rate(),
        staging=(mover.staging.size, mover.staging.used),
    )  # fmt: skip


def _tier(mover: Mover, number: int) -> TierStats:
    stack = mover.stack
    tier, worker, flow = stack.tiers[number], stack.workers[number], stack.flows[number]
    try:
        records, size, capacity = tier.usage()
    except Exception:  # a tier's own: its count is not known
        records = size = capacity = None  # type: ignore[assignment]
    return TierStats(
        name=tier.name, records=records, bytes=size, capacity=capacity,
        known_records=len(stack.directory.held[number]), known_bytes=stack.directory.bytes[number],
        demoted=flow.demoted, demoted_bytes=flow.demoted_bytes, refused=flow.refused,
        promoted=flow.promoted, promoted_bytes=flow.promoted_bytes, missed=flow.missed,
        failures=worker.health.failures, timeouts=worker.timeouts, up=worker.up,
        takes=worker.takes, parked=worker.parked,
        load_bytes_per_s=stack.loads[number].rate(),
    )  # fmt: skip
