"""A device whose copies end late, in any order, wrong, or never: nobody ever sees other bytes, and
what a copy reads or writes is nobody else's until it has ended.
"""

import gc
import threading

import numpy as np
import pytest
import torch

from kvpaged import PagedKVCache
from kvpaged.errors import IntegrityError, OutOfPagesError
from kvpaged.loading import Ahead
from kvpaged.offload import pool
from kvpaged.offload.promotion import LoadError, Promotion
from kvpaged.pages import room
from kvpaged.testing.dense import DIM, LAYERS, PAGE
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.host import HostTier
from kvpaged.tiers.record import Head
from tests.offload.late import (
    OPTIONS,
    Device,
    filled,
    flushed,
    leased,
    loading,
    nothing_left,
    without_leases,
)
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
    monkeypatch.setattr(room, "LEASES_S", 30.0 if ends else 0.1)
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
