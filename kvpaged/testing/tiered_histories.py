"""Any history of a cache over tiers that fail, hang, lie and recover, beside plain dense arrays."""

import threading
import time
from collections import Counter

from kvpaged.offload.options import OffloadOptions
from kvpaged.testing.histories import RULES, Histories, run_rules
from kvpaged.testing.shapes import Shape
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.base import Demotion, Tier
from kvpaged.tiers.health import Health
from kvpaged.tiers.host import HostTier

FAULTS = (*["none"] * 6, "full", "read-only", "dead", "fails", "flips", "lies", "hangs")
OPTIONS = OffloadOptions(
    staging_bytes=64 << 10, call_bytes=8 << 10, deadline_s=0.02, write_deadline_s=0.02, close_s=1.0,
    linger_s=0.0005,
)  # fmt: skip

TIER_RULES = RULES | {
    "open": (25, RULES["open"][1]),
    "clear": (16, RULES["clear"][1]),
    "fault": (4, {"tier": 1, "kind": len(FAULTS) - 1}),
    "flush": (20, {}),
    "ahead": (3, {"count": 6}),
    "leave": (8, {}),
}
"""More that begins, as `RULES`; and what happens to tiers."""


class TieredHistories(Histories):
    """One history over a stack of two tiers in host memory."""

    def __init__(
        self, shape: Shape, counts: Counter[str] | None = None, *,
        policies: tuple[Demotion, Demotion] = ("write-back", "write-through"), seed: int = 0,
    ) -> None:  # fmt: skip
        sizes = (24 << 10, 256 << 10)
        self.tiers = [
            Faulty(HostTier(size, policy=policy, pin=False), seed=seed)
            for size, policy in zip(sizes, policies, strict=True)
        ]
        self._hangs = [threading.Event() for _ in self.tiers]
        tiers: list[Tier] = [*self.tiers]
        super().__init__(shape, counts, tiers=tiers, offload=OPTIONS)
        assert self.cache.mover is not None
        self.mover = self.cache.mover
        for worker in self.mover.stack.workers:  # a step takes a minute, so rests are short
            worker.health = Health(lambda: 60.0 * self._step)

    def fault(self, *, tier: int, kind: int) -> None:
        """A tier is as `FAULTS` says from now on."""
        of, name = self.tiers[tier], FAULTS[kind]
        self.counts[f"fault: {name}"] += 1
        of.full, of.read_only, of.dead = name == "full", name == "read-only", name == "dead"
        of.fail_rate = 0.3 * (name == "fails")
        of.flip_rate = 0.2 * (name == "flips")
        of.lie_rate = 0.2 * (name == "lies")
        self._hangs[tier].set()
        self._hangs[tier] = threading.Event()
        of.hang = self._hangs[tier] if name == "hangs" else None

    def flush(self) -> None:
        """What is to go down has gone, if it can."""
        self.cache.flush(0.05)

    def clear(self, *, sure: int) -> None:
        """What waits for reuse goes, most often after it could go down."""
        if sure:
            self.flush()
        super().clear(sure=0)

    def leave(self) -> None:
        """Nobody holds anything, and the pool is empty."""
        while self._held:
            self.close(pick=0)
        self.clear(sure=1)

    def ahead(self, *, count: int) -> None:
        """Some records of the lower tier come up."""
        with self.mover.stack.lock:
            keys = list(self.mover.stack.directory.held[1])[-count:]
        self.mover.demoter.note_ahead(keys)

    def end(self) -> None:
        """Tiers are well again: what they hold is what is known of them, and all is let go."""
        for number in range(len(self.tiers)):
            self.fault(tier=number, kind=0)
        for held in self._held:
            held.batch.close()
        self._held.clear()
        for worker in self.mover.stack.workers:
            while worker.parked:
                time.sleep(0.001)
        for _ in range(30):  # a call may be late again, and its tier rest again
            self._step += 10
            if self.cache.flush(1.0):
                break
        else:
            raise AssertionError("it does not recover")
        self.mover.demoter.run()
        self.cache.clear()
        self.cache.check_integrity()
        stats = self.cache.stats().offload
        assert stats is not None
        for tier in stats.tiers:
            self.counts["promoted"] += tier.promoted
            self.counts["missed"] += tier.missed
            self.counts["failures"] += tier.failures
            self.counts["timeouts"] += tier.timeouts
            assert not tier.parked
        for pages in self._pages:
            for allocator in pages.allocators():
                assert not allocator._leases
                assert allocator.used_pages() == 0
        self.cache.close()
        assert self.mover.staging.used == 0


def drive_tiers(
    shape: Shape, steps: int, seed: int, counts: Counter[str] | None = None, *,
    policies: tuple[Demotion, Demotion] = ("write-back", "write-through"),
) -> None:  # fmt: skip
    """A random history of so many steps, and its end."""
    history = TieredHistories(shape, counts, policies=policies, seed=seed)
    try:
        run_rules(history, TIER_RULES, steps, seed, f"{shape}, {policies}")
        history.end()
    finally:
        for tier, hang in zip(history.tiers, history._hangs, strict=True):
            tier.hang = None
            hang.set()
