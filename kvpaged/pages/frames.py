"""Frames: the equal pieces a pool's budget is dealt out in, so that unlike page sizes share one
budget.

    pool     | frame 0   | frame 1   | frame 2   | frame 3   |
    owner      class A     class B     (free)      class A
    cut into   a a a a a   b b         ...         a a a a a      the rest of a frame is rounding
    waste

One class alone gets one frame of all its pages: nothing is rounded but the last page.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvpaged.config import format_bytes
from kvpaged.errors import ConfigError

MAX_WASTE = 0.03
"""Share of the budget that cutting frames into pages may lose, where the budget has room to
choose.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlan:
    """How a budget is cut.

    Attributes:
        frame_bytes: bytes of a frame.
        frames: how many there are.
        pages_per_frame: for each class, pages a frame of it holds.
    """

    frame_bytes: int
    frames: int
    pages_per_frame: tuple[int, ...]


def plan_frames(budget: int, page_bytes: Sequence[int], *, unit: int = 1) -> FramePlan:
    """Cut `budget` bytes into frames that waste the least for pages of these sizes (bytes), pure
    arithmetic.

    Args:
        budget: bytes to cut; never exceeded.
        page_bytes: bytes of a page of each class.
        unit: a frame is a multiple of it.

    Raises:
        ConfigError: the budget is smaller than one page of every class together.
    """
    if budget < sum(page_bytes):
        raise ConfigError(
            f"a pool of {format_bytes(budget)} ({budget} bytes) is smaller than one page of each "
            "class "
            f"({' + '.join(map(str, page_bytes))} bytes)"
        )
    if len(page_bytes) == 1:
        pages = budget // page_bytes[0]
        return FramePlan(frame_bytes=pages * page_bytes[0], frames=1, pages_per_frame=(pages,))
    most = budget // len(page_bytes)
    sizes = {-(-size * count // unit) * unit for size in page_bytes for count in range(1, 65)}
    fitting = sorted(size for size in sizes if max(page_bytes) <= size <= most)
    if not fitting:
        fitting = [-(-max(page_bytes) // unit) * unit]

    def waste(frame: int) -> float:
        rounding = max(frame % size for size in page_bytes) / frame
        return rounding + (budget % frame) / budget

    good = [size for size in fitting if waste(size) < MAX_WASTE]
    frame = good[0] if good else min(fitting, key=waste)
    per_frame = tuple(frame // size for size in page_bytes)
    return FramePlan(frame_bytes=frame, frames=budget // frame, pages_per_frame=per_frame)


class FrameOwner(Protocol):
    """A class of pages that can hand back a frame none of whose pages is in use."""

    def surrender_frame(self) -> int | None:
        """Give up one empty frame and forget its pages, or `None` when every frame holds a page in
        use.
        """

    def empty_frames(self) -> int:
        """How many frames `surrender_frame` could give up."""

    def emptiable_frames(self) -> int:
        """How many more it could after evicting every page that nobody holds."""

    def oldest(self) -> int | None:
        """When the page `evict_oldest` would evict was let go, on the budget's clock."""

    def evict_oldest(self) -> bool:
        """Evict the page that was let go first; false if there is none."""


class FrameBudget:
    """The frames nobody owns yet, and who might give one back.

    Not thread-safe: the cache's lock is held around every call. Invariant: every frame is in
    `_free` or owned by exactly one owner.
    """

    def __init__(self, frames: int) -> None:
        self.frames = frames
        self._free = list(range(frames))  # ascending, hence a heap
        self._owners: list[FrameOwner] = []
        self._time = 0
        self.handed_over: set[int] = set()
        """Frames that have had more than one owner."""

    def register(self, owner: FrameOwner) -> None:
        """Make `owner` one whose empty frames may be taken for another."""
        self._owners.append(owner)

    def take(self, owner: object) -> int | None:
        """A frame for `owner`: a free one, else an empty one of another class, else `None`."""
        if self._free:
            return heapq.heappop(self._free)
        for other in self._owners:
            if other is not owner and (frame := other.surrender_frame()) is not None:
                self.handed_over.add(frame)
                return frame
        return None

    def obtainable(self, owner: object) -> int:
        """How many frames `take` could still give `owner`."""
        return len(self._free) + sum(o.empty_frames() for o in self._owners if o is not owner)

    def emptiable(self, owner: object) -> int:
        """How many more `take` could give after evicting all pages of others that nobody holds."""
        return sum(other.emptiable_frames() for other in self._owners if other is not owner)

    def tick(self) -> int:
        """The time, in events: orders the pages that owners let go."""
        self._time += 1
        return self._time

    def evict_oldest(self) -> bool:
        """Evict the page, of any owner, that was let go first; false if there is none."""
        waiting = [
            (time, i) for i, o in enumerate(self._owners) if (time := o.oldest()) is not None
        ]
        return bool(waiting) and self._owners[min(waiting)[1]].evict_oldest()

    def free_frames(self) -> tuple[int, ...]:
        """The frames nobody owns."""
        return tuple(sorted(self._free))
