"""What is put: one value, or several that belong together."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from kvpaged.errors import UsageError
from kvpaged.lsm.log import Coming
from kvpaged.lsm.values import Tensors, coming_delete


class Put(NamedTuple):
    """A value to be put.

    Attributes:
        key: 1 to 65,535 bytes.
        value: a tensor, or a dict of them by name; on any device, of any dtype.
        metadata: JSON, kept with it.
        parent: the key it should lie behind, as a page of a prompt behind the page before;
            empty for none.
        ttl: seconds until it expires; `None` for never.
    """

    key: bytes
    value: Tensors
    metadata: Mapping[str, Any] | None = None
    parent: bytes = b""
    ttl: float | None = None


class WriteBatch:
    """Collects puts and deletions; `commit`, or the end of a `with` block without an exception,
    makes them happen together. Not thread-safe.

    Tensors are encoded as they come, or copied: what happens to them afterwards changes nothing.
    """

    def __init__(
        self, make: Callable[[Put], Coming], write: Callable[[Sequence[Coming]], Sequence[bool]]
    ):
        self._make, self._write = make, write
        self._coming: dict[bytes, Coming] | None = {}

    def put(
        self, key: bytes, value: Tensors, *, metadata: Mapping[str, Any] | None = None,
        parent: bytes = b"", ttl: float | None = None,
    ) -> None:  # fmt: skip
        """See `TensorStore.put`; in place of what this batch did with the key before."""
        self._open()[key] = self._make(Put(key, value, metadata, parent, ttl))

    def delete(self, key: bytes) -> None:
        """Delete a value if there is one by then."""
        self._open()[key] = coming_delete(key)

    def commit(self) -> None:
        """Do it; the batch cannot be used any more.

        Raises:
            StorageError: as `TensorStore.put` does; nothing of the batch has happened.
        """
        coming = list(self._open().values())
        self._coming = None
        if coming:
            self._write(coming)

    def _open(self) -> dict[bytes, Coming]:
        if self._coming is None:
            raise UsageError("the batch was committed or left")
        return self._coming

    def __enter__(self) -> "WriteBatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if kind is None and self._coming is not None:
            self.commit()
        self._coming = None
