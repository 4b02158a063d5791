"""What tiers cost in time, whatever they do, and who is to blame."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from kvpaged.offload import mover
from kvpaged.offload.options import OffloadOptions
from kvpaged.testing.dense import PAGE
from kvpaged.testing.tier_faults import Delayed, Faulty
from kvpaged.tiers.base import Tier
from kvpaged.tiers.health import FAILURES
from kvpaged.tiers.wrappers import Asked, Kind, Wrapper
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

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("one_thread")


class Gated(Wrapper):
    """Reads wait until they may go on."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.calls: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        self.calls.append(kind)
        if kind == "read":
            self.gate.wait()
        return call()


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
        of = cache.mover
        assert of is not None
        tier._latency = 0.1
        start = time.monotonic()
        reused = run(cache, prompt)
        assert time.monotonic() - start < 1.5
        assert 0 < reused < 20 * PAGE, "what came in time is used"


def test_what_goes_down_waits_for_what_comes_up(monkeypatch):
    monkeypatch.setattr(mover, "YIELD_S", 20.0)
    tier = Gated(host())
    with cache_of([tier], pages=24) as cache:
        first = words(1, 4 * PAGE + 1)
        run(cache, first)
        cache.clear()
        settled(cache)
        run(cache, words(2, 4 * PAGE))
        scramble(cache)
        tier.calls.clear()
        tier.gate.clear()
        found: list[int] = []
        loading = threading.Thread(target=lambda: found.append(run(cache, first)))
        loading.start()
        until(lambda: "read" in tier.calls)
        cache.clear()
        time.sleep(0.1)
        assert tier.calls == ["read"]
        tier.gate.set()
        loading.join()
        assert found == [4 * PAGE]
        until(lambda: "put" in tier.calls)


def test_a_lack_of_staging_is_not_the_tiers_fault(tmp_path):
    tier = disk(tmp_path)
    options = OffloadOptions(
        staging_bytes=2 * PAGE_BYTES, call_bytes=PAGE_BYTES, deadline_s=0.8, linger_s=0.001
    )
    with cache_of([tier], pages=24, options=options) as cache:
        prompt = words(1, 4 * PAGE + 1)
        run(cache, prompt)
        settled(cache)
        cache.clear()
        of = cache.mover
        assert of is not None
        taken = of.staging.take(1, of.staging.size)
        assert taken is not None
        for _ in range(FAILURES + 1):
            assert run(cache, prompt[: 4 * PAGE]) == 0
            cache.clear()
        worker = of.stack.workers[0]
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
        of = cache.mover
        assert of is not None
        until(lambda: not of.stack.workers[0].parked)
        assert run(cache, prompt) == 4 * PAGE
