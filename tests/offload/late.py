"""Caches over a device whose copies end when a test says so."""

import dataclasses

import numpy as np

from kvpaged import PagedKVCache, books
from kvpaged.batch import Batch
from kvpaged.offload import pool
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.promotion import Promotion
from kvpaged.pages.allocator import Lease, PageAllocator
from kvpaged.testing.simulated import Drive, SimulatedCopies
from kvpaged.tiers.base import Tier
from tests.offload.tiered import (
    PAGE_BYTES,
    cache_of,
    check,
    run,
    scramble,
    until,
)

OPTIONS = OffloadOptions(
    staging_bytes=64 * PAGE_BYTES, call_bytes=4 * PAGE_BYTES, deadline_s=0.1, write_deadline_s=0.2,
    close_s=0.2, linger_s=0.001,
)  # fmt: skip


class Device:
    """The simulated copies of caches that are made from now on, one a group."""

    def __init__(self, monkeypatch, drive: Drive, seed: int = 0, **shares: float) -> None:
        self.copies: list[SimulatedCopies] = []
        view_of = pool.view_of

        def simulated(*arguments):
            view = view_of(*arguments)
            self.copies = [
                SimulatedCopies(inner, seed=seed + number, drive=drive, **shares)
                for number, inner in enumerate(view.copies)
            ]
            immediate = (False,) * len(self.copies)
            return dataclasses.replace(view, copies=tuple(self.copies), immediate=immediate)

        monkeypatch.setattr(books, "view_of", simulated)

    def in_flight(self) -> int:
        return sum(copies.in_flight() for copies in self.copies)

    def land(self) -> None:
        """Everything that is in flight ends."""
        while sum(copies.advance(100) for copies in self.copies):
            pass

    def land_until(self, condition, what="it did not end") -> None:
        def ended():
            self.land()
            return condition()

        until(ended, what)


def without_leases(monkeypatch) -> None:
    """Pages of copies in flight are anybody's."""

    def lease(self, ids):
        return Lease(ids.copy(), self.generations[ids])

    monkeypatch.setattr(PageAllocator, "lease", lease)
    monkeypatch.setattr(PageAllocator, "end_lease", lambda self, lease: True)


def leased(cache: PagedKVCache) -> int:
    return sum(len(c.exact.allocator._leases) for c in cache.classes)


def flushed(cache: PagedKVCache, device: Device) -> None:
    assert cache.mover is not None
    device.land_until(lambda: cache.mover.flush(0.01, down=False))


def filled(device: Device, tier: Tier, prompt: list[int], **options) -> PagedKVCache:
    """A cache whose tier has a prompt's pages, and whose pool has nothing."""
    cache = cache_of([tier], options=OPTIONS, **options)
    run(cache, prompt)
    flushed(cache, device)
    cache.clear()
    scramble(cache)
    return cache


def loading(cache: PagedKVCache, prompt: list[int]) -> tuple[Batch, Promotion]:
    """A row whose pages are about to come."""
    batch = Batch(cache, 1, cache.trails(1))
    ids = np.array(prompt)
    with cache.lock:
        match = batch.find(0, ids, len(ids))
        assert match is not None
        promotion = batch.begin_loading(0, match, ids, len(ids))
    assert promotion is not None
    return batch, promotion


def nothing_left(cache: PagedKVCache, device: Device) -> None:
    """No page, no lease, no staging is held."""
    assert cache.mover is not None
    staging = cache.mover.staging
    device.land_until(lambda: not (leased(cache) or staging.used or device.in_flight()))
    cache.clear()
    check(cache)
    assert all(c.allocator.used_pages() == 0 for c in cache.classes)
