"""A batch whose rows come and go: what a scheduler of requests runs on."""

import numpy as np
import numpy.typing as npt

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import UsageError
from kvpaged.keys import Salt
from kvpaged.pages.prefix import Trail
from kvpaged.sequences import NEVER
from kvpaged.step import Ints
from kvpaged.tokens import Ids, TokenLog


class SlotBatch(Batch):
    """A batch of `slots` rows, each empty or one sequence's, for as long as that lasts.

    One thread at a time. All calls but those of a step come between steps.

    Attributes:
        tokens: int32 `[slots, width]`, the ids of each row, as far as known: its user writes those
            it generates, and makes room for them by `widen`.
        known: int64 `[slots]`, how many of them.
        coming: int64 `[slots]`, how many of those have been chosen and not yet read: their place
            in `tokens` holds anything.
    """

    def __init__(self, cache: CacheBooks, slots: int) -> None:
        super().__init__(cache, slots)
        self.private = cache.private
        self.tokens: npt.NDArray[np.int32] = np.zeros((slots, 256), np.int32)
        self.known: Ints = np.zeros(slots, np.int64)
        self.coming: Ints = np.zeros(slots, np.int64)

    def widen(self, width: int) -> None:
        """Make room for rows of `width` tokens."""
        rows, old = self.tokens.shape
        if width > old:
            wider = np.zeros((rows, max(width, 2 * old)), np.int32)
            wider[:, :old] = self.tokens
            self.tokens = wider

    def admit(self, slot: int, ids: Ints, trail: Trail | None, *, salt: Salt = None) -> int:
        """Begin a sequence in an empty row, with the longest prefix of `ids` that is in the cache.

        Args:
            slot: the row.
            ids: int64 `[n]`, its first tokens, at least one.
            trail: a fresh one of its own (`CacheBooks.trails`): where it begins in the prefix
                index; `None`: nothing is shared.
            salt: the trail's, for the statistics.

        Returns:
            How many of its tokens need not be computed: at most all but the last.

        Raises:
            UsageError: the row is taken.
        """
        if self.known[slot]:
            raise UsageError(f"row {slot} holds a sequence of {int(self.known[slot])} tokens")
        if trail is not None and trail.identity != self._identity:
            self.keep_private("the model or the namespace has changed since it began")
            self._identity = trail.identity
        self.private = self._cache.private
        self._trails[slot] = trail
        self.settled[slot] = NEVER if trail is None else 0
        self.widen(len(ids))
        self.tokens[slot, : len(ids)] = ids
        self.known[slot] = len(ids)
        with self._cache.lock:
            match = self.find(slot, ids, len(ids) - 1)
            length = 0 if match is None else match.longest(len(ids) - 1)
            if match is not None and length:
                self.attach(slot, match, ids[:length])
        self._cache.count_reuse([salt], [len(ids)], [length])
        return length

    def vacate(self, slot: int) -> None:
        """End a row's sequence: its pages go back, published ones wait for others."""
        with self._cache.lock:
            for group in self._groups:
                group.drop_row(slot)
        self._last, self._plans = None, [None] * len(self._groups)
        self._trails[slot] = None
        self.settled[slot] = NEVER
        self.lengths[slot] = self.known[slot] = self.coming[slot] = 0
        self.logs[slot] = TokenLog()

    def fork(self, source: int, target: int) -> None:
        """Let an empty row begin with all that another holds, sharing its pages."""
        if self.known[target]:
            raise UsageError(f"row {target} holds a sequence of {int(self.known[target])} tokens")
        trail = self._trails[source]
        with self._cache.lock:
            for group in self._groups:
                group.trim(self.lengths)
                first = int(group.table.first[source])
                group.attach(target, first, group.table.held(source).copy())
        self._trails[target] = trail and trail.copy()
        self.settled[target] = self.settled[source]
        self.lengths[target] = self.lengths[source]
        self.tokens[target] = self.tokens[source]
        self.known[target] = self.known[source]
        self._mark([source], unclean=False)
        self._mark(target)

    def rewind(self, slot: int, to: int) -> None:
        """Forget a row's keys and values from token `to` on; its ids stay.

        Raises:
            UsageError: see `Batch.rewind_all`.
        """
        lengths = self.lengths.copy()
        lengths[slot] = to
        self.rewind_all(lengths)

    def pages_held(self) -> list[Ints]:
        """For each layer group, int64 `[slots]`: the pages each row holds."""
        return [group.table.count - group.table.first for group in self._groups]

    def ids(self, slot: int, start: int = 0) -> Ids:
        """A row's token ids from place `start` on, as far as they have been read: int64, a copy."""
        return self.tokens[slot, start : self.known[slot] - self.coming[slot]].astype(np.int64)

    def _known_ids(self, row: int, start: int) -> Ids | None:
        return self.ids(row, start)
