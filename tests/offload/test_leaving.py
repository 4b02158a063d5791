"""Pages on their way from the pool into a tier: rescued as they leave, and found meanwhile."""

import threading
from functools import partial

import pytest
import torch

from kvpaged.offload.leaving import Leaving
from kvpaged.offload.options import OffloadOptions
from kvpaged.testing.dense import PAGE
from kvpaged.testing.shapes import WINDOWS
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.base import Record
from tests.offload.tiered import (
    PAGE_BYTES,
    cache_of,
    check,
    host,
    run,
    scramble,
    settled,
    words,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pages_that_nothing_below_has_are_rescued_as_they_leave():
    """One step takes more than the mover could have moved before it."""
    with cache_of([host()], pages=12) as cache:
        first = words(1, 11 * PAGE)
        run(cache, first)
        assert run(cache, words(2, 12 * PAGE)) == 0
        settled(cache)
        assert check(cache).dropped == 0
        assert run(cache, first) == 10 * PAGE + PAGE - 1


@pytest.mark.parametrize("groups", WINDOWS)
def test_what_is_on_its_way_is_found(groups):
    """Between the pool and a tier a page was nowhere, and was computed again."""
    tier, hang = Faulty(host()), threading.Event()
    with cache_of([tier], pages=24, groups=groups) as cache:
        first = words(1, 7 * PAGE)
        run(cache, first)
        tier.hang = hang
        cache.clear()
        scramble(cache)
        assert run(cache, first) == 6 * PAGE + PAGE - 1
        found = check(cache)
        assert found.rejoined > 0
        assert found.tiers[0].promoted == 0
        cache.clear()  # the same pages once more, while the first copies are still in staging
        scramble(cache)
        assert run(cache, first) == 6 * PAGE + PAGE - 1
        hang.set()
        tier.hang = None
        settled(cache)
        cache.clear()
        scramble(cache)
        assert run(cache, first) == 6 * PAGE + PAGE - 1
        assert check(cache).tiers[0].promoted > 0
        settled(cache)
        mover = cache.mover
        assert mover is not None
        assert not list(mover.stack.leaving.scan())
        cache.clear()
        settled(cache)
        assert mover.staging.used == 0


def test_what_is_on_its_way_lies_where_it_is_until_nobody_reads_it():
    leaving = Leaving()
    given: list[int] = []
    body = torch.zeros(64, dtype=torch.uint8)
    ends = [
        leaving.note(Record(key, b"h", body), partial(given.append, number))
        for number, key in enumerate((b"a", b"b", b"a"))
    ]
    with leaving.read([b"a", b"c", b"b"], []) as found:
        assert [None if one is None else one.key for one in found] == [b"a", None, b"b"]
        ends[0]()
        assert (given, list(leaving.gone)) == ([0], []), "another took its place"
        ends[2]()
        leaving.delete([b"b"])
        assert not leaving.gone
        with leaving.read([b"a", b"b"], []) as again:
            assert [one is None for one in again] == [False, True], "as long as somebody reads it"
        assert (given, list(leaving.gone)) == ([0], [])
    assert (given, list(leaving.gone)) == ([0, 2], [b"a"])
    assert leaving.usage().records == 0
    ends[1]()
    assert (given, list(leaving.gone)) == ([0, 2, 1], [b"a"])


def test_what_there_is_no_room_to_rescue_is_dropped_and_counted():
    options = OffloadOptions(
        staging_bytes=2 * PAGE_BYTES, call_bytes=PAGE_BYTES, write_deadline_s=0.2, close_s=0.2,
        deadline_s=0.2, linger_s=0.001,
    )  # fmt: skip
    tier, hang = Faulty(host()), threading.Event()
    with cache_of([tier], pages=12, options=options) as cache:
        tier.hang = hang
        run(cache, words(1, 11 * PAGE))
        run(cache, words(2, 12 * PAGE))
        assert check(cache).dropped > 0
        hang.set()
