"""What lived in a store at one moment."""

from collections.abc import Iterator
from heapq import merge
from typing import Any

import numpy as np

from kvpaged.lsm.log import Log
from kvpaged.lsm.segment import Row, Segment
from kvpaged.lsm.tree import Found, InLog, InSegment, Tree

Live = np.ndarray[Any, np.dtype[np.bool_]]


class View:
    """What lived at one moment: later puts, deletions, evictions and compactions do not change it.

    Made and asked under the store's lock, scanned by any thread. It keeps files alive, also those
    that are removed meanwhile, and their bytes count until it is gone.
    """

    def __init__(self, tree: Tree, now: int):
        self.now = now
        self._tree = tree
        self._logs: list[tuple[Log, dict[bytes, Row]]] = [
            (log, dict(log.live)) for log in tree.logs()
        ]
        self._segments: dict[Segment, Live] = {
            segment: segment.live.copy() for segment in tree.segments.values()
        }

    def find(self, key: bytes) -> Found | None:
        """Where a key was."""
        for log, live in self._logs:
            row = live.get(key)
            if row is not None:
                return None if 0 < row.entry.expires <= self.now else InLog(log, row)
        for segment in self._maybe(key):
            at = segment.find(key)
            if at is not None and self._segments[segment][at]:
                expired = 0 < int(segment.expires[at]) <= self.now
                return None if expired else InSegment(segment, at)
        return None

    def _maybe(self, key: bytes) -> Iterator[Segment]:
        """Segments that may hold a key: the tree knows of those it still has."""
        there = self._tree.segments
        yield from (one for one in self._tree.filters.owners(key) if one in self._segments)
        yield from (one for one in self._segments if there.get(one.number) is not one)

    def scan(self, prefix: bytes = b"") -> Iterator[tuple[bytes, Found]]:
        """Keys that begin so, ascending, and where each was."""
        logs = (
            sorted(
                ((key, InLog(log, row)) for key, row in live.items() if key.startswith(prefix)),
                key=_first,
            )
            for log, live in self._logs
        )
        segments = (self._rows(segment, live, prefix) for segment, live in self._segments.items())
        for key, found in merge(*logs, *segments, key=_first):
            if not 0 < found.entry.expires <= self.now:
                yield key, found

    def _rows(self, segment: Segment, live: Live, prefix: bytes) -> Iterator[tuple[bytes, Found]]:
        for row in range(segment.rows_from(prefix), segment.count):
            if live[row]:
                key = segment.key(row)
                if not key.startswith(prefix):
                    return
                yield key, InSegment(segment, row)


def _first(item: tuple[bytes, Found]) -> bytes:
    return item[0]
