"""Pages of two classes under one numbering: a group's exact pages, and those that are sealed
compressed.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvpaged.errors import OutOfPagesError
from kvpaged.pages.allocator import Lease, PageAllocator
from kvpaged.pages.extents import Ids
from kvpaged.pages.pool import PageClass, SealedClass


class MixedAllocator:
    """Who holds which page of a group whose full pages are compressed.

    Page ids below `first_sealed` are exact pages, open ones and those that stay exact; others are
    `first_sealed` and more than a page of the compressed class. Everything else is as of a
    `PageAllocator`; the two share a budget of frames.

    Not thread-safe: the cache's lock is held around every call. Invariant: `refs`, `states`,
    `depths` and `generations` are the arrays that the two allocators work on, side by side.
    """

    def __init__(self, exact: PageAllocator, sealed: PageAllocator) -> None:
        self.exact, self.sealed = exact, sealed
        self.first_sealed = exact.capacity
        self.capacity = exact.capacity + sealed.capacity
        self.refs = np.concatenate((exact.refs, sealed.refs))
        self.states = np.concatenate((exact.states, sealed.states))
        self.depths = np.concatenate((exact.depths, sealed.depths))
        self.generations = np.concatenate((exact.generations, sealed.generations))
        for name in ("refs", "states", "depths", "generations"):
            both = getattr(self, name)
            setattr(exact, name, both[: self.first_sealed])
            setattr(sealed, name, both[self.first_sealed :])
        self._on_evict: Callable[[int], None] | None = None

    # -- asking ------------------------------------------------------------------------------------

    @property
    def on_evict(self) -> Callable[[int], None] | None:
        """Called with each page that is evicted, before it is free."""
        return self._on_evict

    @on_evict.setter
    def on_evict(self, call: Callable[[int], None] | None) -> None:
        self._on_evict = self.exact.on_evict = call
        first = self.first_sealed
        self.sealed.on_evict = None if call is None else lambda page: call(first + page)

    @property
    def reopened(self) -> int:
        """Sealed pages that took tokens again, after a rewind."""
        return self.exact.reopened + self.sealed.reopened

    @property
    def lost(self) -> int:
        """Sealed pages that were freed with their last reference, not being kept."""
        return self.exact.lost + self.sealed.lost

    def is_sealed(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which pages are of the compressed class."""
        found: npt.NDArray[np.bool_] = ids >= self.first_sealed
        return found

    def held_back(self) -> int:
        """Pages that nobody holds and that will be free, or could be, once a lease ends."""
        return self.exact.held_back() + self.sealed.held_back()

    def used_pages(self) -> int:
        """Pages with a reference, or free but for a lease."""
        return self.exact.used_pages() + self.sealed.used_pages()

    def cached_pages(self) -> int:
        """Pages kept that nobody holds."""
        return self.exact.cached_pages() + self.sealed.cached_pages()

    def oldest_cached(self, most: int) -> list[int]:
        """Pages that will be evicted first, at most so many: of the compressed class before exact
        ones, which are the first of their sequences.
        """
        deep = [self.first_sealed + page for page in self.sealed.oldest_cached(most)]
        return deep + self.exact.oldest_cached(most - len(deep))

    # -- taking and giving back --------------------------------------------------------------------

    def alloc(self, count: int, after: int | None = None) -> Ids:
        """Take `count` exact pages: see `PageAllocator.alloc`."""
        return self.exact.alloc(count, self._exact_after(after))

    def alloc_sealed(self, count: int, after: int | None = None) -> Ids:
        """Take `count` pages of the compressed class."""
        mine = None if after is None or after < self.first_sealed else after - self.first_sealed
        return self.sealed.alloc(count, mine) + np.int32(self.first_sealed)

    def alloc_both(self, compressed: npt.NDArray[np.bool_], after: int | None = None) -> Ids:
        """Take a page for each of some places in order, of the class it is to be of.

        Raises:
            OutOfPagesError: fewer of either are available; nothing is held.
        """
        ids, many = np.empty(len(compressed), np.int32), int(compressed.sum())
        ids[~compressed] = self.alloc(len(ids) - many, after)
        try:
            ids[compressed] = self.alloc_sealed(many, after)
        except OutOfPagesError:
            self.release(ids[~compressed])
            raise
        return ids

    def alloc_each(self, after: list[int]) -> Ids:
        """Take an exact page for each of some sequences: see `PageAllocator.alloc_each`."""
        last = self.first_sealed - 1  # nothing follows it
        return self.exact.alloc_each([page if page < last else last for page in after])

    def check_room(self, exact: int, sealed: int = 0) -> None:
        """Raise `OutOfPagesError` unless so many pages of each could be had, were the others not
        wanted; nothing changes.
        """
        if exact:
            self.exact.check_room(exact)
        if sealed:
            try:
                self.sealed.check_room(sealed)
            except OutOfPagesError as error:
                raise OutOfPagesError(
                    f"{error} (of compressed pages)", needed=error.needed,
                    available=error.available,
                ) from None  # fmt: skip

    def share(self, ids: Ids) -> None:
        """Add one reference for each occurrence of a page in `ids`; all must be held, or cached."""
        exact, sealed = self._split(ids)
        if exact.size:
            self.exact.share(exact)
        if sealed.size:
            self.sealed.share(sealed)

    def reopen(self, ids: Ids) -> None:
        """Exact pages that one row holds take tokens again."""
        self.exact.reopen(ids)

    def keep(self, page: int, depth: int) -> None:
        """Keep a sealed page somebody holds for reuse, at this place (from 1) of its sequence."""
        if page < self.first_sealed:
            self.exact.keep(page, depth)
        else:
            self.sealed.keep(page - self.first_sealed, depth)

    def release(self, ids: Ids) -> None:
        """Drop one reference for each occurrence of a page in `ids`; compressed pages first, which
        come after exact ones in their sequences.
        """
        exact, sealed = self._split(ids)
        if sealed.size:
            self.sealed.release(sealed)
        if exact.size:
            self.exact.release(exact)

    def evict_oldest(self) -> bool:
        """Free the page, of either class, that has waited longest; false if none waits."""
        waiting = [
            (time, n) for n, each in enumerate((self.exact, self.sealed))
            if (time := each.oldest()) is not None
        ]  # fmt: skip
        return bool(waiting) and (self.exact, self.sealed)[min(waiting)[1]].evict_oldest()

    def drop(self, page: int) -> None:
        """Free a cached page, and tell nobody."""
        if page < self.first_sealed:
            self.exact.drop(page)
        else:
            self.sealed.drop(page - self.first_sealed)

    # -- copies in flight --------------------------------------------------------------------------

    def lease(self, ids: Ids) -> Lease:
        """Keep these pages from being reused until `end_lease`."""
        for allocator, mine in zip((self.exact, self.sealed), self._split(ids), strict=True):
            if mine.size:
                allocator.lease(mine)
        return Lease(ids.copy(), self.generations[ids])

    def end_lease(self, lease: Lease) -> bool:
        """End a lease, once. True if every page is still the one that was leased."""
        compressed = self.is_sealed(lease.ids)
        current = True
        for allocator, chosen, first in (
            (self.exact, ~compressed, 0), (self.sealed, compressed, self.first_sealed),
        ):  # fmt: skip
            if chosen.any():
                ids = (lease.ids[chosen] - first).astype(np.int32)
                current &= allocator.end_lease(Lease(ids, lease.generations[chosen]))
        return current

    def check_integrity(self) -> None:
        """Raise `IntegrityError` naming the first invariant that does not hold."""
        self.exact.check_integrity()
        self.sealed.check_integrity()

    # -- inside ------------------------------------------------------------------------------------

    def _split(self, ids: Ids) -> tuple[Ids, Ids]:
        """Exact pages, and compressed ones by the numbers of their class."""
        compressed = self.is_sealed(ids)
        if not compressed.any():
            return ids, ids[:0]
        return ids[~compressed], (ids[compressed] - self.first_sealed).astype(np.int32)

    def _exact_after(self, after: int | None) -> int | None:
        return after if after is not None and after < self.first_sealed else None


class MixedClass:
    """A layer group's pages of both classes, as one.

    Attributes:
        exact, sealed: the classes.
        keep: logical pages of a sequence, from the first on, that stay exact when they are full.
        allocator: both allocators under one numbering.
        geometry, flat, layers: of the exact class: what open pages are.
    """

    def __init__(self, exact: PageClass, sealed: SealedClass, keep: int) -> None:
        self.exact, self.sealed, self.keep = exact, sealed, keep
        self.allocator = MixedAllocator(exact.allocator, sealed.allocator)
        self.geometry, self.flat, self.layers = exact.geometry, exact.flat, exact.layers

    def entries(self, ids: Ids) -> Ids:
        """Block-table entries (int32) of page ids, each of its class."""
        compressed = self.allocator.is_sealed(ids)
        if not compressed.any():
            return self.exact.entries(ids)
        found = np.empty(ids.shape, np.int32)
        found[~compressed] = self.exact.entries(ids[~compressed])
        found[compressed] = self.sealed.entries(self.numbers(ids[compressed]))
        return found

    def numbers(self, ids: Ids) -> Ids:
        """The numbers of compressed pages within their class."""
        numbers: Ids = (ids - self.allocator.first_sealed).astype(np.int32)
        return numbers

    def bytes_held(self, ids: Ids) -> int:
        """Bytes of the budget that these pages, each named once, take."""
        compressed = int(self.allocator.is_sealed(ids).sum())
        exact = self.exact.bytes_of(len(ids) - compressed)
        return exact + self.sealed.bytes_of(compressed)

    def sequence_bytes(self, tokens: int, first: int) -> int:
        """See `PageClass.sequence_bytes`."""
        full, rest = divmod(tokens, self.geometry.page_size)
        compressed = full - max(min(self.keep, full), first)
        exact = full - first - compressed + (rest > 0)
        return self.exact.bytes_of(exact) + self.sealed.bytes_of(compressed)

    # What admission counts in: compressed pages; exact ones are so many of them, rounded up.

    @property
    def unit_bytes(self) -> int:
        """See `PageClass.unit_bytes`."""
        return self.sealed.geometry.page_bytes

    @property
    def open_cost(self) -> int:
        """See `PageClass.open_cost`."""
        return -(-self.geometry.page_bytes // self.unit_bytes)

    def cost(self, pages: int) -> int:
        """See `PageClass.cost`."""
        exact = min(pages, self.keep + 1)
        return exact * self.open_cost + pages - exact

    def units(self) -> int:
        """See `PageClass.units`."""
        return self.sealed.allocator.capacity

    def available_units(self) -> int:
        """See `PageClass.available_units`."""
        exact = self.exact.allocator
        return self.sealed.allocator.available() + self.open_cost * (
            exact.free_pages + exact.cached_pages()
        )

    def room_units(self) -> int:
        """See `PageClass.room_units`."""
        return self.sealed.allocator.room() + self.open_cost * self.exact.allocator.free_pages


AnyAllocator = PageAllocator | MixedAllocator
AnyClass = PageClass | MixedClass
