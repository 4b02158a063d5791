"""Random requests through all doors at once, over tiers that fail, hang, lie and recover.

What `test_soak` asks and checks, every token against the recomputed truth, of a cache whose levels
below the pool are host memory and a disk; it is closed and opened again over the same folder every
few rounds. `make soak` runs it for an hour, or twice as long as `KVPAGED_SOAK_MINUTES` says.
"""

import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvpaged import DiskTier, Generator, HostTier, OffloadOptions, PagedKVCache
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.base import DEMOTIONS
from kvpaged.tiers.health import Health
from tests.generate.known import LETTERS, Known, prompts_of
from tests.generate.test_soak import MINUTES, MODELS, Round, one_round, resident, told
from tests.offload.tiered import until

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = OffloadOptions(
    staging_bytes=128 << 10, call_bytes=16 << 10, deadline_s=0.05, write_deadline_s=0.05,
    close_s=5.0, linger_s=0.001,
)  # fmt: skip
FAULTS = ("none", "none", "none", "fails", "flips", "lies", "full", "read-only", "dead", "hangs")
HAPPENED = (
    "promoted", "demoted", "missed", "failures", "timeouts", "prefix hits", "preemptions",
    *(f"fault: {fault}" for fault in FAULTS),
)  # fmt: skip


class Levels:
    """A cache over two tiers that something is done to, and what became of its pages."""

    def __init__(self, model: Any, memory: str, folder: Path, rng: random.Random) -> None:
        self.rng = rng
        self.tiers = [
            Faulty(HostTier("192KiB", policy=rng.choice(DEMOTIONS), pin=False), seed=1),
            Faulty(DiskTier(folder, "4MiB", policy=rng.choice(DEMOTIONS)), seed=2),
        ]
        self.cache = PagedKVCache.for_model(
            model, memory, page_size=16, tiers=[*self.tiers], offload=OPTIONS
        )
        mover = self.cache.mover
        assert mover is not None
        for worker in mover.stack.workers:  # a second is a minute, or they would rest all the time
            worker.health = Health(lambda: 60 * time.monotonic())
        # To compute so small a model may be quicker than to load, and what is not measured is
        # loaded.
        mover.note_pass = lambda tokens, seconds: None  # type: ignore[method-assign]
        self.mover = mover

    def fault(self, tier: Faulty, name: str) -> None:
        """A tier is so from now on."""
        tier.full, tier.read_only, tier.dead = name == "full", name == "read-only", name == "dead"
        tier.fail_rate = 0.3 * (name == "fails")
        tier.flip_rate, tier.lie_rate = 0.2 * (name == "flips"), 0.2 * (name == "lies")
        hang, tier.hang = tier.hang, threading.Event() if name == "hangs" else None
        if hang is not None:
            hang.set()

    def disturb(self, stop: threading.Event, counts: Counter[str]) -> None:
        """Something happens to a tier every now and then."""
        while not stop.wait(self.rng.uniform(0.0, 0.2)):
            name = self.rng.choice(FAULTS)
            counts[f"fault: {name}"] += 1
            self.fault(self.rng.choice(self.tiers), name)

    def mend(self) -> None:
        for tier in self.tiers:
            self.fault(tier, "none")

    def end(self, counts: Counter[str]) -> None:
        """It recovers by itself, the books agree, and it closes."""
        self.mend()
        assert self.cache.flush(60), "a tier does not recover"
        self.cache.clear()
        assert self.cache.flush(60)
        until(lambda: not any(worker.parked for worker in self.mover.stack.workers))
        self.cache.check_integrity()
        stats = self.cache.stats().offload
        assert stats is not None
        for tier in stats.tiers:
            counts["promoted"] += tier.promoted
            counts["missed"] += tier.missed
            counts["failures"] += tier.failures
            counts["timeouts"] += tier.timeouts
        counts["demoted"] += stats.demoted
        counts["dropped"] += stats.dropped
        counts["loads that failed"] += stats.promotions_failed
        counts["rejoined"] += stats.rejoined
        self.cache.close()
        assert self.mover.staging.used == 0


def soak(
    name: str, seconds: float, folder: Path, *, prompts: int, new: int, round_s: float
) -> str:  # fmt: skip
    """Rounds until the time is over; returns what came of them."""
    make, memory = MODELS[name]
    model = make()
    known = Known(model, prompts_of(prompts, 0, 80), new)
    counts: Counter[str] = Counter()
    rng = random.Random(0)
    began, warm = time.monotonic(), None
    pool_tokens: int | None = None
    while True:
        spent = time.monotonic() - began
        everything = all(counts[what] for what in HAPPENED) or counts["lives"] > 50
        if spent >= seconds and everything and warm is not None:
            break
        if warm is None and spent > seconds / 4:
            warm = resident()
        levels = Levels(model, memory, folder, rng)
        groups = levels.cache.stats().groups
        if any(group.window is None for group in groups):
            pool_tokens = 16 * max(group.pages for group in groups)
        for _ in range(rng.randint(1, 4)):
            generator = Generator(
                model, levels.cache, max_running=rng.choice([3, 6, 12]),
                chunk=rng.choice([None, 7, 32]), tokenizer=LETTERS,
            )  # fmt: skip
            stop = threading.Event()
            disturbing = threading.Thread(target=levels.disturb, args=(stop, counts))
            disturbing.start()
            try:
                this = Round(generator, known, pool_tokens, counts)
                one_round(this, counts["rounds"], rng, round_s)
            finally:
                stop.set()
                disturbing.join()
                levels.mend()
            counts["rounds"] += 1
        levels.end(counts)
        counts["lives"] += 1
    return told(name, spent, counts, (warm, resident()), HAPPENED)


@pytest.mark.parametrize("name", ["two layer groups"])
def test_some_seconds_over_tiers_that_fail(name, tmp_path, caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    print(soak(name, 4.0, tmp_path, prompts=12, new=24, round_s=0.5))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", MODELS)
def test_an_hour_over_tiers_that_fail(name, tmp_path, caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    seconds = 2 * MINUTES * 60 / len(MODELS)
    print("\n" + soak(name, seconds, tmp_path, prompts=64, new=48, round_s=8.0))
