"""The simulated device does what a test of the mover counts on."""

import threading

import numpy as np
import pytest
import torch

from kvpaged.errors import UsageError
from kvpaged.offload.cpu_copies import CpuCopies
from kvpaged.testing.simulated import SimulatedCopies
from tests.offload.pooled import LAYOUTS, make, records_of, sums_of


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, np.int32)


def simulated(page_class, **options) -> SimulatedCopies:
    return SimulatedCopies(CpuCopies(page_class, "cpu"), **{"seed": 1, **options})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_move_when_it_is_told_to(layout):
    page_class = make("plain", layout)
    copies = simulated(page_class)
    pages = ids(4, 5, 1)
    records = torch.zeros_like(records_of(page_class, pages))
    ticket = copies.out(pages, records)
    assert not records.any()
    assert not ticket.wait(0)
    assert copies.advance(2) == 2
    assert not ticket.wait(0)
    assert sum(bool(row.any()) for row in records) == 2
    assert copies.advance(5) == 1
    assert ticket.wait(0)
    assert torch.equal(records, records_of(page_class, pages))
    assert copies.in_flight() == 0


def test_a_page_reused_in_flight_leaves_the_wrong_bytes():
    page_class = make()
    copies = simulated(page_class)
    before = records_of(page_class, ids(3))
    records = torch.zeros_like(before)
    ticket = copies.out(ids(3), records)
    page_class.layers[0].k_pages[int(page_class.entries(ids(3))[0])] = 1.0
    ticket.order()
    assert not torch.equal(records, before)
    assert torch.equal(records, records_of(page_class, ids(3)))


def test_copies_end_in_another_order_and_the_same_for_a_seed():
    def ends(seed: int) -> list[int]:
        page_class = make()
        copies = simulated(page_class, seed=seed)
        tickets = [
            copies.out(ids(page), torch.empty_like(records_of(page_class, ids(page))))
            for page in range(8)
        ]
        order: list[int] = []
        while copies.advance():
            order += [n for n, ticket in enumerate(tickets) if ticket.wait(0) and n not in order]
        return order

    assert sorted(ends(1)) == list(range(8))
    assert ends(1) == ends(1) != ends(2)
    assert ends(1) != sorted(ends(1))


def test_some_never_end_and_some_fail():
    page_class = make()
    copies = simulated(page_class, never=0.4, fails=0.3, drive="wait")
    tickets = [
        copies.out(ids(page, page + 1), torch.empty_like(records_of(page_class, ids(0, 1))))
        for page in range(10)
    ]
    ended = [ticket for ticket in tickets if ticket.wait(0)]
    failed = 0
    for ticket in ended:
        try:
            assert ticket.sums().shape == (2, 3)
        except RuntimeError:
            failed += 1
    assert 0 < failed < len(ended) < len(tickets)
    assert copies.in_flight() == len(tickets) - len(ended)
    for ticket in tickets:
        if ticket not in ended:
            with pytest.raises(UsageError, match="never ends"):
                ticket.wait()
            with pytest.raises(UsageError, match="never ends"):
                ticket.order()
            with pytest.raises(UsageError, match="before it had ended"):
                ticket.sums()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flipped_bits_are_found(layout):
    page_class = make("unlike widths", layout)
    pages = ids(*range(10))
    records = records_of(page_class, pages)
    sums = sums_of(page_class, records)
    copies = simulated(page_class, corrupts=0.5, drive="wait")
    ticket = copies.into(pages, records, sums, slice(1, 2))
    assert ticket.wait()
    differ = (records_of(page_class, pages) != records).any(1).numpy()
    assert 0 < differ.sum() < 10
    assert np.array_equal(ticket.wrong(), differ)
    assert torch.equal(records, records_of(make("unlike widths", layout), pages))


def test_a_thread_moves_them_while_others_wait():
    page_class = make()
    copies = simulated(page_class, drive="thread", delay=1e-4)
    pages = ids(*range(6))
    records = [torch.zeros_like(records_of(page_class, pages)) for _ in range(4)]
    waited: list[bool] = []

    def work(mine: torch.Tensor) -> None:
        waited.append(copies.out(pages, mine).wait(60))

    threads = [threading.Thread(target=work, args=(each,)) for each in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    copies.close()
    assert waited == [True] * 4
    assert copies.moved == 24
    assert all(torch.equal(each, records_of(page_class, pages)) for each in records)


def test_no_pages():
    page_class = make()
    copies = simulated(page_class, never=1.0)
    none = records_of(page_class, ids())
    assert copies.out(ids(), none).wait()
    assert copies.into(ids(), none, np.empty((0, 3), np.int64), slice(0, 3)).wrong().shape == (0,)
