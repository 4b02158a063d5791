"""Which values go when there is no room: a pure policy over a snapshot."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from kvpaged.errors import ConfigError

Numbers = np.ndarray[Any, np.dtype[np.uint64]]
Places = np.ndarray[Any, np.dtype[np.int64]]


class Candidates(NamedTuple):
    """Values that live, as columns of one length.

    Attributes:
        stamps: when each was last asked for or written, milliseconds since 1970.
        sequences: the order in which they were written.
        costs: bytes they take up.
        expires: when they expire, milliseconds since 1970; 0 for never.
        prefixes: first 8 bytes of each key as a big-endian number, of a shorter one with zeros.
    """

    stamps: Numbers
    sequences: Numbers
    costs: Numbers
    expires: Numbers
    prefixes: Numbers


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


def lru_except(prefix: bytes) -> Policy:
    """`lru` of values whose keys do not begin so (1 to 8 bytes); the others are never evicted."""
    if not 0 < len(prefix) <= 8:
        raise ConfigError(f"a prefix to keep has 1 to 8 bytes, not {len(prefix)}")
    shift, mine = np.uint64(64 - 8 * len(prefix)), np.uint64(int.from_bytes(prefix, "big"))

    def policy(values: Candidates, need: int, now: int) -> Places:
        others = np.flatnonzero(values.prefixes >> shift != mine)
        chosen = lru(Candidates(*(column[others] for column in values)), need, now)
        return others[chosen].astype(np.int64)

    return policy
