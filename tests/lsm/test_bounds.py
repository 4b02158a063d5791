"""Stores that may hold so many bytes: what goes, what is refused, and that the bound holds."""

import random
from typing import Any

import pytest
import torch

from kvpaged.errors import ConfigError, StorageError
from kvpaged.lsm.compaction import (
    budget,
)
from kvpaged.lsm.layout import BLOCK
from kvpaged.lsm.options import StoreOptions
from kvpaged.testing.faulty_files import FaultyFiles
from tests.lsm.small import KIB, Clock, number_of, open_store, value

MIB = 1 << 20


def test_a_bounded_store_never_exceeds_its_bound_and_keeps_what_was_asked_for():
    clock = Clock()
    files = FaultyFiles()
    cap = 2 * MIB
    with open_store(files, max_bytes=cap, clock=clock, segment_bytes=128 * KIB) as store:
        rng = random.Random(3)
        for turn in range(1500):
            store.put(b"%d" % turn, value(turn, rng.randrange(1000, 8000)))
            assert number_of(store.get(b"7")) == 7 or turn < 7
            if turn % 3 == 0:
                store.put(b"again %d" % (turn % 50), value(turn, 2000))
            if turn % 100 == 0:
                store.check_integrity()
        stats = store.stats()
        assert files.peak <= cap
        assert stats.evicted > 500
        assert stats.live_bytes > 0.5 * cap
        assert stats.write_amplification < 5
        assert all(b"%d" % turn in store for turn in range(1480, 1500))
        assert store.verify() == []


def test_what_was_evicted_and_then_deleted_does_not_come_back():
    files = FaultyFiles()
    with open_store(files, max_bytes=MIB) as store:
        store.put(b"first", value(1, 5000))
        store.flush()
        assert store._keeper is not None
        store._keeper._evict(1)
        assert b"first" not in store
        assert b"first" in open_store(files.killed(), max_bytes=MIB)  # no manifest knows it yet
        assert not store.delete(b"first")
        assert b"first" not in open_store(files.killed(), max_bytes=MIB)


def test_a_bound_that_became_smaller_is_kept_to():
    files = FaultyFiles()
    with open_store(files) as store:
        store.put_many({b"%d" % n: value(n, 5000) for n in range(200)})
    with open_store(files, max_bytes=MIB) as store:
        store.put(b"new", value(1, 5000))
        assert store.stats().used_bytes <= MIB
        assert number_of(store.get(b"new")) == 1
        assert len(store) > 10
        store.check_integrity()


def test_a_bound_below_the_size_of_the_files_there_are():
    files = FaultyFiles()
    with open_store(files, segment_bytes=4 * MIB, memtable_bytes=MIB) as store:
        store.put_many({b"%d" % n: value(n, 5000) for n in range(300)})
    with open_store(files, max_bytes=MIB) as store:
        assert len(store) == 300
        store.put(b"new", value(1, 5000))
        assert number_of(store.get(b"new")) == 1
        assert store.stats().used_bytes <= MIB
        store.check_integrity()


def test_a_bounded_store_of_tiny_values():
    files = FaultyFiles()
    with open_store(files, max_bytes=MIB, segment_bytes=64 * KIB) as store:
        for turn in range(3000):
            store.put(b"%d" % turn, value(turn, 2))
        assert files.peak <= MIB
        assert len(store) > 1000
        assert number_of(store.get(b"2999")) == 2999
        store.check_integrity()


def test_what_is_too_large_for_a_bound_is_refused_at_once():
    with open_store(FaultyFiles(), max_bytes=MIB) as store:
        store.put(b"a", value(1))
        with pytest.raises(StorageError, match="come at once"):
            store.put(b"b", value(2, 300_000))
        assert number_of(store.get(b"a")) == 1


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("durability", ["none", "process"])
@pytest.mark.parametrize(
    ("cap", "size", "keys"),
    [(500_000, 64 * KIB, 40), (10 * MIB, 6 * MIB, 40), (10 * MIB, 6 * MIB, 1)],
)
def test_what_came_once_comes_again(cap, size, keys, durability, background):
    files = FaultyFiles()
    changes = {"background": background, "durability": durability, "segment_bytes": None}
    with open_store(files, max_bytes=cap, **changes) as store:
        for turn in range(12):
            key = b"%d" % (turn % keys)
            store.put(key, value(turn, size // 4))
            assert number_of(store.get(key)) == turn
        assert files.peak <= cap
        assert store.stats().refused == 0
        store.check_integrity()


def test_any_put_that_fits_the_bound_alone_comes_at_any_time():
    for seed in range(12):
        rng, files = random.Random(seed), FaultyFiles(seed)
        cap = int(500_000 * 2 ** (3 * rng.random()))
        with open_store(files, max_bytes=cap, segment_bytes=None) as store:
            most = budget(cap, store.options.file_bytes, 0).live - 12 * BLOCK
            for turn in range(40):
                size = rng.choice([most, rng.randrange(1, most), rng.randrange(1, most // 8)])
                key = b"%d" % rng.randrange(1, 12)
                store.put(key, torch.full((size,), turn, dtype=torch.uint8))
                found: Any = store.get(key)
                assert found.numel() == size
                assert bool((found == turn).all())
                store.check_integrity()
            with pytest.raises(StorageError, match="come at once"):
                store.put(b"more", torch.zeros(most + 12 * BLOCK, dtype=torch.uint8))
            assert files.peak <= cap


@pytest.mark.parametrize(
    ("cap", "share"),
    [(500_000, 0.21), (MIB, 0.46), (16 * MIB, 0.73), (1 << 30, 0.75), (1 << 34, 0.84)],
)
def test_as_much_of_a_bound_is_for_values_as_is_said(cap, share):
    full = StoreOptions(max_bytes=cap).file_bytes
    assert share < budget(cap, full, 0).live / cap < share + 0.02


def test_a_bound_that_leaves_nothing_for_values_is_refused():
    for cap, full in ((300_000, None), (MIB, 400 * KIB), (MIB, 4 * MIB)):
        with pytest.raises(ConfigError, match="for values"):
            StoreOptions(max_bytes=cap, segment_bytes=full)


def test_files_of_a_closed_store_take_no_bytes_of_the_next():
    files = FaultyFiles()
    first = open_store(files, max_bytes=MIB)
    first.put(b"a", value(1, 60_000))
    first.flush()
    first.close()
    with open_store(files, max_bytes=MIB) as store:
        store.put(b"a", value(2, 60_000))
        store.compact()
        assert files.used() <= store.stats().used_bytes
    assert first.read_only is False  # it is still referred to
