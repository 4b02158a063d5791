"""The prefix index by itself, over an allocator whose pages hold nothing."""

import os

import numpy as np
import pytest

from kvpaged.errors import IntegrityError, OutOfPagesError
from kvpaged.keys import Region, encode_tokens
from kvpaged.pages.allocator import CACHED, SEALED, PageAllocator
from kvpaged.pages.frames import FrameBudget
from kvpaged.pages.prefix import PrefixIndex
from kvpaged.pages.trail import Trail

PAGE = 16


class Shelf:
    """An index of one group and sequences that put pages into it."""

    def __init__(self, pages: int = 64, window: int | None = None) -> None:
        self.allocator = PageAllocator(frames=FrameBudget(1), pages_per_frame=pages, extent=4)
        self.index = PrefixIndex([self.allocator], [window], PAGE)

    def put(self, tokens: list[int], trail: Trail | None = None, *, hold: bool = False) -> Trail:
        """Enter the full pages of a sequence; without `hold` let go of them."""
        trail = trail or Trail(self.index.root(b"n"))
        held = []
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            page = int(self.allocator.alloc(1)[0])
            self.allocator.states[page] = SEALED
            data = encode_tokens(np.array(tokens[start : start + PAGE]))
            node = self.index.enter(trail, data, [page])
            assert node is not None
            kept = node.pages[0]
            assert kept is not None
            if kept != page:  # those tokens were there
                self.allocator.share(np.array([kept], np.int32))
                self.allocator.release(np.array([page], np.int32))
            held.append(kept)
        if not hold:
            self.allocator.release(np.array(held, np.int32))
        self.index.check_integrity()
        self.allocator.check_integrity()
        return trail

    def found(self, tokens: list[int], trail: Trail | None = None) -> int:
        trail = trail or Trail(self.index.root(b"n"))
        match = self.index.find(trail, encode_tokens(np.array(tokens)), len(tokens))
        return match.longest(len(tokens))


def test_full_pages_are_found_and_the_page_that_agrees_most():
    shelf = Shelf()
    root = shelf.put(list(range(40)))
    shelf.put([*range(16), *range(50, 70)])
    shelf.put([*range(16), 50, 51, 9, *range(90, 110)])
    assert root.node.depth == 2
    assert shelf.found(list(range(40))) == 32
    assert shelf.found([*range(16), 50, 51, 9, 90, 3]) == 20
    assert shelf.found([*range(16), 50, 51, 52, 1]) == 19
    assert shelf.found([*range(16), 49]) == 16
    assert shelf.found([1, 2]) == 0
    assert shelf.found([0]) == 1
    assert shelf.found([]) == 0


def test_the_same_tokens_have_one_page():
    shelf = Shelf()
    shelf.put(list(range(48)), hold=True)
    shelf.put(list(range(48)), hold=True)
    assert shelf.index.pages() == 3
    assert shelf.allocator.used_pages() == 3
    assert shelf.allocator.refs.max() == 2


def test_namespaces_and_extras_do_not_meet():
    shelf = Shelf()
    shelf.put(list(range(32)))
    for other in (shelf.index.root(b"m"), shelf.index.root(b"n", b"long")):
        assert shelf.found(list(range(32)), Trail(other)) == 0
        shelf.put(list(range(32)), Trail(other))
        assert shelf.found(list(range(32)), Trail(other)) == 32
    assert shelf.index.pages() == 6


def test_a_salt_counts_from_its_page_on():
    shelf = Shelf()
    root = shelf.index.root(b"n")
    tokens = list(range(64))

    def trail(salt: bytes | None) -> Trail:
        return Trail(root, salt, 2)

    shelf.put(tokens, trail(b"a"))
    assert shelf.found(tokens, trail(b"a")) == 64
    assert shelf.found(tokens, trail(b"b")) == 32
    assert shelf.found(tokens, trail(None)) == 32
    assert shelf.found(tokens, Trail(root, b"a", 1)) == 16
    keys = {node.key for node in shelf.index.nodes()}
    shelf.put(tokens, trail(b"b"))
    assert len({node.key for node in shelf.index.nodes()} - keys) == 2


def test_a_search_under_a_salt_visits_no_page_of_another():
    """Not in the answer, and not in the work done for it."""
    tokens = list(range(200))
    work = {}
    for others in (0, 1, 50):
        shelf = Shelf(pages=1024)
        root = shelf.index.root(b"n")
        for other in range(others):
            shelf.put(tokens, Trail(root, f"other {other}".encode()))
        before = shelf.index.visited
        assert shelf.found(tokens, Trail(root, b"mine")) == 0
        work[others] = shelf.index.visited - before
    assert len(set(work.values())) == 1


def test_leaves_go_first_and_the_oldest_of_them():
    shelf = Shelf(pages=8)
    shelf.put(list(range(48)))
    shelf.put([*range(16), *range(100, 132)])
    assert shelf.allocator.cached_pages() == 5
    order = []
    while shelf.allocator.cached_pages():
        before = shelf.found(list(range(48))), shelf.found([*range(16), *range(100, 132)])
        shelf.allocator.evict_oldest()
        shelf.index.check_integrity()
        shelf.allocator.check_integrity()
        order.append(before)
    assert order == [(48, 48), (32, 48), (16, 48), (16, 32), (16, 16)]
    assert shelf.index.pages() == 0


def test_eviction_makes_room_and_stops_before_pages_that_are_held():
    shelf = Shelf(pages=8)
    shelf.put(list(range(32)), hold=True)
    shelf.put(list(range(100, 196)))
    assert shelf.allocator.available() == 6
    assert shelf.allocator.alloc(5).size == 5
    shelf.index.check_integrity()
    shelf.allocator.check_integrity()
    assert shelf.found(list(range(32))) == 32
    with pytest.raises(OutOfPagesError, match="2 more pages are needed and 1 of 8"):
        shelf.allocator.alloc(2)


def test_a_request_that_can_not_be_met_evicts_nothing():
    shelf = Shelf(pages=8)
    shelf.put(list(range(64)))
    with pytest.raises(OutOfPagesError):
        shelf.allocator.alloc(9)
    assert shelf.found(list(range(64))) == 64


def test_a_cached_page_that_is_taken_up_again_is_the_same_page():
    shelf = Shelf()
    shelf.put(list(range(16)))
    page = int(np.flatnonzero(shelf.allocator.states == CACHED)[0])
    generation = int(shelf.allocator.generations[page])
    shelf.allocator.share(np.array([page], np.int32))
    assert shelf.allocator.states[page] == SEALED
    assert shelf.allocator.generations[page] == generation
    shelf.allocator.release(np.array([page], np.int32))
    assert shelf.allocator.cached_pages() == 1
    shelf.index.clear()
    assert shelf.allocator.generations[page] == generation + 1


def test_cutting_a_trail_goes_back_to_where_it_was():
    shelf = Shelf()
    trail = shelf.put(list(range(64)), Trail(shelf.index.root(b"n"), b"s", 2), hold=True)
    trail.cut(3)
    shelf.put(list(range(200, 216)), trail)
    assert shelf.found([*range(48), *range(200, 216)], Trail(shelf.index.root(b"n"), b"s", 2)) == 64
    trail.cut(1)
    assert trail.node.depth == 1
    shelf.put(list(range(300, 332)), trail)
    assert shelf.found([*range(16), *range(300, 332)], Trail(shelf.index.root(b"n"), b"s", 2)) == 48
    assert shelf.found([*range(16), *range(300, 332)]) == 32, "the salt begins at the third page"


def test_regions_that_nobody_uses_are_forgotten():
    shelf = Shelf()
    for name in range(50):
        shelf.put(list(range(16)), Trail(shelf.index.root(b"n"), str(name).encode()))
    root = shelf.index.root(b"n")
    assert root.has_salts()
    shelf.index.clear()
    assert not root.has_salts()
    assert root.salted(b"7", make=False) is None


def test_work_is_linear_in_the_prompt_and_each_page_is_hashed_once(monkeypatch):
    hashed = []
    original = Region.page_key

    def count(self: Region, before: bytes, tokens: bytes) -> bytes:
        hashed.append(tokens)
        return original(self, before, tokens)

    shelf = Shelf(pages=5000)
    shelf.index.check_integrity = lambda: None  # type: ignore[method-assign]
    monkeypatch.setattr(Region, "page_key", count)
    rng = np.random.default_rng(0)
    work = []
    for pages in (100, 200, 400, 800):
        tokens = rng.integers(0, 1000, pages * PAGE).tolist()
        hashed.clear()
        shelf.put(tokens)
        assert len(hashed) == pages, "once a page"
        before = shelf.index.visited
        assert shelf.found([*tokens, 1]) == pages * PAGE
        assert len(hashed) == pages, "a search hashes nothing"
        work.append(shelf.index.visited - before)
    assert work == [101, 201, 401, 801]
    # Turns of a chat: every page is hashed once over all turns.
    hashed.clear()
    chat: list[int] = []
    for _ in range(20):
        chat += rng.integers(0, 1000, 5 * PAGE).tolist()
        shelf.put(chat)
    assert len(hashed) == 100


def test_many_continuations_are_searched_by_halves():
    """The page that agrees in part is found among thousands by a few comparisons."""
    shelf = Shelf(pages=4096)
    shelf.index.check_integrity = lambda: None  # type: ignore[method-assign]
    rng = np.random.default_rng(1)
    for _ in range(3000):
        shelf.put([5, *rng.integers(0, 2**31, PAGE - 1).tolist()])
    before = shelf.index.visited
    assert shelf.found([5, 2**31]) == 1
    assert shelf.index.visited - before == 2


def test_integrity_sees_a_key_of_other_tokens_and_a_lost_page():
    shelf = Shelf()
    trail = shelf.put(list(range(32)))
    trail.node.key, kept = os.urandom(16), trail.node.key
    with pytest.raises(IntegrityError, match="key of other tokens"):
        shelf.index.check_integrity()
    trail.node.key = kept
    shelf.allocator.depths[trail.node.pages[0]] = 0
    with pytest.raises(IntegrityError, match="kept and in no tree"):
        shelf.index.check_integrity()
