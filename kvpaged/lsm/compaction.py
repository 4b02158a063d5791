"""What to rewrite next: a pure planner over a snapshot, and what its task would lead to.

Rules, the first that applies:

    empty   a segment in which nothing lives is removed; nothing is written
    dead    dead bytes are more than they may be, or bytes are short: the segments with the largest
            dead share are rewritten, as many as give a full one
    small   `FAN` segments are smaller than a quarter of a full one, and of like size (the same
            power of four): they become one
    order   `FAN` segments of a level hold values that do not lie behind their parents: they become
            segments of the next level, in the order of chains; at most `LEVELS` times a value

A task writes no more than `room` bytes, so the bound on bytes holds while both the old and the new
are there. How often a byte is written again is bounded by the rules: rewriting for dead bytes frees
at least half of `DEAD` of what it reads, so it writes at most 15 bytes for each freed, and seldom
more than 2, as what is most dead goes first; order costs at most `LEVELS` more, and small segments
one for each power of four up to a full one.
"""

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from kvpaged.lsm.layout import BLOCK

DEAD = 1 / 8
"""Share of the bytes that may be dead before compaction begins, and of a segment from which it is
rewritten for that."""
FAN = 8
LEVELS = 2
LOOSE = 1 / 4
"""Share of the values with a parent that may lie elsewhere than behind it."""
GROUP_BYTES = 8 << 20
"""Of the groups that compaction writes."""
MOST_VALUES = 1 << 16
"""Of a task: their keys and places are held in memory while it runs."""

SLACK = 1 / 8
"""Of a bounded store's bytes: kept free of what lives. The more, the less compaction writes."""
SPARE = 64 << 10
"""Bytes for what is hardly worth counting."""

Reason = Literal["empty", "dead", "small", "order", "all"]


class SegmentState(NamedTuple):
    """A segment as the planner sees it.

    Attributes:
        id: of its file; a higher one was made later.
        level: how often its values were put in order.
        file_bytes, live_bytes, live_values: of the file, and of what lives in it.
        linked, broken: values that have a parent, and that do not lie right behind it.
    """

    id: int
    level: int
    file_bytes: int
    live_bytes: int
    live_values: int
    linked: int = 0
    broken: int = 0

    @property
    def dead_share(self) -> float:
        """Of its bytes."""
        return 1 - self.live_bytes / self.file_bytes if self.file_bytes else 0.0


def output_bytes(states: Sequence[SegmentState], segment_bytes: int) -> int:
    """The most that rewriting segments together writes: what lives in them, and for each file and
    each group blocks that are not full, filter and footer.
    """
    live = sum(one.live_bytes for one in states)
    return _bound(live, sum(one.live_values for one in states), segment_bytes)


def _bound(live: int, values: int, segment_bytes: int) -> int:
    if not values:
        return 0
    files = 1 + 2 * (live // segment_bytes)
    groups = files + 2 * (live // GROUP_BYTES)
    fixed = 4 * BLOCK if values > 256 else 2 * BLOCK
    return live + files * fixed + 2 * groups * BLOCK


class Task(NamedTuple):
    """Segments to be rewritten together, the level of what comes of them, and the rule."""

    inputs: tuple[int, ...]
    level: int
    reason: Reason


class Limits(NamedTuple):
    """What a plan must keep to.

    Attributes:
        segment_bytes: of a full segment.
        room: bytes that may be written before anything is removed.
        short: bytes are short: reclaim already where half of `DEAD` is dead.
    """

    segment_bytes: int
    room: int
    short: bool = False


class Budget(NamedTuple):
    """How a bound on bytes is shared out.

    Attributes:
        puts: bytes there may be when a put has come; the rest is for rewriting any one file.
        live: bytes that may live. An eighth less, a file less, and four blocks for each file less
            than `puts`: so when bytes are short an eighth of them are dead, and what is most dead
            is worth rewriting.
    """

    puts: int
    live: int


def budget(max_bytes: int, segment_bytes: int, largest: int) -> Budget:
    """Share out `max_bytes`, with files of `segment_bytes` and one of `largest`."""
    puts = max_bytes - max(segment_bytes, largest) - SPARE
    blocks = 4 * BLOCK * (puts // segment_bytes + 1)
    return Budget(puts, int(puts * (1 - SLACK)) - segment_bytes - blocks)


def plan(segments: Sequence[SegmentState], limits: Limits) -> Task | None:
    """The task that is due, if any."""
    empty = tuple(one.id for one in segments if not one.live_values)
    if empty:
        return Task(empty, 0, "empty")
    return _dead(segments, limits) or _small(segments, limits) or _order(segments, limits)


def _dead(segments: Sequence[SegmentState], limits: Limits) -> Task | None:
    total = sum(one.file_bytes for one in segments)
    dead = total - sum(one.live_bytes for one in segments)
    if not limits.short and dead <= DEAD * total:
        return None
    ranked = sorted(segments, key=lambda one: (-one.dead_share, one.id))
    least = DEAD / 2 if limits.short else DEAD
    worth = [one for one in ranked if one.dead_share > least]
    chosen = _up_to(worth, limits.segment_bytes, limits)
    return _task(chosen, "dead") if _frees(chosen, limits) else None


def _frees(chosen: Sequence[SegmentState], limits: Limits) -> bool:
    """Rewriting them surely makes them smaller."""
    before = sum(one.file_bytes for one in chosen)
    return output_bytes(chosen, limits.segment_bytes) < before


def _small(segments: Sequence[SegmentState], limits: Limits) -> Task | None:
    sizes: dict[int, list[SegmentState]] = {}
    for one in segments:
        if one.file_bytes < limits.segment_bytes // 4:
            sizes.setdefault(one.file_bytes.bit_length() // 2, []).append(one)
    for _, alike in sorted(sizes.items()):
        if len(alike) >= FAN:
            chosen = _up_to(sorted(alike, key=lambda one: one.id), limits.segment_bytes, limits)
            if len(chosen) >= FAN:
                return _task(chosen, "small")
    return None


def _order(segments: Sequence[SegmentState], limits: Limits) -> Task | None:
    for level in range(LEVELS):
        loose = [one for one in segments if one.level == level and one.broken > LOOSE * one.linked]
        if len(loose) >= FAN:
            oldest = sorted(loose, key=lambda one: one.id)[:FAN]
            chosen = _up_to(oldest, FAN * limits.segment_bytes, limits)
            if len(chosen) > 1:
                return Task(tuple(one.id for one in chosen), level + 1, "order")
    return None


def plan_all(
    segments: Sequence[SegmentState], limits: Limits, done: Collection[int]
) -> Task | None:
    """The next task of rewriting everything, in as few as `room` allows; `done` are what such tasks
    wrote.
    """
    empty = tuple(one.id for one in segments if not one.live_values)
    if empty:
        return Task(empty, 0, "empty")
    left = sorted((one for one in segments if one.id not in done), key=lambda one: one.id)
    chosen = _up_to(left, limits.room, limits)
    if not chosen:
        return None
    return Task(tuple(one.id for one in chosen), LEVELS, "all")


def _up_to(ranked: Sequence[SegmentState], most: int, limits: Limits) -> list[SegmentState]:
    """The first that together hold about `most` bytes, and few values, and write no more than there
    is room.
    """
    chosen: list[SegmentState] = []
    live = values = 0
    for one in ranked:
        more, count = live + one.live_bytes, values + one.live_values
        fits = count <= MOST_VALUES and _bound(more, count, limits.segment_bytes) <= limits.room
        if fits and (not chosen or more <= most):
            chosen.append(one)
            live, values = more, count
    return chosen


def _task(chosen: Sequence[SegmentState], reason: Reason) -> Task:
    return Task(tuple(one.id for one in chosen), min(one.level for one in chosen), reason)


def apply(
    segments: Sequence[SegmentState], task: Task, outputs: Sequence[SegmentState]
) -> list[SegmentState]:
    """The snapshot after a task that wrote `outputs`."""
    inputs = set(task.inputs)
    return [*(one for one in segments if one.id not in inputs), *outputs]
