"""Pages go down and come up by every policy, through stacks of tiers, in any geometry."""

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

from kvpaged import LayerGroup, PagedKVCache, PageGeometry
from kvpaged.config import Layout
from kvpaged.errors import ConfigError
from kvpaged.group_rows import GroupRows
from kvpaged.offload import levels
from kvpaged.offload.options import OffloadOptions
from kvpaged.testing.dense import PAGE
from kvpaged.testing.shapes import WINDOWS
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.base import DEMOTIONS, KEPT, Record
from kvpaged.tiers.host import HostTier
from tests.offload.tiered import (
    PAGE_BYTES,
    QUICK,
    cache_of,
    check,
    disk,
    host,
    run,
    scramble,
    settled,
    until,
    words,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS: tuple[Layout, ...] = ("page-major", "layer-major")


def agrees(cache: PagedKVCache) -> None:
    """What is known of each tier is what it says itself, to the byte; of one in memory in its
    order, too.
    """
    assert cache.mover is not None
    stack = cache.mover.stack
    for number, tier in enumerate(check(cache).tiers):
        found = {one.key: one.head_bytes + one.body_bytes for one in stack.tiers[number].scan()}
        held = stack.directory.held[number]
        assert found == held
        assert (tier.records, tier.known_bytes) == (len(held), sum(held.values()))
        assert tier.bytes is not None
        assert tier.bytes >= tier.known_bytes  # a file has more than records in it
        if tier.name == "host":
            assert tier.bytes == tier.known_bytes
            assert list(found) == list(held), "another goes first than is known"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", WINDOWS)
@pytest.mark.parametrize("policy", ["write-through", "write-back"])
def test_what_left_the_pool_comes_back(policy, groups, layout):
    """Every sequence is found again after others have taken its pages, to the last full page."""
    tier = host(policy=policy)
    with cache_of([tier], pages=14, groups=groups, layout=layout) as cache:
        prompts = [words(seed, 6 * PAGE + 5) for seed in range(6)]
        for prompt in prompts:
            assert run(cache, prompt) == 0
            settled(cache)
        for _ in range(2):
            for prompt in prompts:
                assert run(cache, prompt) == 6 * PAGE
                settled(cache)
        agrees(cache)
        stats = check(cache)
        assert stats.tiers[0].promoted > 0
        assert stats.dropped == 0
        tier.check_integrity()


def test_second_use_takes_what_was_used_twice():
    """Of a sequence that another begins with, the pages that both have; nobody said so."""
    tier = host(policy="second-use")
    with cache_of([tier], pages=40) as cache:
        prompt = words(1, 4 * PAGE + 1)
        run(cache, prompt)
        settled(cache)
        assert tier.usage().records == 0
        assert run(cache, prompt[: 2 * PAGE + 1]) == 2 * PAGE
        settled(cache)
        assert tier.usage().records == 2
        cache.clear()
        scramble(cache)
        assert run(cache, prompt) == 2 * PAGE


def test_a_host_tier_that_fills_spills_to_the_disk(tmp_path, monkeypatch):
    """Everything that was ever computed is found, most of it on disk, in stacks of two; looked at
    a few records at a time, for what is looked at must go on.
    """
    monkeypatch.setattr(levels, "LOOKED_AT", 5)
    tiers = [host(10), disk(tmp_path, "write-back")]
    with cache_of(tiers, pages=12) as cache:
        prompts = [words(seed, 4 * PAGE + 1) for seed in range(12)]
        for prompt in prompts:
            run(cache, prompt)
            settled(cache)
            until(lambda: not cache.mover._working)  # type: ignore[union-attr]
        cache.clear()
        scramble(cache)
        settled(cache)
        found = [run(cache, prompt) for prompt in prompts]
        assert found == [4 * PAGE] * 12
        agrees(cache)
        assert check(cache).tiers[1].promoted > 0


def test_what_is_given_up_is_below(tmp_path):
    """Whatever order they are put and used in: records of a first tier that go are in the second,
    but for those of saved sessions, which never go.
    """
    lost: list[bytes] = []
    below = disk(tmp_path, "write-back")

    class Watched(HostTier):
        def _drop(self, key):
            lost.extend([key] * (key not in {one.key for one in below.scan()}))
            super()._drop(key)

    upper = Watched(12 * (PAGE_BYTES + 256), policy="write-back", pin=False)
    saved = [Record(KEPT + bytes([n]), b"", torch.zeros(64, dtype=torch.uint8)) for n in range(2)]
    upper.put(saved)
    rng = random.Random(0)
    with cache_of([upper, below], pages=12) as cache:
        for _ in range(40):
            run(cache, words(rng.randrange(12), 4 * PAGE + 1))
            if rng.random() < 0.3:
                cache.clear()
                settled(cache)
        assert not lost
        assert below.usage().records > 12
        keys = {one.key for one in upper.scan()}
        assert {one.key for one in saved} <= keys
        assert not keys & {one.key for one in below.scan() if one.key.startswith(KEPT)}


@pytest.mark.parametrize("full", [False, True])
def test_spilling_step_by_step(full):
    """Four records at a time into a tier of ten, with a turn of the mover between. What the lower
    tier refuses stays, as long as there is room.
    """
    upper, lower = host(10), Faulty(host())
    with cache_of([upper, lower]) as cache:
        mover = cache.mover
        assert mover is not None
        mover._stop.set()
        mover._woken.set()
        mover._thread.join()
        lower.full = full
        put: list[bytes] = []
        for batch in range(6):
            body = torch.full((PAGE_BYTES,), batch, dtype=torch.uint8)
            records = [Record(b"p" + bytes([batch, n]), b"", body) for n in range(4)]
            put += [record.key for record in records]
            assert mover.stack.finish(0, mover.stack.put(0, records)) == 4
            above = {one.key for one in upper.scan()}
            below = {one.key for one in lower.scan()}
            if full:
                assert len(above) == min(len(put), upper.capacity // PAGE_BYTES)
                assert not mover.demoter.run(), "it is refused, and comes again"
            else:
                assert above | below == set(put), "what was given up has no copy"
                assert not above & below
                assert mover.demoter.run() == (batch > 0)
        agrees(cache)


@pytest.mark.parametrize("groups", WINDOWS)
def test_stacks_of_three(tmp_path, groups):
    tiers = [host(6), host(12), disk(tmp_path)]
    with cache_of(tiers, pages=14, groups=groups) as cache:
        prompts = [words(seed, 5 * PAGE + 3) for seed in range(8)]
        reused = []
        for _ in range(2):
            for number, prompt in enumerate(prompts):
                reused.append(run(cache, prompt, more=number))
                settled(cache)
        # A record may go down between the look and the load; then the page is computed.
        assert reused.count(5 * PAGE) >= 6
        agrees(cache)


def test_records_come_up_ahead(tmp_path):
    """Keys that are soon asked for are in the first tier when they are."""
    tiers = [host(), disk(tmp_path)]
    prompt = words(1, 5 * PAGE + 1)
    with cache_of(tiers[1:]) as cache:
        run(cache, prompt)
        settled(cache)
    tiers[1] = disk(tmp_path)
    with cache_of(tiers) as cache:
        keys = [one.key for one in tiers[1].scan()]
        assert len(keys) == 5
        assert cache.mover is not None
        cache.mover.demoter.note_ahead(keys)
        until(lambda: tiers[0].usage().records == 5)
        assert run(cache, prompt) == 5 * PAGE
        first, second = check(cache).tiers
        assert (first.promoted, second.promoted) == (5, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", WINDOWS)
def test_a_new_cache_finds_what_an_earlier_one_left(tmp_path, groups, layout):
    """In another layout too: a record is the same."""
    prompt = words(1, 7 * PAGE + 2)
    with cache_of([disk(tmp_path)], pages=20, groups=groups, layout=layout) as cache:
        run(cache, prompt)
    other = LAYOUTS[LAYOUTS.index(layout) - 1]
    with cache_of([disk(tmp_path)], pages=20, groups=groups, layout=other) as cache:
        assert run(cache, prompt) == 7 * PAGE
        stats = check(cache)
        assert stats.loaded == stats.tiers[0].promoted > 0
        assert stats.sealed == 0


def test_only_the_same_namespace_salt_and_geometry_find_it(tmp_path):
    prompt = words(1, 4 * PAGE + 1)
    with cache_of([disk(tmp_path)], pages=30) as cache:
        run(cache, prompt)
        run(cache, prompt, salt=b"mine")
    with cache_of([disk(tmp_path)], pages=30) as cache:
        assert run(cache, prompt, salt=b"other") == 0
        cache.refresh(b"two")
        assert run(cache, prompt, namespace=b"two") == 0
        cache.refresh(b"one")
        cache.clear()
        scramble(cache)
        assert run(cache, prompt, salt=b"mine") == 4 * PAGE
        assert run(cache, prompt) == 4 * PAGE
    geometry = PageGeometry(layers=2, kv_heads=2, head_dim=8, page_size=16, dtype=torch.float32)
    groups = [LayerGroup(geometry=geometry, layers=(0, 1))]
    tier = disk(tmp_path)
    with PagedKVCache(groups, "1MiB", namespace=b"one", tiers=[tier], offload=QUICK) as cache:
        batch = cache.batch([prompt])
        assert batch.reused.tolist() == [0]
        assert check(cache).tiers[0].promoted == 0


def test_windowed_pages_are_loaded_where_the_pool_has_the_others():
    """Only what a window sees had gone: the pages come back, and into the index."""
    tier = host(policy="write-through")
    with cache_of([tier], pages=30, groups="full and window") as cache:
        prompt = words(1, 6 * PAGE + 1)
        run(cache, prompt)
        settled(cache)
        windowed = cache.classes[1].allocator
        with cache.lock:
            while windowed.cached_pages():
                windowed.evict_oldest()
        check(cache)
        assert run(cache, prompt) == 6 * PAGE
        found = check(cache)
        assert found.tiers[0].promoted == 2
        assert run(cache, prompt) == 6 * PAGE
        assert check(cache).tiers[0].promoted == 2, "what was loaded did not stay"


def test_room_for_one_group_is_not_made_of_what_another_builds_on(monkeypatch):
    """The page of the wider window was evicted for those of the other, and its place then held a
    page that nobody loaded.
    """
    prompt = words(1, 6 * PAGE + 1)
    with cache_of([host(policy="write-through")], pages=40, groups="windows") as cache:
        run(cache, prompt)
        settled(cache)
        cache.clear()
        scramble(cache)
        assert run(cache, prompt[: 4 * PAGE + 1]) == 4 * PAGE
        take = GroupRows.take_loading

        def evicting(self: GroupRows, known: list[int | None], first: int) -> Any:
            cache.index.clear()
            scramble(cache)
            return take(self, known, first)

        monkeypatch.setattr(GroupRows, "take_loading", evicting)
        assert run(cache, prompt) == 6 * PAGE


@pytest.mark.parametrize("groups", WINDOWS)
@pytest.mark.parametrize("lost", range(7))
def test_a_load_that_ends_early_gives_the_pages_before_that(groups, lost):
    """One record has gone from the tier unnoticed; the pool has some pages in part."""
    tier = host(policy="write-through")
    with cache_of([tier], pages=30, groups=groups) as cache:
        prompt = words(1, 7 * PAGE + 1)
        run(cache, prompt)
        settled(cache)
        cache.clear()
        scramble(cache)
        assert run(cache, prompt[: 3 * PAGE + 1]) == 3 * PAGE
        if len(cache.classes) == 2:
            with cache.lock:
                cache.classes[1].allocator.evict_oldest()
        keys = [one.key for one in tier.scan()]
        by_key = {node.key: node.depth for node in cache.index.nodes()}
        gone = [key for key in keys if by_key.get(key[1:-2], lost + 1) == lost + 1][:1]
        tier.delete(gone)
        tier.gone.clear()
        run(cache, prompt)
        settled(cache)
        assert run(cache, prompt) == 7 * PAGE


@pytest.mark.parametrize("policy", DEMOTIONS)
def test_a_tier_that_takes_nothing_is_not_asked_for_ever(policy):
    """The mover is at rest after it was refused: it offered the same pages again and again."""
    tier = Faulty(host(policy=policy))
    tier.full = True
    with cache_of([tier], pages=12) as cache:
        for seed in range(4):
            run(cache, words(seed, 6 * PAGE))
        settled(cache)
        before = tier.calls
        for _ in range(20):
            cache.mover._woken.set()  # type: ignore[union-attr]
            threading.Event().wait(0.01)
        assert tier.calls <= before + 1


def test_a_lower_tier_that_takes_nothing_is_not_asked_for_ever():
    below = Faulty(host())
    below.full = True
    with cache_of([host(8), below], pages=12) as cache:
        for seed in range(5):
            run(cache, words(seed, 6 * PAGE))
        settled(cache)
        threading.Event().wait(0.1)
        before = below.calls
        threading.Event().wait(0.3)
        assert below.calls - before <= 3, "once for each idle turn"


def test_a_first_tier_smaller_than_what_presses_is_left_alone():
    """Each page it takes costs it another, which would come again."""
    tier = host(2)
    with cache_of([tier], pages=32) as cache:
        for seed in range(5):
            run(cache, words(seed, 7 * PAGE))
        settled(cache)
        before = check(cache).tiers[0].demoted
        threading.Event().wait(0.5)
        assert check(cache).tiers[0].demoted == before


def test_flush_says_if_a_tier_is_behind():
    tier = Faulty(host(policy="write-through"))
    tier.dead = True
    with cache_of([tier]) as cache:
        run(cache, words(1, 4 * PAGE))
        assert not cache.flush(0.3)
        assert (check(cache).oldest_s or 0) >= 0.2, "they wait, though nothing is asked of the tier"
        assert check(cache).longest_lag_s == 0
        tier.dead = False
        cache.mover.stack.workers[0].health.succeeded("put")  # type: ignore[union-attr]
        assert cache.flush(10)
        assert tier.usage().records == 4
        assert check(cache).oldest_s is None
        assert check(cache).longest_lag_s >= 0.2, "what was swept has waited since it was refused"


def test_a_tier_that_was_slow_is_tried_again():
    """One measurement said computing is quicker, and nothing was ever measured again."""
    tier = host(policy="write-through")
    with cache_of([tier]) as cache:
        prompt = words(1, 4 * PAGE + 1)
        run(cache, prompt)
        settled(cache)
        mover = cache.mover
        assert mover is not None
        mover.stack.loads[0].add(PAGE_BYTES, 100.0)
        mover.note_pass(64, 0.001)
        found = []
        for _ in range(32):
            cache.clear()
            scramble(cache)
            found.append(run(cache, prompt))
        assert found[:8] == [0] * 8, "computing is quicker"
        assert 4 * PAGE in found
        assert np.mean(found) < PAGE


def test_what_is_no_tier_and_staging_without_room_are_named():
    with pytest.raises(ConfigError, match="a tier is a"):
        cache_of(["host"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="no room for two pages"):
        cache_of([host()], options=OffloadOptions(staging_bytes=100))
