"""A batch for a loop of one's own: tokens in, attention over pages out."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import UsageError
from kvpaged.keys import Salt
from kvpaged.loading import Ahead
from kvpaged.sequences import NOTHING
from kvpaged.tokens import Ids


class TokenBatch(Batch):
    """A batch for a loop of one's own: it holds the tokens to compute next, flat and ragged.

    Attributes:
        tokens: int64 `[n]`, the tokens not computed yet, row after row.
        positions: int64 `[n]`, each token's place in its sequence.
        cu_seqlens: int32 `[rows + 1]`, where each row's tokens begin in `tokens`.
        reused: int64 `[rows]` on the host, tokens of each row that were found in the cache when the
            batch was made: never the last one, which is computed to have something to go on from.

    The tensors are on the device of the cache's first group. After every layer has attended,
    `extend` gives each row its next tokens.
    """

    def __init__(
        self,
        cache: CacheBooks,
        sequences: Sequence[Sequence[int] | Tensor],
        *,
        salt: Salt | Sequence[Salt] = None,
        salt_from: int | Sequence[int] = 0,
    ) -> None:
        ids = [as_ids(sequence, row) for row, sequence in enumerate(sequences)]
        trails = cache.trails(len(ids), salt, salt_from)
        super().__init__(cache, len(ids), trails)
        self._pending: list[np.ndarray] = []
        try:
            with Ahead(cache, ids, trails), cache.lock:
                for row, tokens in enumerate(ids):
                    if (match := self.find(row, tokens, len(tokens) - 1)) is not None:
                        length = match.longest(len(tokens) - 1)
                        self.attach(row, match, tokens[:length])
            self.reused = self.lengths.copy()
            self._prepare([tokens[n:] for tokens, n in zip(ids, self.reused.tolist(), strict=True)])
            cache.count_reuse(salt, [len(tokens) for tokens in ids], self.reused.tolist())
        except BaseException:
            self.close()
            raise

    def extend(self, tokens: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> None:
        """Give each row its next tokens: one a row (a vector), or a list of them a row (possibly
        empty).

        Raises:
            UsageError: the step before was not computed, or the number of rows is another.
            OutOfPagesError: no room; rows and pages are as before, and the same call may be made
                again.
        """
        self._settle()
        if isinstance(tokens, Tensor):
            tokens = tokens.tolist()
        rows: list[Sequence[int]] = [[x] if isinstance(x, int | np.integer) else x for x in tokens]  # type: ignore[list-item]
        if len(rows) != self.rows:
            raise UsageError(f"extend takes tokens for {self.rows} rows, got {len(rows)}")
        self._prepare([as_ids(row, i) for i, row in enumerate(rows)])

    def fork(self, row: int) -> int:
        """Add a sequence that shares everything row `row` holds; returns its row number.

        Raises:
            UsageError: no such row, or tokens wait to be computed.
        """
        return self.branch(row, 1)[0]

    def branch(self, row: int, n: int) -> list[int]:
        """Add `n` sequences that share everything row `row` holds; returns their row numbers.

        Raises:
            UsageError: no such row, `n` below 1, or tokens wait to be computed.
        """
        if n < 1:
            raise UsageError(f"a row branches into at least 1 more, got {n}")
        self._settle()
        rows = self.rows
        self.select([*range(rows), *[row] * n])
        return list(range(rows, rows + n))

    def select(self, rows: Sequence[int]) -> None:
        """Become the sequences `rows` (indices; they may repeat or be left out), in that order;
        tokens that wait to be computed are dropped.

        Raises:
            UsageError: no such row.
        """
        self.check_open()
        self._chosen(rows)
        if self._complete():
            self._settle()
        super().select(rows)

    def rewind(self, row: int, *, to: int) -> None:
        """Forget row `row`'s tokens from `to` on; tokens that wait to be computed are dropped on
        all rows. Where `to` lies within a compressed page, that page's tokens up to there come
        first in the row's next `tokens`.

        Raises:
            UsageError: no such row, or see `Batch.rewind_all`.
        """
        if self._complete():
            self._settle()
        if not 0 <= row < self.rows:
            raise UsageError(f"row {row} is not in 0..{self.rows - 1}")
        lengths = self.whole()
        lengths[row] = to
        self.rewind_all(lengths)

    def close(self) -> None:
        """Give all pages back; full ones wait in the prefix index. Closing twice is nothing."""
        if not self.closed and not self._cache.closed and self._complete():
            self._settle()
        super().close()

    def commit_computed(self) -> None:
        """Count the tokens of a step all of whose layers have attended; without one, nothing."""
        self._settle()

    def settle_computed(self) -> None:
        """Count the tokens of a step all of whose layers have attended; those of another wait."""
        self.check_open()
        if self._complete():
            self._settle()

    def _settle(self) -> None:
        self.check_open()
        if self.step is None:
            return
        if not self._complete():
            missing = sorted(set(self._cache.layers) - self.step.attended)
            raise UsageError(
                f"tokens wait to be computed: layers {missing[:8]} have not attended in this step"
            )
        self.commit(self._pending)
        self.owed = [NOTHING] * self.rows
        self.publish()

    def _complete(self) -> bool:
        return self.step is not None and len(self.step.attended) == len(self._cache.layers)

    def _prepare(self, ids: list[np.ndarray]) -> None:
        ids = [np.concatenate(both) for both in zip(self.owed, ids, strict=True)]
        flat = np.concatenate(ids) if ids else np.empty(0, np.int64)
        step = self.begin(np.array([len(x) for x in ids], np.int64), flat.astype(np.int32))
        self._pending = ids  # what is owed stays so until it is computed: the step may be dropped
        self.tokens = step.tokens.long()
        self.positions = step.positions.long()
        self.cu_seqlens = step.cu_seqlens


def as_ids(tokens: Sequence[int] | Tensor, row: int) -> Ids:
    """Token ids as int64, checked."""
    array = np.asarray(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(
            f"row {row}: tokens are a flat sequence of ints, got shape {array.shape} of "
            f"{array.dtype}"
        )
    ids: Ids = array.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise UsageError(
            f"row {row}: token ids lie in 0..{2**31 - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    return ids
