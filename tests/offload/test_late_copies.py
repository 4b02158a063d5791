"""A device whose copies end late, in any order, wrong, or never: nobody ever sees other bytes, and
what a copy reads or writes is nobody else's until it has ended.
"""

import dataclasses
import gc
import random
import threading

import numpy as np
import pytest
import torch

from kvpaged import PagedKVCache, books
from kvpaged.batch import Batch
from kvpaged.errors import IntegrityError, OutOfPagesError
from kvpaged.loading import Ahead
from kvpaged.offload import pool
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.promotion import LoadError, Promotion
from kvpaged.pages.allocator import Lease, PageAllocator
from kvpaged.testing.dense import DIM, LAYERS, PAGE
from kvpaged.testing.simulated import Drive, SimulatedCopies
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.base import Tier
from kvpaged.tiers.host import HostTier
from kvpaged.tiers.record import Head
from tests.offload.tiered import (
    PAGE_BYTES,
    cache_of,
    check,
    compare,
    host,
    row_of,
    run,
    scramble,
    until,
    words,
)

pytestmark = pytest.mark.usefixtures("one_thread")

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
    return sum(len(c.allocator._leases) for c in cache.classes)


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


# -- leases ----------------------------------------------------------------------------------------


def records_are_right(tier: HostTier, prompts: list[list[int]]) -> None:
    """What a tier has is what the tokens of its records say."""
    dense = {}
    for prompt in prompts:
        row = row_of(prompt)
        for page in range(len(prompt) // PAGE):
            text = np.array(prompt[page * PAGE : (page + 1) * PAGE], ">u4").tobytes()
            dense[text] = row.dense[page * PAGE : (page + 1) * PAGE]
    keys = [one.key for one in tier.scan()]
    assert keys
    with tier.read(keys, []) as found:
        for record in found:
            assert record is not None
            head = Head.decode(record.head)
            body = record.body.view(torch.float32).view(LAYERS * 2, PAGE, DIM)
            expected = torch.from_numpy(dense[head.tokens]).view(PAGE, LAYERS * 2, DIM)
            if not torch.equal(body, expected.transpose(0, 1)):
                raise IntegrityError("a tier was given other bytes than a page's")


def reused_while_copied_out(device: Device) -> None:
    """Pages are evicted, and taken by another sequence, while they are copied out."""
    tier = host(policy="write-through")
    first, second = words(1, 4 * PAGE), words(2, 8 * PAGE)
    cache = cache_of([tier], options=OPTIONS)
    run(cache, first)
    until(device.in_flight)
    cache.clear()
    _, batch = run(cache, second, keep=True)
    flushed(cache, device)
    records_are_right(tier, [first, second])
    batch.close()
    nothing_left(cache, device)
    cache.close()


def reused_while_copied_in(device: Device) -> None:
    """Loading is given up, and its pages are taken by another sequence, while they are copied."""
    first, second = words(1, 4 * PAGE), words(2, 8 * PAGE)
    cache = filled(device, host(policy="write-through"), first)
    with Ahead(cache, [np.array(first)], cache.trails(1)):
        assert device.in_flight()
    _, batch = run(cache, second, keep=True)
    device.land()
    cache.check_integrity()  # which finds nothing: the copies brought checksums with them
    compare(cache, batch, row_of(second))
    batch.close()
    nothing_left(cache, device)
    cache.close()


@pytest.mark.parametrize("history", [reused_while_copied_out, reused_while_copied_in])
def test_a_page_is_not_reused_while_it_is_copied(monkeypatch, history):
    history(Device(monkeypatch, "hand"))


@pytest.mark.parametrize("history", [reused_while_copied_out, reused_while_copied_in])
def test_the_same_without_leases_is_seen_to_be_wrong(monkeypatch, history):
    """So the test above can fail."""
    without_leases(monkeypatch)
    with pytest.raises(IntegrityError):
        history(Device(monkeypatch, "hand"))


@pytest.mark.parametrize("step", ["prompt", "decode"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_step_waits_for_a_copy_that_has_the_pages_it_needs(monkeypatch, step, ends):
    """Pages that wait to be evicted counted as room though a copy had them: an assertion failed."""
    device = Device(monkeypatch, "hand")
    monkeypatch.setattr(books, "LEASES_S", 30.0 if ends else 0.1)
    cache = cache_of([host(policy="write-through")], options=OPTIONS)
    other, batch = words(2, 8 * PAGE), None
    if step == "decode":
        _, batch = run(cache, other, keep=True)
        flushed(cache, device)
    run(cache, words(1, 4 * PAGE))
    until(lambda: leased(cache) == 4)
    lander = threading.Timer(0.1, device.land)
    if ends:
        lander.start()
    if batch is None:
        if ends:
            assert run(cache, words(3, 12 * PAGE)) == 0
        else:
            with pytest.raises(OutOfPagesError, match="12 more pages are needed and 8 of 12"):
                cache.batch([words(3, 12 * PAGE)])
    else:
        with cache.lock:
            cache.index.clear()  # all of them: no page is free now
        if ends:
            batch.extend([[1]])
        else:
            with pytest.raises(OutOfPagesError, match="1 more pages are needed and 0 of 12"):
                batch.extend([[1]])
    if ends:
        lander.join()
    device.land()
    if batch is not None:
        batch.close()
    gc.collect()
    nothing_left(cache, device)
    cache.close()


# -- cancellation ----------------------------------------------------------------------------------


def test_a_tier_that_hangs_takes_no_pages_from_the_pool(monkeypatch):
    """Its leases lasted as long as the call: a pool that was large enough was too small."""
    device = Device(monkeypatch, "wait")
    tier, hang = Faulty(host(policy="write-through")), threading.Event()
    cache = filled(device, tier, words(1, 6 * PAGE))
    tier.hang = hang
    assert run(cache, words(1, 6 * PAGE) + words(2, 6 * PAGE - 1)) == 0  # the whole pool
    assert check(cache).tiers[0].parked
    assert leased(cache) == 0
    hang.set()
    tier.hang = None
    nothing_left(cache, device)
    cache.close()


@pytest.mark.parametrize("where", ["read", "copy", "before", "between"])
@pytest.mark.parametrize("how", ["close", "forget", "cancel", "cache"])
def test_a_row_that_goes_while_its_pages_come_leaves_nothing(monkeypatch, how, where):
    device = Device(monkeypatch, "hand")
    tier, hang = Faulty(host(policy="write-through")), threading.Event()
    prompt = words(1, 6 * PAGE)
    cache = filled(device, tier, prompt)
    if where == "read":
        tier.hang = hang
    batch, promotion = loading(cache, prompt)
    if where != "before":
        promotion.start()
    if where == "read":
        until(tier.hung.is_set)
    if where in ("copy", "between"):
        until(device.in_flight)
    if where == "between":  # the first of two calls has ended
        until(lambda: promotion._turn == 2 or not device.copies[0].advance())
        until(lambda: promotion._turn == 2 and device.in_flight())
    if how == "cancel" or where == "before":
        promotion.cancel("")
        assert promotion.outcome is not None
        assert promotion.outcome.pages == (3 if where == "between" else 0)
    if how == "forget":
        del batch
        gc.collect()
    elif how == "cache":
        cache.close()
    else:
        batch.close()
    if how in ("close", "forget") and where != "read":
        assert where == "before" or leased(cache), "it is copied into them still"
        check(cache)
    hang.set()
    tier.hang = None
    if how == "cache":
        device.land_until(lambda: not cache.mover.staging.used)  # type: ignore[union-attr]
        return
    nothing_left(cache, device)
    until(lambda: not cache.mover.stack.workers[0].parked)  # type: ignore[union-attr]
    assert run_beside(cache, device, prompt) == 6 * PAGE - 1
    cache.close()


def run_beside(cache: PagedKVCache, device: Device, prompt: list[int]) -> int:
    """`run`, the copies of a device driven by hand landing meanwhile."""
    stop = threading.Event()

    def drive():
        while not stop.wait(0.001):
            device.land()

    thread = threading.Thread(target=drive)
    thread.start()
    try:
        found: int = run(cache, prompt)
        return found
    finally:
        stop.set()
        thread.join()


def test_an_exception_while_pages_come_leaves_nothing(monkeypatch):
    device = Device(monkeypatch, "hand")
    prompt = words(1, 6 * PAGE)
    cache = filled(device, host(policy="write-through"), prompt)

    def interrupted(self):
        until(device.in_flight)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Promotion, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.batch([prompt])
    assert leased(cache)
    gc.collect()
    nothing_left(cache, device)
    assert run_beside(cache, device, prompt) == 6 * PAGE - 1
    cache.close()


# -- bytes that are wrong --------------------------------------------------------------------------


class Spoiling(HostTier):
    """Flips a bit of some page's layer as it is read."""

    page = layer = 0

    def read(self, keys, room):
        reading = super().read(keys, room)
        with reading as records:
            for record in records:
                if record is not None and Head.decode(record.head).depth == self.page + 1:
                    record.body[self.layer * PAGE_BYTES // LAYERS + 17] ^= 1
        return super().read(keys, room)


@pytest.mark.parametrize(("simulated", "together"), [(False, 6), (False, 1), (True, 1)])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("page", range(6))
def test_pages_before_a_wrong_one_are_whole(monkeypatch, page, layer, simulated, together):
    """Copying ended at the wrong layer, and the pages before counted with their last ones missing.
    Pages come in calls of four, so in the last call and in one before it.
    """
    device = Device(monkeypatch, "wait") if simulated else None
    monkeypatch.setattr(pool, "TOGETHER", together)
    tier = Spoiling(256 * PAGE_BYTES, policy="write-through", pin=False)
    prompt = words(1, 6 * PAGE + 1)
    cache = cache_of([tier], options=OPTIONS)
    run(cache, prompt)
    assert cache.flush(10)
    cache.clear()
    scramble(cache)
    tier.page, tier.layer = page, layer
    assert run(cache, prompt) == page * PAGE
    stats = check(cache)
    assert stats.promotions_failed == 1
    assert stats.tiers[0].missed > 0
    tier.page = -1
    assert cache.flush(10)
    cache.clear()
    assert run(cache, prompt) == 6 * PAGE, "it was put again"
    cache.close()
    assert device is None or not device.in_flight()


def test_a_copy_that_fails_is_waited_for_with_the_others(monkeypatch):
    """The result of one raised, and leases ended while others were in flight."""
    monkeypatch.setattr(pool, "TOGETHER", 1)
    device = Device(monkeypatch, "hand")
    prompt = words(1, 3 * PAGE)
    cache = filled(device, host(policy="write-through"), prompt)
    copies = device.copies[0]
    ends = iter(["fails", "ends"])  # of the two layers
    monkeypatch.setattr(copies, "_fate", lambda: next(ends, "ends"))
    batch, promotion = loading(cache, prompt)
    promotion.start()
    until(lambda: copies.in_flight() == 2)
    first = copies._flights[0]
    copies.finish(first)
    threading.Event().wait(0.05)
    assert not promotion.over
    assert leased(cache) == 3
    device.land_until(lambda: promotion.over)
    assert promotion.outcome is not None
    assert "failed" in str(promotion.outcome.error)
    batch.close()
    nothing_left(cache, device)
    cache.close()


def test_layers_land_one_by_one_and_say_so(monkeypatch):
    """`wait_layer` of a layer whose group has nothing in the last call is over at once; after a
    wrong byte it raises.
    """
    monkeypatch.setattr(pool, "TOGETHER", 1)
    device = Device(monkeypatch, "hand")
    prompt = words(1, 8 * PAGE)
    cache = filled(device, host(policy="write-through"), prompt, pages=20, groups="full and window")
    batch, promotion = loading(cache, prompt)
    promotion.start()
    device.land_until(promotion.ready)
    for block in cache.mover.pool.blocks:  # type: ignore[union-attr]
        for group, layers in block:
            promotion.wait_layer(group, layers.start)
    device.land_until(lambda: promotion.over)
    batch.close()
    nothing_left(cache, device)
    for copies in device.copies:
        monkeypatch.setattr(copies, "_shares", (0.0, 0.0, 1.0))
    batch, promotion = loading(cache, prompt)
    promotion.start()
    device.land_until(lambda: promotion.over)
    with pytest.raises(LoadError):
        promotion.wait_layer(0, 0)
    batch.close()
    nothing_left(cache, device)
    cache.close()


# -- anything at all -------------------------------------------------------------------------------


def history(device: Device, seed: int, steps: int, groups: str) -> dict[str, int]:
    """Sequences that go on from each other, in a pool too small for them, over a tier."""
    rng = random.Random(seed)
    tier = host(60, policy=rng.choice(["write-through", "write-back"]))
    cache = cache_of([tier], pages=24, groups=groups, options=OPTIONS)
    prompts = [words(number, 6 * PAGE + 3) for number in range(3)]
    found = {"reused": 0, "runs": 0, "out of pages": 0}
    for _ in range(steps):
        prompt = rng.choice(prompts)
        if rng.random() < 0.2:
            prompt = prompt[: rng.randrange(len(prompt))] + words(rng.randrange(99), 2 * PAGE)
            prompts.append(prompt[: 10 * PAGE])
        try:
            found["reused"] += run(cache, prompt[: 10 * PAGE], more=rng.randrange(3))
            found["runs"] += 1
        except OutOfPagesError:  # copies that never end keep their pages
            gc.collect()
            found["out of pages"] += 1
        if rng.random() < 0.5:
            cache.flush(0.2)
            cache.clear()
            scramble(cache)
    stats = check(cache)
    found |= {"promoted": stats.tiers[0].promoted, "failed": stats.promotions_failed}
    for copies in device.copies:
        copies.close()
    cache.close()
    return found


@pytest.mark.parametrize(
    ("shares", "seeds"),
    [({}, 2), ({"corrupts": 0.1}, 2), ({"fails": 0.1}, 2), ({"never": 0.02}, 2),
     ({"corrupts": 0.05, "fails": 0.05, "never": 0.01}, 2)],
)  # fmt: skip
@pytest.mark.parametrize("groups", ["full", "full and window"])
def test_no_wrong_bytes_whatever_copies_do(monkeypatch, caplog, shares, seeds, groups):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    total: dict[str, int] = {}
    for seed in range(seeds):
        with monkeypatch.context() as patch:
            device = Device(patch, "thread", seed, delay=2e-4, **shares)
            for name, count in history(device, seed, 25, groups).items():
                total[name] = total.get(name, 0) + count
    assert total["runs"] > 10 * seeds
    assert total["promoted"] > 0
    if "never" not in shares:
        assert total["out of pages"] == 0
    if "corrupts" in shares or "fails" in shares:
        assert total["failed"] > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_no_wrong_bytes_for_long(monkeypatch, caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    rng = random.Random(0)
    for seed in range(200):
        shares = {name: rng.choice([0, 0.02, 0.1]) for name in ("corrupts", "fails", "never")}
        with monkeypatch.context() as patch:
            device = Device(patch, "thread", seed, delay=2e-4, **shares)
            assert history(device, seed, 60, rng.choice(["full", "full and window"]))["runs"]
