"""What tiers cost in time, whatever they do, and who is to blame."""

import dataclasses
import threading
import time

import pytest

from kvpaged.offload.options import OffloadOptions
from kvpaged.testing.dense import PAGE
from kvpaged.testing.tier_faults import Delayed, Faulty
from kvpaged.tiers.health import FAILURES
from kvpaged.tiers.wrappers import Wrapper
from tests.offload.tiered import (
    PAGE_BYTES,
    QUICK,
    cache_of,
    disk,
    host,
    run,
    scramble,
    settled,
    until,
    words,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


class Keeping(Wrapper):
    """Leaves its tier open for the next."""

    def close(self) -> None:
        pass


def test_a_load_of_many_calls_ends_in_time_though_computing_was_never_measured():
    """Each call kept its deadline, and all together took as long as there were calls."""
    tier = Delayed(host(policy="write-through"))
    options = OffloadOptions(
        staging_bytes=256 << 10, call_bytes=PAGE_BYTES, deadline_s=0.5, linger_s=0.001
    )
    with cache_of([tier], pages=24, options=options) as cache:
        prompt = words(1, 20 * PAGE + 1)
        run(cache, prompt)
        settled(cache)
        cache.clear()
        scramble(cache)
        mover = cache.mover
        assert mover is not None
        tier._latency = 0.1
        start = time.monotonic()
        reused = run(cache, prompt)
        assert time.monotonic() - start < 1.5
        assert 0 < reused < 20 * PAGE, "what came in time is used"


def test_a_lack_of_staging_is_not_the_tiers_fault(tmp_path):
    tier = disk(tmp_path)
    options = OffloadOptions(
        staging_bytes=2 * PAGE_BYTES, call_bytes=PAGE_BYTES, deadline_s=0.2, linger_s=0.001
    )
    with cache_of([tier], pages=24, options=options) as cache:
        prompt = words(1, 4 * PAGE + 1)
        run(cache, prompt)
        settled(cache)
        cache.clear()
        mover = cache.mover
        assert mover is not None
        taken = mover.staging.take(1, mover.staging.size)
        assert taken is not None
        for _ in range(FAILURES + 1):
            assert run(cache, prompt[: 4 * PAGE]) == 0
            cache.clear()
        worker = mover.stack.workers[0]
        assert (worker.health.failures, worker.timeouts, worker.up) == (0, 0, True)
        taken[1]()
        assert run(cache, prompt) == 4 * PAGE


def test_a_tier_that_says_late_what_it_holds_is_used_from_then_on():
    kept = host(policy="write-through")
    prompt = words(1, 4 * PAGE + 1)
    with cache_of([Keeping(kept)]) as cache:
        run(cache, prompt)
        settled(cache)
    tier = Faulty(Keeping(kept))
    tier.hang = hang = threading.Event()
    start = time.monotonic()
    options = dataclasses.replace(QUICK, open_deadline_s=0.1)
    with cache_of([tier], options=options) as cache:
        assert time.monotonic() - start < 5
        assert run(cache, prompt) == 0
        cache.clear()
        hang.set()
        tier.hang = None
        mover = cache.mover
        assert mover is not None
        until(lambda: not mover.stack.workers[0].parked)
        assert run(cache, prompt) == 4 * PAGE
