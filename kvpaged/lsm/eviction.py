"""Which values go when there is no room: a pure policy over a snapshot."""

from typing import Any, NamedTuple, Protocol

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.uint64]]
Places = np.ndarray[Any, np.dtype[np.int64]]


class Candidates(NamedTuple):
    """Values that live, as columns of one length.

    Attributes:
        stamps: when each was last asked for or written, milliseconds since 1970.
        sequences: the order in which they were written.
        costs: bytes they take up.
        expires: when they expire, milliseconds since 1970; 0 for never.
    """

    stamps: Numbers
    sequences: Numbers
    costs: Numbers
    expires: Numbers


class Policy(Protocol):
    """Chooses values to evict."""

    def __call__(self, values: Candidates, need: int, now: int) -> Places:
        """Numbers of values to evict, int64, so that `need` bytes come free, or all there are."""


def lru(values: Candidates, need: int, now: int) -> Places:
    """Expired ones first, then the longest not asked for. Of those asked for at the same time the
    last written goes first: pages of a prompt come back together, and a prefix without its tail is
    worth more than a tail without its prefix.
    """
    expired = (values.expires > 0) & (values.expires <= now)
    newest = np.uint64(2**64 - 1) - values.sequences
    order = np.lexsort((newest, values.stamps, ~expired))
    freed = np.cumsum(values.costs[order], dtype=np.int64)
    count = int(np.searchsorted(freed, need)) + 1
    return order[:count].astype(np.int64)
