"""Who holds which page of a class: free pages, reference counts, generations, leases, and pages
nobody holds that are kept for reuse.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpaged.errors import IntegrityError, OutOfPagesError
from kvpaged.pages.extents import FreeRuns, Ids
from kvpaged.pages.frames import FrameBudget

FREE, OPEN, SEALED, CACHED = 0, 1, 2, 3
"""States of a page. Open pages take new tokens; sealed ones are full, and immutable while anyone
else holds them or they are to be kept; cached ones are sealed, kept, and held by nobody.
"""

FEW = 8
"""Pages up to which releasing one by one beats array operations."""


class Lease(NamedTuple):
    """Pages a copy in flight reads or writes, with the generation each had; none is reused before
    `end_lease`.
    """

    ids: Ids
    generations: npt.NDArray[np.int64]


class PageAllocator(FreeRuns):
    """Pages of one class, in runs where possible.

    A page marked by `keep` is not freed with its last reference: it waits, evictable, until `share`
    takes it up again or memory is needed. Waiting pages go in the order they were released, those
    released at once the deepest first: no page goes before one that follows it in its sequence.

    Not thread-safe: the cache's lock is held around every call. Invariants:
      1. A page is in a free mask exactly if its frame is owned, its references are 0, it is not
          cached and it has no lease.
      2. `free_pages` is the number of bits in all masks.
      3. A page's generation grows each time it becomes free, and never otherwise: it is 0 as long
         as nobody has held the page, nor its memory as a page of another class.
      4. `_cached` has exactly the pages in state CACHED; each is kept (`depths` above 0).
    """

    def __init__(
        self,
        *,
        frames: FrameBudget,
        pages_per_frame: int,
        extent: int,
        on_surrender: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            frames: the budget that frames come from; this allocator registers itself as an owner.
            pages_per_frame: pages a frame is cut into; page ids are `frame * pages_per_frame +
                place`.
            extent: pages an extent has (1 to 32).
            on_surrender: called with the number of a frame that is given back, after its pages are
                forgotten.
        """
        super().__init__(frames, pages_per_frame, extent)
        self.refs = np.zeros(self.capacity, np.int32)
        self.states = np.zeros(self.capacity, np.uint8)
        self.depths = np.zeros(self.capacity, np.int32)
        """Of pages to keep, their place in their sequence, from 1; 0 for all others."""
        self.on_evict: Callable[[int], None] | None = None
        """Called with each page that is evicted, before it is free."""
        self._cached: OrderedDict[int, int] = OrderedDict()  # page -> when it was released
        self._on_surrender = on_surrender
        self._leases: dict[int, int] = {}
        self.reopened = 0
        """Sealed pages that took tokens again, after a rewind."""
        self.lost = 0
        """Sealed pages that were freed with their last reference, not being kept."""
        frames.register(self)

    # -- asking ------------------------------------------------------------------------------------

    def available(self) -> int:
        """Pages that `alloc` could still hand out: free ones, cached ones, and those of frames that
        are empty or hold nothing but cached pages. Cached ones with a lease count: a copy is short.
        """
        frames = self._frames.obtainable(self) + self._frames.emptiable(self)
        return self.free_pages + len(self._cached) + self.pages_per_frame * frames

    def held_back(self) -> int:
        """Pages that nobody holds and that will be free, or could be, once a lease ends."""
        return sum(self.states[page] in (FREE, CACHED) for page in self._leases)

    def used_pages(self) -> int:
        """Pages with a reference, or free but for a lease."""
        return sum(self._used.values()) - len(self._cached)

    def cached_pages(self) -> int:
        """Pages kept that nobody holds."""
        return len(self._cached)

    def oldest(self) -> int | None:
        """When the page that `evict_oldest` would take was released, or `None` without one."""
        return next(iter(self._cached.values()), None)

    def oldest_cached(self, most: int) -> list[int]:
        """The pages that will be evicted first, at most so many, the first of them first."""
        return [page for page, _ in zip(self._cached, range(most), strict=False)]

    def room(self) -> int:
        """Pages that `alloc` could hand out without evicting any."""
        return self.free_pages + self.pages_per_frame * self._frames.obtainable(self)

    def empty_frames(self) -> int:
        """Owned frames none of whose pages is in use."""
        return sum(not used for used in self._used.values())

    def emptiable_frames(self) -> int:
        """Owned frames that hold cached pages and no others."""
        size = self.pages_per_frame
        busy = (self.states == OPEN) | (self.states == SEALED)
        busy[list(self._leases)] = True
        owned = [frame for frame, used in self._used.items() if used]
        return sum(not busy[frame * size : (frame + 1) * size].any() for frame in owned)

    # -- taking and giving back --------------------------------------------------------------------

    def alloc(self, count: int, after: int | None = None) -> Ids:
        """Take `count` pages, each with one reference and open.

        Args:
            count: how many.
            after: a page the new ones should follow (the last of the sequence that grows).

        Returns:
            Page ids, int32 `[count]`: `after`'s successors first, then runs as long as free memory
            allows.

        Raises:
            OutOfPagesError: fewer than `count` are available; nothing changed.
        """
        if count > self.free_pages:
            self.check_room(count)
            self._make_room(count)
        runs: list[tuple[int, int]] = []
        if after is not None and count:
            count -= self._continue_run(after + 1, count, runs)
        while count:
            count -= self._start_run(count, runs)
        for start, length in runs:
            self.refs[start : start + length] = 1
            self.states[start : start + length] = OPEN
        if len(runs) == 1:
            start, length = runs[0]
            return np.arange(start, start + length, dtype=np.int32)
        pieces = [np.arange(start, start + length, dtype=np.int32) for start, length in runs]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def alloc_each(self, after: list[int]) -> Ids:
        """Take a page for each of some sequences, to follow the last one each has: what `alloc(1,
        page)` would give one after another.

        Returns:
            Page ids, int32, in the order of `after`.

        Raises:
            OutOfPagesError: fewer are available; nothing changed.
        """
        if len(after) > self.free_pages:
            self.check_room(len(after))
            self._make_room(len(after))
        runs: list[tuple[int, int]] = []
        for page in after:
            if not self._continue_run(page + 1, 1, runs):
                while not self._start_run(1, runs):
                    pass
        ids = np.array([start for start, _ in runs], np.int32)
        self.refs[ids] = 1
        self.states[ids] = OPEN
        return ids

    def check_room(self, count: int) -> None:
        """Raise `OutOfPagesError` unless `alloc` could hand out `count` pages; nothing changes."""
        held = sum(page in self._cached for page in self._leases)  # evicted, they are not free yet
        room = self.free_pages + len(self._cached) - held
        if count > room and count > (room := self.available() - held):
            raise OutOfPagesError(
                f"{count} more pages are needed and {room} of {self.capacity} are free",
                needed=count,
                available=room,
            )

    def share(self, ids: Ids) -> None:
        """Add one reference for each occurrence of a page in `ids`; all must be held, or cached."""
        if self._cached:
            for page in ids[self.states[ids] == CACHED].tolist():
                if self._cached.pop(page, None) is not None:
                    self.states[page] = SEALED
        alive = (self.states[ids] == OPEN) | (self.states[ids] == SEALED)
        assert bool(alive.all()), "only a page somebody holds, or a cached one, can be shared"
        np.add.at(self.refs, ids, 1)

    def reopen(self, ids: Ids) -> None:
        """Pages that one row holds take tokens again."""
        self.reopened += int((self.states[ids] == SEALED).sum())
        self.states[ids] = OPEN

    def keep(self, page: int, depth: int) -> None:
        """Keep a sealed page somebody holds for reuse, at this place (from 1) of its sequence."""
        assert self.states[page] == SEALED
        assert depth > 0
        self.depths[page] = depth

    def release(self, ids: Ids) -> None:
        """Drop one reference for each occurrence of a page in `ids`; pages nobody holds any more
        become free, or cached if they are to be kept.
        """
        if ids.size <= FEW:
            few = ids.tolist()
            if len(few) > 1 and self.depths[ids].any():
                few.sort(key=lambda page: -int(self.depths[page]))
            for page in few:
                self._release_one(page)
            return
        np.subtract.at(self.refs, ids, 1)
        left = self.refs[ids]
        assert int(left.min()) >= 0, "a page was released more often than it was held"
        dead = np.unique(ids[left == 0])
        kept = self.depths[dead] > 0
        if kept.any():
            self._cache(dead[kept])
            dead = dead[~kept]
        if dead.size:
            self.lost += int((self.states[dead] == SEALED).sum())
            self.states[dead] = FREE
            self.generations[dead] += 1
            if self._leases:
                dead = np.array(
                    [page for page in dead.tolist() if page not in self._leases], np.int32
                )
            self._free(dead)

    def _release_one(self, page: int) -> None:
        """`release` of one page without the 20 microseconds that array operations take to start."""
        left = int(self.refs[page]) - 1
        assert left >= 0, "a page was released more often than it was held"
        self.refs[page] = left
        if left:
            return
        if self.depths[page]:
            self._cache(np.array([page], np.int32))
        else:
            self.lost += bool(self.states[page] == SEALED)
            self._free_one(page)

    def _free_one(self, page: int) -> None:
        self.states[page] = FREE
        self.generations[page] += 1
        if page not in self._leases:
            extent, bit = self._extent_of(page)
            self._give_back(extent, 1 << bit)

    # -- pages that nobody holds -------------------------------------------------------------------

    def _cache(self, ids: Ids) -> None:
        """Let kept pages wait, the deepest first."""
        self.states[ids] = CACHED
        for page in ids[np.argsort(-self.depths[ids], kind="stable")].tolist():
            self._cached[page] = self._frames.tick()

    def evict_oldest(self) -> bool:
        """Free the page that has waited longest; false if none waits."""
        if not self._cached:
            return False
        page = next(iter(self._cached))
        if self.on_evict is not None:
            self.on_evict(page)
        if page in self._cached:
            self.drop(page)
        return True

    def drop(self, page: int) -> None:
        """Free a cached page, and tell nobody."""
        del self._cached[page]
        self.depths[page] = 0
        self._free_one(page)

    def _make_room(self, count: int) -> None:
        """Evict what has waited longest, of any class, until `count` pages can be taken."""
        if count <= self.room():
            return
        # A few more than asked: pages that are released together lie together, and make runs.
        aim = count + min(self.extent, self.capacity // 64)
        while (count if not self._cached else aim) > self.room() and self._frames.evict_oldest():
            pass

    def surrender_frame(self) -> int | None:
        """Give up an empty frame, or `None`: see `FrameOwner`."""
        frame = self._let_go()
        if frame is not None and self._on_surrender is not None:
            self._on_surrender(frame)
        return frame

    # -- copies in flight --------------------------------------------------------------------------

    def lease(self, ids: Ids) -> Lease:
        """Keep these pages, held or cached, from being reused until `end_lease`, whoever releases
        or evicts them meanwhile.
        """
        assert bool((self.states[ids] != FREE).all()), "a page that is free can't be leased"
        for page in ids.tolist():
            self._leases[page] = self._leases.get(page, 0) + 1
        return Lease(ids.copy(), self.generations[ids])

    def end_lease(self, lease: Lease) -> bool:
        """End a lease, once. True if every page is still the one that was leased (same
        generation).
        """
        current = bool((self.generations[lease.ids] == lease.generations).all())
        idle = []
        for page in lease.ids.tolist():
            self._leases[page] -= 1
            if not self._leases[page]:
                del self._leases[page]
                if self.states[page] == FREE:
                    idle.append(page)
        self._free(np.array(sorted(idle), np.int32))
        return current

    def check_integrity(self) -> None:
        """Raise `IntegrityError` naming the first invariant that does not hold."""
        free = self._check_masks()
        owned = np.zeros(self.capacity, bool)
        in_use = (~free).reshape(-1, self.pages_per_frame).sum(1).tolist()
        for frame, used in self._used.items():
            owned[frame * self.pages_per_frame : (frame + 1) * self.pages_per_frame] = True
            if in_use[frame] != used:
                raise IntegrityError(
                    f"frame {frame}: {in_use[frame]} pages in use, count says {used}"
                )
        leased = np.zeros(self.capacity, bool)
        leased[list(self._leases)] = True
        cached = np.zeros(self.capacity, bool)
        cached[list(self._cached)] = True
        if (cached != (self.states == CACHED)).any() or (cached & (self.depths == 0)).any():
            raise IntegrityError("a page waits for reuse and is not marked so, or the reverse")
        wrong = np.flatnonzero(free != (owned & (self.refs == 0) & ~leased & ~cached))
        if wrong.size:
            page = int(wrong[0])
            raise IntegrityError(
                f"page {page}: marked {'free' if free[page] else 'in use'} with {self.refs[page]} "
                "references, "
                f"{self._leases.get(page, 0)} leases, frame "
                f"{'owned' if owned[page] else 'not owned'}"
            )
        held = (self.states == OPEN) | (self.states == SEALED)
        if bool(((self.refs > 0) != held).any()):
            raise IntegrityError(
                "a page has references and the state free or cached, or none and another state"
            )
