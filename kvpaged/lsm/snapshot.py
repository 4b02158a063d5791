"""A store as it was at one moment, to be read while writes go on."""

from collections.abc import Iterator
from types import TracebackType

from kvpaged.errors import UsageError
from kvpaged.lsm.lock import StoreLock
from kvpaged.lsm.lookup import Lookup
from kvpaged.lsm.reader import Reader
from kvpaged.lsm.tree import Found
from kvpaged.lsm.view import View


class Snapshot(Lookup):
    """What `TensorStore.snapshot` gives. Any thread may call; it outlives its store.

    Values expire in it as time stood when it was made, and reading them does not count as asking
    for them.
    """

    def __init__(self, cond: StoreLock, reader: Reader, view: View):
        super().__init__(cond, reader)
        self._view: View | None = view

    def _open_view(self) -> View:
        if self._view is None:
            raise UsageError("the snapshot is closed")
        return self._view

    def _check_open(self) -> None:
        self._open_view()

    def _find(self, key: bytes) -> Found | None:
        return self._open_view().find(key)

    def _touch(self, found: Found) -> None:
        pass

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, Found]]:
        return self._open_view().scan(prefix)

    def _damaged(self, found: Found, *, drop: bool) -> None:
        with self._cond:
            self._reader.counts.damaged += 1

    def __len__(self) -> int:
        return sum(1 for _ in self._open_view().scan())

    def close(self) -> None:
        """Let the files go that only this kept."""
        self._view = None

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()
