"""The token ids a row of a batch holds, as far as they are known."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class TokenLog:
    """Token ids of one sequence, growing at the end; `None` once a forward pass came without ids.

    Not thread-safe: its batch's thread uses it.
    """

    def __init__(self) -> None:
        self._buffer: Ids = np.empty(64, np.int64)
        self._length = 0
        self._known = True

    def extend(self, ids: Ids | None) -> None:
        """Append ids; `None` makes the whole sequence one whose tokens are not known."""
        if ids is None:
            self._known = False
            return
        stop = self._length + len(ids)
        if stop > len(self._buffer):
            grown = np.empty(max(stop, 2 * len(self._buffer)), np.int64)
            grown[: self._length] = self._buffer[: self._length]
            self._buffer = grown
        self._buffer[self._length : stop] = ids
        self._length = stop

    def cut(self, length: int) -> None:
        """Forget the ids from `length` on."""
        self._length = min(self._length, length)

    def copy(self) -> "TokenLog":
        """An independent log of the same ids."""
        other = TokenLog()
        other._known = self._known
        other._buffer = self._buffer[: max(self._length, 64)].copy()
        other._length = self._length
        return other

    @property
    def ids(self) -> Ids | None:
        """The ids so far (a view), or `None` if some are not known."""
        return self._buffer[: self._length] if self._known else None
