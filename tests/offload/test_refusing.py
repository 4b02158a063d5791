"""Tiers that can be read and refuse to be written: what they hold is still of use."""

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from kvpaged.errors import StorageError
from kvpaged.offload.gather import ask
from kvpaged.offload.stack import Stack
from kvpaged.testing.dense import PAGE
from kvpaged.tiers.base import Tier
from kvpaged.tiers.health import FAILURES, Health
from kvpaged.tiers.wrappers import Asked, Kind, Wrapper
from tests.offload.tiered import QUICK, cache_of, check, host, run, settled, until, words

T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("one_thread")


class Refusing(Wrapper):
    """Some kinds of calls raise; the first record of the next read may be spoilt."""

    def __init__(self, inner: Tier, *kinds: Kind) -> None:
        super().__init__(inner)
        self.kinds = set(kinds)
        self.calls: list[Kind] = []
        self.bad: bytes | None = None

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        self.calls.append(kind)
        if kind in self.kinds:
            raise StorageError(30, f"{kind} on a read-only file system")
        done = call()
        if kind == "read":
            for record in done:  # type: ignore[attr-defined]
                if record is not None and record.key == self.bad:
                    record.body[0] += 1
        return done


def test_what_a_tier_holds_is_loaded_though_it_takes_nothing_more():
    tier = Refusing(host(policy="write-through"))
    with cache_of([tier], pages=12) as cache:
        known = words(1, 4 * PAGE + 1)
        run(cache, known)
        settled(cache)
        tier.kinds = {"put", "delete"}
        for seed in range(2, 9):
            run(cache, words(seed, 7 * PAGE))
            cache.clear()
        until(lambda: not check(cache).tiers[0].takes)
        assert check(cache).tiers[0].up
        assert run(cache, known) == 4 * PAGE


def test_saving_that_fails_does_not_stop_reading():
    stack = Stack([Refusing(host(), "put", "delete")], QUICK)
    for _ in range(FAILURES):
        with pytest.raises(StorageError):
            ask(stack, 0, lambda tier: tier.put([]), kind="put")
    assert (stack.workers[0].takes, stack.workers[0].up) == (False, True)
    assert ask(stack, 0, lambda tier: list(tier.scan())) == []
    stack.close()


def test_deletions_that_work_do_not_hide_puts_that_fail():
    stack = Stack([Refusing(host(), "put")], QUICK)
    for _ in range(FAILURES):
        assert stack.workers[0].takes
        with pytest.raises(StorageError):
            ask(stack, 0, lambda tier: tier.put([]), kind="put")
        if stack.workers[0].takes:
            ask(stack, 0, lambda tier: tier.delete([]), kind="delete")
    assert not stack.workers[0].takes
    stack.close()


def test_what_is_wrong_and_cannot_be_deleted_is_asked_for_once():
    """It was put again, which changes nothing of what is there, and so believed to be there."""
    tier = Refusing(host(policy="write-through"))
    with cache_of([tier], pages=12) as cache:
        assert cache.mover is not None
        known = words(1, 2 * PAGE + 1)
        run(cache, known)
        settled(cache)
        tier.bad = next(one.key for one in tier.scan())
        tier.kinds = {"delete"}
        for _ in range(6):
            cache.clear()
            run(cache, known)
            cache.flush(0.05)
        assert cache.mover.stack.flows[0].missed <= 2
        assert tier.bad not in cache.mover.stack.directory.held[0]
        tier.bad, tier.kinds = None, set()
        cache.mover.stack.workers[0].health = Health()
        settled(cache)
        cache.clear()
        assert run(cache, known) == 2 * PAGE, "it was deleted, and put anew"


def test_lag_counts_from_the_first_failure_whatever_was_tried_since():
    tier = Refusing(host(policy="write-through"), "put")
    with cache_of([tier]) as cache:
        assert cache.mover is not None
        worker = cache.mover.stack.workers[0]
        worker.health = Health(rest_s=0.05, longest_s=0.05)
        start = time.monotonic()
        run(cache, words(1, 4 * PAGE))
        until(lambda: worker.health.failures > FAILURES + 3)
        behind = time.monotonic() - start - 0.2
        assert (check(cache).oldest_s or 0) >= behind
        tier.kinds = set()
        settled(cache)
        assert check(cache).longest_lag_s >= behind
        assert check(cache).oldest_s is None


def test_lag_is_of_the_tiers_that_took_the_pages():
    """Two tiers were to have a page, and the one that is written through did not take it."""
    upper, lower = host(policy="write-back"), Refusing(host(policy="write-through"), "put")
    with cache_of([upper, lower], pages=6) as cache:
        for seed in range(4):
            run(cache, words(seed, 5 * PAGE))
            cache.flush(0.05)
        assert check(cache).tiers[0].demoted > 0
        assert (check(cache).tiers[1].demoted, check(cache).longest_lag_s) == (0, 0.0)


def test_nothing_moves_down_from_a_tier_that_would_keep_it_all_the_same():
    """What was copied down stayed, and was copied again as soon as the small one below gave it
    up, a thousand times a second.
    """
    upper, below = Refusing(host(10), "delete"), host(5)
    with cache_of([upper, below], pages=12) as cache:
        for seed in range(4):
            run(cache, words(seed, 4 * PAGE))
            cache.clear()
        time.sleep(0.3)
        before = len(upper.calls)
        time.sleep(0.5)
        assert len(upper.calls) - before < 20
