"""A batch for a loop of one's own: tokens in, attention over pages out."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import UsageError
from kvpaged.tokens import Ids


class TokenBatch(Batch):
    """A batch for a loop of one's own: it holds the tokens to compute next, flat and ragged.

    Attributes:
        tokens: int64 `[n]`, the tokens not computed yet, row after row.
        positions: int64 `[n]`, each token's place in its sequence.
        cu_seqlens: int32 `[rows + 1]`, where each row's tokens begin in `tokens`.

    All on the device of the cache's first group. After every layer has attended, `extend` gives
    each row its next tokens.
    """

    def __init__(self, cache: CacheBooks, sequences: Sequence[Sequence[int] | Tensor]) -> None:
        super().__init__(cache, len(sequences))
        self._pending: list[np.ndarray] = []
        try:
            self._prepare([_as_ids(sequence, row) for row, sequence in enumerate(sequences)])
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
        self._prepare([_as_ids(row, i) for i, row in enumerate(rows)])

    def fork(self, row: int) -> int:
        """Add a sequence that shares everything row `row` holds; returns its row number.

        Raises:
            UsageError: no such row, or tokens wait to be computed.
        """
        self._settle()
        self.select([*range(self.rows), row])
        return self.rows - 1

    def rewind(self, row: int, *, to: int) -> None:
        """Forget row `row`'s tokens from `to` on; tokens that wait to be computed are dropped on
        all rows.

        Raises:
            UsageError: no such row, or see `Batch.rewind_all`.
        """
        if self.step is not None and self._complete():
            self.commit(self._pending)
        if not 0 <= row < self.rows:
            raise UsageError(f"row {row} is not in 0..{self.rows - 1}")
        lengths = self.lengths.copy()
        lengths[row] = to
        self.rewind_all(lengths)

    def commit_computed(self) -> None:
        """Count the tokens of a step all of whose layers have attended; without one, nothing."""
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

    def _complete(self) -> bool:
        return self.step is not None and len(self.step.attended) == len(self._cache.layers)

    def _prepare(self, ids: list[np.ndarray]) -> None:
        flat = np.concatenate(ids) if ids else np.empty(0, np.int64)
        step = self.begin(np.array([len(x) for x in ids], np.int64), flat.astype(np.int32))
        self._pending = ids
        self.tokens = step.tokens.long()
        self.positions = step.positions.long()
        self.cu_seqlens = step.cu_seqlens


def _as_ids(tokens: Sequence[int] | Tensor, row: int) -> Ids:
    """Token ids as int64, checked."""
    array = np.asarray(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(
            f"row {row}: tokens are a flat sequence of ints, got shape {array.shape} of "
            f"{array.dtype}"
        )
    ids: Ids = array.astype(np.int64)
    if ids.size and ids.min() < 0:
        raise UsageError(f"row {row}: token ids are not negative, got {int(ids.min())}")
    return ids
