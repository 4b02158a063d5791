"""Doing what the planner of compaction plans, in a tree."""

import threading
from collections.abc import Callable, Sequence

import numpy as np

from kvpaged.codecs import codec
from kvpaged.lsm.compaction import (
    SPARE,
    Limits,
    SegmentState,
    Task,
    output_bytes,
    plan,
    plan_all,
)
from kvpaged.lsm.eviction import Policy
from kvpaged.lsm.living import Living
from kvpaged.lsm.merge import Merger, Output, Source, Unreadable
from kvpaged.lsm.options import StoreOptions
from kvpaged.lsm.segment import Segment
from kvpaged.lsm.tree import InSegment, Tree


class Stopped(Exception):
    """Compaction ends early, for the store is closing."""


class Compactor:
    """Rewrites segments. `step` is called by one thread at a time, without the store's lock, which
    it takes where it touches the tree; everything else is called under that lock.

    Attributes:
        stuck: segments that could not be read; they stay as they are.
        expired: values that were dropped because their time was over.
        largest: bytes of the largest file.
        merger: what does the reading and writing; it has the counts.
    """

    def __init__(
        self, tree: Tree, cond: threading.Condition, options: StoreOptions,
        pace: Callable[[int], None],
    ):  # fmt: skip
        self.tree, self.cond, self.options = tree, cond, options
        self.stuck: set[int] = set()
        self.expired = 0
        self.largest = self._find_largest()
        self.merger = Merger(
            tree.files, tree.opened, segment_bytes=options.file_bytes,
            cold=None if options.cold_codec is None else codec(options.cold_codec),
            pace=pace, take_id=self._take_id,
        )  # fmt: skip

    def step(self, done: set[int] | None, *, short: bool) -> bool:
        """Do one task, if one is due. `done`: part of a rewriting of everything, which keeps the
        ids of what it wrote there. `short`: puts are short of bytes.

        Raises:
            OSError: a file cannot be read or written; nothing has changed.
            Stopped: by `pace`; nothing has changed.
        """
        with self.cond:
            self._expire()
            states, limits = self.states(), self._limits(short=short)
            task = plan(states, limits) if done is None else plan_all(states, limits, done)
            if task is None:
                return False
            sources = self._sources(task)
            chosen = [state for state in states if state.id in set(task.inputs)]
            self.tree.planned = output_bytes(chosen, self.options.file_bytes)
        try:
            outputs = self.merger.rewrite(sources, task.level) if sources else []
        except BaseException as error:
            with self.cond:
                self.tree.planned = 0
                self.tree.strays.update(self.merger.strays)
                self.merger.strays.clear()
                if isinstance(error, Unreadable):  # what can be read of it still can
                    self.stuck.add(error.segment)
            raise
        with self.cond:
            self._install(task, outputs)
            if done is not None:
                done.update(one.segment.number for one in outputs)
        return True

    def states(self) -> list[SegmentState]:
        """What the planner sees."""
        return [
            SegmentState(
                s.number, s.level, s.file_bytes, s.live_bytes, s.live_values, s.linked, s.broken
            )
            for s in self.tree.segments.values()
            if s.number not in self.stuck
        ]

    def shed(self, policy: Policy) -> bool:
        """Drop all values that may be evicted of the segment that was not asked for longest: the
        last resort, where there is no room to rewrite any. Whether there was one.
        """
        living = Living(self.tree)
        values = living.columns()
        rows: dict[Segment, list[int]] = {}
        for number in policy(values, 1 << 62, self.options.clock()).tolist():
            found = living.found(number)
            if isinstance(found, InSegment):
                rows.setdefault(found.segment, []).append(found.row)
        if not rows:
            return False
        oldest = min(rows, key=lambda s: (int(s.stamps.max(initial=0)), s.number))
        for row in rows[oldest]:
            self.tree.give_up(InSegment(oldest, row))
        return True

    def _limits(self, *, short: bool) -> Limits:
        room = 1 << 62
        if self.options.max_bytes is not None:
            room = max(0, self.options.max_bytes - self.tree.used_bytes() - SPARE)
        return Limits(self.options.file_bytes, room, short)

    def _take_id(self) -> int:
        with self.cond:
            return self.tree.take_id()

    def _find_largest(self) -> int:
        return max((s.file_bytes for s in self.tree.segments.values()), default=0)

    def _sources(self, task: Task) -> list[Source]:
        before = self.options.clock() - int(self.options.cold_after_s * 1000)
        cold = self.options.cold_codec is not None
        sources = []
        for number in task.inputs:
            segment = self.tree.segments[number]
            for row in np.flatnonzero(segment.live).tolist():
                colder = cold and int(segment.stamps[row]) <= before
                sources.append(Source(segment, row, segment.entry(row), colder))
        self.merger.counts.inputs += len(task.inputs)
        return sources

    def _install(self, task: Task, outputs: Sequence[Output]) -> None:
        """Outputs take the place of a task's segments, with what still lives."""
        for output in outputs:
            new = output.segment
            live = []
            for row in output.rows:
                source = output.sources[row.entry.key]
                if source.segment.live[source.row]:
                    live.append(row.number)
            new.take_live_numbers(live)
            for at in range(new.count):
                source = output.sources[new.key(at)]
                new.stamps[at] = source.segment.stamps[source.row]
        self.tree.planned = 0
        self.tree.replaced(
            [self.tree.segments[number] for number in task.inputs],
            [output.segment for output in outputs],
        )
        self.largest = self._find_largest()

    def _expire(self) -> None:
        """What has expired does not live any more."""
        now = self.options.clock()
        for segment in self.tree.segments.values():
            if segment.expiring:
                due = segment.live & (segment.expires > 0) & (segment.expires <= now)
                for row in np.flatnonzero(due).tolist():
                    self.tree.give_up(InSegment(segment, row))
                    self.expired += 1
                segment.expiring = bool((segment.live & (segment.expires > 0)).any())
