"""Compaction without a disk: what the planner of a store does to given puts, and what it costs."""

from collections import OrderedDict
from dataclasses import dataclass, field

from kvpaged.lsm.compaction import (
    Budget,
    Limits,
    SegmentState,
    apply,
    budget,
    plan,
)
from kvpaged.lsm.order import Link, locality

ENTRY = 200
"""Bytes of an entry."""


@dataclass(slots=True)
class Placed:
    """A value: its bytes, its parent, and the segment it lives in (0: the active file)."""

    size: int
    parent: bytes
    segment: int = 0


@dataclass(slots=True)
class Simulator:
    """A store in which nothing is stored. Not thread-safe.

    Attributes:
        max_bytes: bound, or `None`.
        segment_bytes: of a full segment.
        values: what lives, the longest not put first.
        states: the segments, as the planner sees them.
        put_bytes, written_bytes: that came; that were written, by puts and by compaction.
        evicted: how many values.
        peak: most bytes there were, both old and new segments of a task counted.
        reasons: how many tasks of each rule.
    """

    segment_bytes: int
    max_bytes: int | None = None
    values: OrderedDict[bytes, Placed] = field(default_factory=OrderedDict)
    states: list[SegmentState] = field(default_factory=list)
    put_bytes: int = 0
    written_bytes: int = 0
    evicted: int = 0
    peak: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    _active: int = 0
    _ids: int = 0

    def put(self, key: bytes, size: int, parent: bytes = b"") -> None:
        """Put a value, sealing, evicting and compacting as a store does."""
        self._kill(key)
        share = self._budget()
        while share is not None and self.live_bytes() + size > share.live:
            self._kill(next(iter(self.values)))
            self.evicted += 1
        self.values[key] = Placed(size, parent)
        self._active += size + 2 * ENTRY
        self.put_bytes += size
        self.written_bytes += size + 2 * ENTRY
        if self._active >= self.segment_bytes:
            self._seal()
        while self._compact():
            pass
        self.peak = max(self.peak, self.used_bytes())

    def live_bytes(self) -> int:
        """Of values that live."""
        return sum(s.live_bytes for s in self.states) + self._active_live()

    def used_bytes(self) -> int:
        """Of all files."""
        return sum(s.file_bytes for s in self.states) + self._active

    def _active_live(self) -> int:
        return sum(one.size + 2 * ENTRY for one in self.values.values() if one.segment == 0)

    def _budget(self) -> Budget | None:
        if self.max_bytes is None:
            return None
        largest = max((s.file_bytes for s in self.states), default=0)
        return budget(self.max_bytes, self.segment_bytes, largest)

    def _kill(self, key: bytes) -> None:
        old = self.values.pop(key, None)
        if old is not None and old.segment:
            self.states = [
                s._replace(
                    live_bytes=s.live_bytes - old.size - 2 * ENTRY, live_values=s.live_values - 1
                )
                if s.id == old.segment
                else s
                for s in self.states
            ]

    def _seal(self) -> None:
        keys = [key for key, one in self.values.items() if one.segment == 0]
        self.states.append(self._segment(keys, 0, self._active))
        self._active = 0

    def _segment(self, keys: list[bytes], level: int, file_bytes: int) -> SegmentState:
        self._ids += 1
        linked = broken = live = 0
        before = b""
        for key in keys:
            one = self.values[key]
            one.segment = self._ids
            live += one.size + 2 * ENTRY
            linked += bool(one.parent)
            broken += bool(one.parent) and one.parent != before
            before = key
        return SegmentState(self._ids, level, file_bytes, live, len(keys), linked, broken)

    def _compact(self) -> bool:
        room, short = 1 << 62, False
        share = self._budget()
        if share is not None and self.max_bytes is not None:
            room = max(0, self.max_bytes - self.used_bytes())
            short = self.used_bytes() > share.puts - self.segment_bytes
        task = plan(self.states, Limits(self.segment_bytes, room, short))
        if task is None:
            return False
        inputs = set(task.inputs)
        keys = [key for key, one in self.values.items() if one.segment in inputs]
        order = locality([Link(key, self.values[key].parent) for key in keys])
        outputs: list[SegmentState] = []
        chunk: list[bytes] = []
        size = 0
        for number in order:
            more = self.values[keys[number]].size + 2 * ENTRY
            if chunk and size + more > self.segment_bytes:
                outputs.append(self._segment(chunk, task.level, size))
                chunk, size = [], 0
            chunk.append(keys[number])
            size += more
        if chunk:
            outputs.append(self._segment(chunk, task.level, size))
        written = sum(one.file_bytes for one in outputs)
        self.written_bytes += written
        self.peak = max(self.peak, self.used_bytes() + written)
        self.states = apply(self.states, task, outputs)
        self.reasons[task.reason] = self.reasons.get(task.reason, 0) + 1
        return True
