"""All values that live, as columns."""

import numpy as np

from kvpaged.lsm.eviction import Candidates
from kvpaged.lsm.segment import prefix_of
from kvpaged.lsm.tree import Found, InLog, InSegment, Tree


class Living:
    """Everything that lives in a tree, numbered. Under the store's lock, while nothing changes."""

    def __init__(self, tree: Tree):
        self.logs = [(log, list(log.live.values())) for log in tree.logs()]
        self.segments = [(s, np.flatnonzero(s.live)) for s in tree.segments.values()]
        sizes = [*(len(rows) for _, rows in self.logs), *(len(rows) for _, rows in self.segments)]
        self.ends = np.cumsum(np.array(sizes, np.int64))

    def found(self, number: int) -> Found:
        """A value by its number."""
        part = int(np.searchsorted(self.ends, number, side="right"))
        at = number - (int(self.ends[part - 1]) if part else 0)
        if part < len(self.logs):
            log, rows = self.logs[part]
            return InLog(log, rows[at])
        segment, numbers = self.segments[part - len(self.logs)]
        return InSegment(segment, int(numbers[at]))

    def columns(self) -> Candidates:
        """What an eviction policy sees."""
        parts = [
            (
                [log.stamps[row.entry.key] for row in rows],
                [row.entry.sequence for row in rows],
                [row.cost for row in rows],
                [row.entry.expires for row in rows],
                [prefix_of(row.entry.key) for row in rows],
            )
            for log, rows in self.logs
        ] + [
            (s.stamps[rows], s.sequences[rows], s.costs[rows], s.expires[rows], s.prefixes[rows])
            for s, rows in self.segments
        ]
        columns = (
            np.concatenate(
                [np.asarray(part[n], np.uint64) for part in parts] or [np.empty(0, "u8")]
            )
            for n in range(len(Candidates._fields))
        )
        return Candidates(*columns)
