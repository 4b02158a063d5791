"""Who holds which page of a class: free pages, reference counts, generations, leases, and pages
nobody holds that are kept for reuse.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvpaged.errors import IntegrityError, OutOfPagesError
from kvpaged.pages.frames import FrameBudget

Ids = npt.NDArray[np.int32]

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


class PageAllocator:
    """Pages of one class, in runs where possible.

    Free pages are kept as bit masks of *extents*: `extent` adjacent pages within a frame. A new run
    starts in the lowest extent that is wholly free and leaves the rest of it for its own growth
    while there is room, so a sequence that grows page by page stays in runs, and low frames fill
    first (empty frames can go to another class).

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
        assert 1 <= extent <= 32
        assert pages_per_frame >= 1
        self.pages_per_frame = pages_per_frame
        self.extent = min(extent, pages_per_frame)
        self.capacity = frames.frames * pages_per_frame
        self.free_pages = 0
        self.refs = np.zeros(self.capacity, np.int32)
        self.states = np.zeros(self.capacity, np.uint8)
        self.generations = np.zeros(self.capacity, np.int64)
        self.depths = np.zeros(self.capacity, np.int32)
        """Of pages to keep, their place in their sequence, from 1; 0 for all others."""
        self.on_evict: Callable[[int], None] | None = None
        """Called with each page that is evicted, before it is free."""
        self._cached: OrderedDict[int, int] = OrderedDict()  # page -> when it was released
        self._frames = frames
        self._on_surrender = on_surrender
        self._per_frame = -(-pages_per_frame // self.extent)
        self._used: dict[int, int] = {}  # owned frame -> pages in use or leased
        extents = frames.frames * self._per_frame
        self._masks = [0] * extents
        self._whole: list[
            int
        ] = []  # heaps of extents, checked when popped; each holds an extent at most once
        self._partial: list[int] = []
        self._in_whole = bytearray(extents)
        self._in_partial = bytearray(extents)
        self._leases: dict[int, int] = {}
        frames.register(self)

    # -- asking ------------------------------------------------------------------------------------

    def available(self) -> int:
        """Pages that `alloc` could still hand out: free ones, cached ones, and those of frames that
        are empty or hold nothing but cached pages.
        """
        frames = self._frames.obtainable(self) + self._frames.emptiable(self)
        return self.free_pages + len(self._cached) + self.pages_per_frame * frames

    def used_pages(self) -> int:
        """Pages with a reference, or free but for a lease."""
        return sum(self._used.values()) - len(self._cached)

    def cached_pages(self) -> int:
        """Pages kept that nobody holds."""
        return len(self._cached)

    def oldest(self) -> int | None:
        """When the page that `evict_oldest` would take was released, or `None` without one."""
        return next(iter(self._cached.values()), None)

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
        room = self.free_pages + len(self._cached)
        if count > room and count > (room := self.available()):
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

        def room() -> int:
            return self.free_pages + self.pages_per_frame * self._frames.obtainable(self)

        if count <= room():
            return
        # A few more than asked: pages that are released together lie together, and make runs.
        aim = count + min(self.extent, self.capacity // 64)
        while (count if not self._cached else aim) > room() and self._frames.evict_oldest():
            pass

    def surrender_frame(self) -> int | None:
        """Give up an empty frame, or `None`: see `FrameOwner`."""
        frame = next((frame for frame, used in self._used.items() if not used), None)
        if frame is None:
            return None
        del self._used[frame]
        first = frame * self._per_frame
        self._masks[first : first + self._per_frame] = [0] * self._per_frame
        self.free_pages -= self.pages_per_frame
        if self._on_surrender is not None:
            self._on_surrender(frame)
        return frame

    # -- copies in flight --------------------------------------------------------------------------

    def lease(self, ids: Ids) -> Lease:
        """Keep these pages from being reused until `end_lease`, whoever releases them meanwhile."""
        assert bool((self.refs[ids] > 0).all()), "only a page somebody holds can be leased"
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

    # -- inside ------------------------------------------------------------------------------------

    def _extent_of(self, page: int) -> tuple[int, int]:
        frame, place = divmod(page, self.pages_per_frame)
        return frame * self._per_frame + place // self.extent, place % self.extent

    def _full_mask(self, extent: int) -> int:
        first = extent % self._per_frame * self.extent
        return (1 << min(self.extent, self.pages_per_frame - first)) - 1

    def _first_page(self, extent: int) -> int:
        frame, place = divmod(extent, self._per_frame)
        return frame * self.pages_per_frame + place * self.extent

    def _continue_run(self, page: int, count: int, runs: list[tuple[int, int]]) -> int:
        """Take up to `count` free pages from `page` on, as one run."""
        start = page
        while page - start < count and page < self.capacity:
            extent, bit = self._extent_of(page)
            mask = self._masks[extent] >> bit
            if not mask & 1:
                break
            length = min((~mask & (mask + 1)).bit_length() - 1, count - (page - start))
            self._take(extent, bit, length)
            page += length
        if page > start:
            runs.append((start, page - start))
        return page - start

    def _start_run(self, count: int, runs: list[tuple[int, int]]) -> int:
        """Take pages where a new run may start; at least one, by `available`."""
        while self._whole:
            extent = self._whole[0]
            if self._masks[extent] == self._full_mask(extent):
                return self._continue_run(self._first_page(extent), count, runs)
            heapq.heappop(self._whole)
            self._in_whole[extent] = 0
        # Leftovers before another frame: a frame of one class is what another class may lack.
        while self._partial:
            extent = self._partial[0]
            if mask := self._masks[extent]:
                first = (mask & -mask).bit_length() - 1
                return self._continue_run(self._first_page(extent) + first, count, runs)
            heapq.heappop(self._partial)
            self._in_partial[extent] = 0
        frame = self._frames.take(self)
        assert frame is not None, "alloc has checked that this much is available"
        self._adopt(frame)
        return 0

    def _adopt(self, frame: int) -> None:
        self._used[frame] = 0
        self.free_pages += self.pages_per_frame
        if frame in self._frames.handed_over:
            pages = slice(frame * self.pages_per_frame, (frame + 1) * self.pages_per_frame)
            self.generations[pages] += 1
        first = frame * self._per_frame
        for extent in range(first, first + self._per_frame):
            self._masks[extent] = self._full_mask(extent)
            self._note(extent)

    def _take(self, extent: int, bit: int, length: int) -> None:
        self._masks[extent] &= ~(((1 << length) - 1) << bit)
        self.free_pages -= length
        self._used[extent // self._per_frame] += length
        if self._masks[extent]:
            self._note(extent)

    def _note(self, extent: int) -> None:
        """Queue an extent with free pages where `_start_run` will look for it."""
        if self._masks[extent] == self._full_mask(extent):
            if not self._in_whole[extent]:
                self._in_whole[extent] = 1
                heapq.heappush(self._whole, extent)
        elif not self._in_partial[extent]:
            self._in_partial[extent] = 1
            heapq.heappush(self._partial, extent)

    def _free(self, ids: Ids) -> None:
        """Put pages (ascending, distinct) back into the masks."""
        if not ids.size:
            return
        frame, place = np.divmod(ids, self.pages_per_frame)
        extents = frame * self._per_frame + place // self.extent
        starts = np.flatnonzero(np.diff(extents, prepend=-1))
        bits = np.left_shift(1, (place % self.extent).astype(np.int64))
        masks = np.bitwise_or.reduceat(bits, starts)
        for extent, mask in zip(extents[starts].tolist(), masks.tolist(), strict=True):
            self._give_back(extent, mask)

    def _give_back(self, extent: int, mask: int) -> None:
        assert not self._masks[extent] & mask, "a free page was freed again"
        count = mask.bit_count()
        self._masks[extent] |= mask
        self._used[extent // self._per_frame] -= count
        self.free_pages += count
        self._note(extent)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` naming the first invariant that does not hold."""
        free = np.zeros(self.capacity, bool)
        for extent, mask in enumerate(self._masks):
            if not mask:
                continue
            first = self._first_page(extent)
            for bit in range(mask.bit_length()):
                free[first + bit] = mask >> bit & 1
            queued = (
                self._in_whole[extent]
                if mask == self._full_mask(extent)
                else self._in_partial[extent]
            )
            if not queued:
                raise IntegrityError(
                    f"extent {extent} has free pages (mask {mask:b}) and is in no queue"
                )
        if int(free.sum()) != self.free_pages:
            raise IntegrityError(
                f"{int(free.sum())} pages are marked free, the count says {self.free_pages}"
            )
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
