"""Decisions, pure: what to load and what to compute again, and what to demote."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

DECAY = 0.9
"""What an older measurement counts beside the next one."""


@dataclass(slots=True)
class Line:
    """Seconds as a line over an amount (bytes, tokens), fitted to what was measured, older
    measurements fading; neither part of it is negative.
    """

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """What an amount took."""
        for name, value in (
            ("n", 1.0), ("x", amount), ("y", seconds), ("xx", amount * amount),
            ("xy", amount * seconds),
        ):  # fmt: skip
            setattr(self, name, DECAY * getattr(self, name) + value)

    def at(self, amount: float) -> float | None:
        """What an amount should take; `None`: nothing was measured."""
        if self.n == 0:
            return None
        spread = self.n * self.xx - self.x * self.x
        slope = self.y / self.x if self.x else 0.0
        if spread > 1e-3 * self.n * self.xx:  # amounts unlike enough to tell a start from a rate
            slope = max((self.n * self.xy - self.x * self.y) / spread, 0.0)
        start = (self.y - slope * self.x) / self.n
        if start < 0:
            start, slope = 0.0, self.y / self.x if self.x else 0.0
        return start + slope * amount

    def rate(self) -> float | None:
        """Amount a second, over what was measured."""
        return self.x / self.y if self.y else None


class Choice(NamedTuple):
    """How much of what lies in tiers is loaded.

    Attributes:
        pages: how many, from the first on; the rest is computed.
        load_s, compute_s: what those should take to load, and to compute; `None`: not known.
    """

    pages: int
    load_s: float | None
    compute_s: float | None


def choose(
    sizes: Sequence[tuple[int, int]], loads: Sequence[Line], compute: Line, page_tokens: int
) -> Choice:
    """Load or recompute, for pages that follow each other.

    Args:
        sizes: for each page, the number of the tier that has it, and its bytes.
        loads: of each tier, seconds over bytes.
        compute: seconds over tokens.
        page_tokens: of a page.

    Returns:
        The number of pages, of those after which the tier changes, that saves most time. What was
        never measured is loaded: that measures it.
    """
    ends = [
        end for end in range(1, len(sizes) + 1)
        if end == len(sizes) or sizes[end][0] != sizes[end - 1][0]
    ]  # fmt: skip
    best, most = Choice(0, None, None), 0.0
    for end in ends:
        amounts: dict[int, int] = {}
        for tier, size in sizes[:end]:
            amounts[tier] = amounts.get(tier, 0) + size
        parts = [loads[tier].at(amount) for tier, amount in amounts.items()]
        known = [part for part in parts if part is not None]
        load = sum(known) if len(known) == len(parts) else None
        whole = compute.at(end * page_tokens)
        saved = float("inf") if load is None or whole is None else whole - load
        if saved > 0 and saved >= most:
            best, most = Choice(end, load, whole), saved
    return best


def patience(deadline_s: float, elapsed_s: float, saved_s: float) -> float:
    """Seconds to wait for the next piece of a load, so that the whole is later than computing
    would have been by at most the deadline.

    Args:
        deadline_s: of a call.
        elapsed_s: since the load began.
        saved_s: what computing the pages that have come would have taken; 0 where it is not known.
    """
    return min(deadline_s, max(deadline_s + saved_s - elapsed_s, 0.0))


def pressing(free: int, capacity: int) -> int:
    """How many of the pages that will be evicted first should have a copy below, when `free` of
    `capacity` pages are free.
    """
    return capacity // 4 if free < capacity // 8 else 0
