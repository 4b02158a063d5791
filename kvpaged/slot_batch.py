"""A batch whose rows come and go: what a scheduler of requests runs on."""

import numpy as np
import numpy.typing as npt

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import UsageError
from kvpaged.keys import Salt
from kvpaged.offload.promotion import Promotion
from kvpaged.pages.trail import Match, Trail
from kvpaged.sequences import NEVER, NOTHING
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
        loading: of rows that begin with pages of tiers, their promotion, until `settle_loading`.
    """

    def __init__(self, cache: CacheBooks, slots: int) -> None:
        super().__init__(cache, slots)
        self.private = cache.private
        self.tokens: npt.NDArray[np.int32] = np.zeros((slots, 256), np.int32)
        self.known: Ints = np.zeros(slots, np.int64)
        self.coming: Ints = np.zeros(slots, np.int64)
        self.loading: dict[int, Promotion] = {}
        # Of those: pages that were in the pool, tokens they begin with, salts.
        self._held: dict[int, tuple[int, int, Salt]] = {}

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
            How many of its tokens need not be computed: at most all but the last. With pages that
            tiers have, the row is in `loading`, and that number is not certain yet.

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
            promotion = None
            if match is not None:
                promotion = self.begin_loading(slot, match, ids, len(ids) - 1)
            if promotion is None:
                length = self._attach_longest(slot, match, ids)
        if promotion is None:
            self._cache.count_reuse([salt], [len(ids)], [length])
            return length
        self._held[slot] = int(self.settled[slot]), int(self.lengths[slot]), salt
        self.settled[slot] = NEVER  # nothing of it is published before it was verified
        self.loading[slot] = promotion
        promotion.start()
        return int(self.lengths[slot])

    def _attach_longest(self, slot: int, match: Match | None, ids: Ints) -> int:
        """Let an empty row begin with what was found; returns how many tokens; the lock is held."""
        length = 0 if match is None else match.longest(len(ids) - 1)
        if match is not None and length:
            self.attach(slot, match, ids[:length])
        return length

    def settle_loading(self, slot: int) -> int:
        """A row's promotion is over: it holds what has come. Between steps only.

        Returns:
            How many of its tokens need not be computed.
        """
        outcome = self.loading.pop(slot).outcome
        assert outcome is not None
        held, found, salt = self._held.pop(slot)
        ids = self.ids(slot)
        if outcome.error is None:
            self.settled[slot] = held
        elif all(group.window is None for group in self._groups):
            self.settled[slot] = held
            good = (held + outcome.pages) * self._cache.config.page_size
            self.rewind(slot, min(found, good))
            found = int(self.lengths[slot])
        else:  # what a window sees before the missing page may never have been asked for
            self._last, self._plans = None, [None] * len(self._groups)
            with self._cache.lock:
                self.empty(slot)
                found = self._attach_longest(slot, self.find(slot, ids, len(ids) - 1), ids)
        self._cache.count_reuse([salt], [len(ids)], [found])
        return found

    def certain(self, slot: int) -> int:
        """How many tokens a row holds that are computed or verified."""
        held = self._held.get(slot)
        return int(self.lengths[slot]) if held is None else held[0] * self._cache.config.page_size

    def cancel_loading(self, slot: int) -> None:
        """Nobody needs the row's pages any more."""
        promotion = self.loading.pop(slot, None)
        if promotion is not None:
            del self._held[slot]
            promotion.cancel("")

    def close(self) -> None:
        """See `Batch.close`."""
        for slot in list(self.loading):
            self.cancel_loading(slot)
        super().close()

    def demote(self, slot: int) -> None:
        """The row is about to lose its pages and will come back for them: full ones that are in the
        prefix index go to the first tier, ahead of their eviction.
        """
        trail, mover = self._trails[slot], self._cache.mover
        if trail is not None and mover is not None:
            with self._cache.lock:
                mover.demoter.note_parting(trail.node)

    def vacate(self, slot: int) -> None:
        """End a row's sequence: its pages go back, published ones wait for others."""
        self.cancel_loading(slot)
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

    def rewind_all(self, lengths: Ints) -> None:
        """See `Batch.rewind_all`; nothing is owed: what a row has not computed of its ids is
        computed as a prompt's.
        """
        super().rewind_all(lengths)
        self.owed = [NOTHING] * self.rows

    def rewind(self, slot: int, to: int) -> None:
        """Forget a row's keys and values from token `to` on, or from the beginning of the
        compressed page it lies in; its ids stay.

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
