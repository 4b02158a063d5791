"""Free pages of a class, as bit masks, and the runs that are taken from them."""

import heapq

import numpy as np
import numpy.typing as npt

from kvpaged.errors import IntegrityError
from kvpaged.pages.frames import FrameBudget

Ids = npt.NDArray[np.int32]


class FreeRuns:
    """Which pages of the frames a class owns are free.

    Free pages are kept as bit masks of *extents*: `extent` adjacent pages within a frame. A new run
    starts in the lowest extent that is wholly free and leaves the rest of it for its own growth
    while there is room, so a sequence that grows page by page stays in runs, and low frames fill
    first (empty frames can go to another class).

    Not thread-safe: the cache's lock is held around every call.

    Attributes:
        pages_per_frame, extent: pages of a frame, and of an extent.
        capacity: pages, if the class had all frames.
        free_pages: bits in all masks.
        generations: int64 `[capacity]`: grows each time a page becomes free, also as memory that
            was another class's.
    """

    def __init__(self, frames: FrameBudget, pages_per_frame: int, extent: int) -> None:
        assert 1 <= extent <= 32
        assert pages_per_frame >= 1
        self.pages_per_frame = pages_per_frame
        self.extent = min(extent, pages_per_frame)
        self.capacity = frames.frames * pages_per_frame
        self.free_pages = 0
        self.generations = np.zeros(self.capacity, np.int64)
        self._frames = frames
        self._per_frame = -(-pages_per_frame // self.extent)
        self._used: dict[int, int] = {}  # owned frame -> pages in use or leased
        extents = frames.frames * self._per_frame
        self._masks = [0] * extents
        # Heaps of extents, checked when popped; each holds an extent at most once.
        self._whole: list[int] = []
        self._partial: list[int] = []
        self._in_whole = bytearray(extents)
        self._in_partial = bytearray(extents)

    def _let_go(self) -> int | None:
        """Give up an empty frame, or `None` without one."""
        frame = next((frame for frame, used in self._used.items() if not used), None)
        if frame is None:
            return None
        del self._used[frame]
        first = frame * self._per_frame
        self._masks[first : first + self._per_frame] = [0] * self._per_frame
        self.free_pages -= self.pages_per_frame
        return frame

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

    def _check_masks(self) -> npt.NDArray[np.bool_]:
        """Which pages are marked free, bool `[capacity]`; raises `IntegrityError` if an extent with
        free pages could not be found, or the count is off.
        """
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
        return free
