"""The allocator against a plain model: random histories, books checked after every step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.errors import IntegrityError, OutOfPagesError
from kvpaged.pages.allocator import FREE, OPEN, Lease, PageAllocator
from kvpaged.pages.frames import FrameBudget, plan_frames


def single(pages: int, extent: int = 4) -> PageAllocator:
    return PageAllocator(frames=FrameBudget(1), pages_per_frame=pages, extent=extent)


def test_pages_of_one_call_are_one_run():
    allocator = single(64)
    assert allocator.alloc(10).tolist() == list(range(10))


def test_a_sequence_grows_into_the_room_its_run_left():
    allocator = single(64)
    a, b = int(allocator.alloc(1)[0]), int(allocator.alloc(1)[0])
    grown = [int(allocator.alloc(1, after=a)[0]), int(allocator.alloc(1, after=b)[0])]
    assert (a, b, grown) == (0, 4, [1, 5])


def test_room_left_for_growth_is_used_when_nothing_else_is_left():
    allocator = single(8)
    first, second = allocator.alloc(1), allocator.alloc(1)
    rest = allocator.alloc(6)
    assert sorted([*first, *second, *rest]) == list(range(8))
    assert allocator.available() == 0


def test_too_many_pages_are_an_error_that_changes_nothing():
    allocator = single(8)
    allocator.alloc(3)
    with pytest.raises(OutOfPagesError, match="6 more pages are needed and 5 of 8") as caught:
        allocator.alloc(6)
    assert (caught.value.needed, caught.value.available) == (6, 5)
    allocator.check_integrity()
    assert allocator.alloc(5).size == 5


def test_shared_pages_come_back_with_their_last_holder():
    allocator = single(8)
    pages = allocator.alloc(3)
    allocator.share(pages)
    allocator.share(np.concatenate((pages[:1], pages[:1])))
    allocator.release(pages)
    assert allocator.used_pages() == 3
    allocator.release(np.concatenate((pages, pages[:1], pages[:1])))
    assert allocator.used_pages() == 0
    allocator.check_integrity()


def test_releasing_more_often_than_held_is_caught():
    allocator = single(8)
    pages = allocator.alloc(1)
    allocator.release(pages)
    with pytest.raises(AssertionError, match="more often"):
        allocator.release(pages)


def test_a_leased_page_is_not_reused_and_its_generation_tells():
    allocator = single(4)
    pages = allocator.alloc(4)
    lease = allocator.lease(pages[1:2])
    allocator.release(pages)
    taken = allocator.alloc(3)
    assert int(pages[1]) not in taken
    assert allocator.available() == 0
    assert not allocator.end_lease(lease), "the page was given up meanwhile: another generation"
    assert allocator.alloc(1).tolist() == [int(pages[1])]
    allocator.check_integrity()


def test_a_lease_on_a_page_still_held_ends_current():
    allocator = single(4)
    pages = allocator.alloc(2)
    lease = allocator.lease(pages)
    assert allocator.end_lease(lease)
    assert allocator.used_pages() == 2


def test_integrity_notices_a_corrupted_count():
    allocator = single(8)
    allocator.alloc(2)
    allocator.refs[0] = 0
    with pytest.raises(IntegrityError, match="page 0"):
        allocator.check_integrity()


@pytest.mark.parametrize("extent", [1, 3, 4, 16])
def test_a_random_history_keeps_the_books(extent: int):
    rng = np.random.default_rng(extent)
    allocator = single(101, extent)
    held: list[np.ndarray] = []
    leases: list[Lease] = []
    for _ in range(600):
        action = rng.integers(5)
        if action <= 1:
            count = int(rng.integers(1, 12))
            after = int(held[-1][-1]) if held and rng.random() < 0.7 else None
            try:
                held.append(allocator.alloc(count, after))
            except OutOfPagesError:
                assert allocator.available() < count
        elif action == 2 and held:
            allocator.release(held.pop(int(rng.integers(len(held)))))
        elif action == 3 and held:
            pages = held[int(rng.integers(len(held)))]
            allocator.share(pages)
            held.append(pages)
        elif leases and rng.random() < 0.5:
            allocator.end_lease(leases.pop())
        elif held:
            leases.append(allocator.lease(held[0]))
        allocator.check_integrity()
        flat = np.concatenate(held) if held else np.empty(0, np.int32)
        assert (np.bincount(flat, minlength=101) == allocator.refs).all()
        assert ((allocator.states == OPEN) == (allocator.refs > 0)).all()
    for pages in held:
        allocator.release(pages)
    while leases:
        allocator.end_lease(leases.pop())
    assert allocator.available() == 101
    assert (allocator.states == FREE).all()


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    moves=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9), st.booleans()), max_size=60),
)
def test_two_classes_share_one_budget_of_frames(sizes, moves):
    frames = FrameBudget(6)
    classes = [PageAllocator(frames=frames, pages_per_frame=n, extent=4) for n in sizes]
    held: tuple[list, list] = ([], [])
    for which, count, give_back in moves:
        allocator, mine = classes[which], held[which]
        if give_back and mine:
            allocator.release(mine.pop())
        else:
            free = allocator.available()
            if count <= free:
                mine.append(allocator.alloc(count))
            else:
                with pytest.raises(OutOfPagesError):
                    allocator.alloc(count)
        for each in classes:
            each.check_integrity()
        owned = sum(len(each._used) for each in classes)
        assert owned + len(frames.free_frames()) == 6


def test_an_empty_frame_goes_to_the_class_that_needs_it():
    frames = FrameBudget(2)
    given_back: list[int] = []
    a = PageAllocator(frames=frames, pages_per_frame=4, extent=4, on_surrender=given_back.append)
    b = PageAllocator(frames=frames, pages_per_frame=10, extent=4)
    pages = a.alloc(8)
    with pytest.raises(OutOfPagesError, match="0 of 20 are free"):
        b.alloc(1)
    a.release(pages[:4])
    assert b.available() == 10
    assert b.alloc(10).size == 10
    assert given_back == [0]
    with pytest.raises(OutOfPagesError):
        a.alloc(1)


@pytest.mark.parametrize("sizes", [(1_843_200, 368_640), (983_040, 196_608), (600_064, 100_096)])
def test_little_of_the_budget_is_lost_to_rounding_and_fragmentation(sizes):
    """Sequences that hold pages of both classes come and go at the brink of full.

    Each time one does not fit, what the pool has left beyond what it asked for is lost to frames
    that are cut the wrong way. On average that is under 1 %, rounding included; 3 % is the bound.
    """
    budget = 1 << 30
    plan = plan_frames(budget, sizes, unit=256)
    frames = FrameBudget(plan.frames)
    classes = [
        PageAllocator(frames=frames, pages_per_frame=n, extent=4) for n in plan.pages_per_frame
    ]
    rng = np.random.default_rng(0)
    held: list[list[np.ndarray]] = []
    lost = []
    for _ in range(3000):
        tokens = int(rng.integers(1, 40))
        wanted = (min(tokens, 9), tokens)  # the first class is that of a window
        taken: list[np.ndarray] = []
        try:
            for allocator, count in zip(classes, wanted, strict=True):
                taken.append(allocator.alloc(count))
            held.append(taken)
            continue
        except OutOfPagesError:
            for allocator, pages in zip(classes, taken, strict=False):
                allocator.release(pages)
        used = sum(a.used_pages() * size for a, size in zip(classes, sizes, strict=True))
        asked = sum(n * size for n, size in zip(wanted, sizes, strict=True))
        lost.append(max(0.0, 1 - (used + asked) / budget))
        for allocator, pages in zip(classes, held.pop(int(rng.integers(len(held)))), strict=True):
            allocator.release(pages)
    assert len(lost) > 500
    assert float(np.mean(lost)) < 0.03
    assert max(lost) < 0.08


def test_memory_that_was_another_classs_is_known_to_be_used():
    frames = FrameBudget(2)
    first, second = (PageAllocator(frames=frames, pages_per_frame=4, extent=2) for _ in range(2))
    held = first.alloc(8)
    assert (first.generations[held] == 0).all()
    first.release(held)
    taken = second.alloc(4)
    assert (second.generations[taken] > 0).all()
    for allocator in (first, second):
        allocator.check_integrity()
