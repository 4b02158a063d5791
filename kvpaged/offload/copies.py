"""Copies between the pages of a class and records in host memory: what a device offers.

Records lie side by side, uint8 `[n, record_bytes]`, each in the form of `tiers.record`. A copy is
begun and ends later; whoever begins one holds a lease on its pages until then.
"""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvpaged.pages.extents import Ids

Sums = npt.NDArray[np.int64]


class Ticket(ABC):
    """A copy that was begun."""

    @abstractmethod
    def wait(self, timeout: float | None = None) -> bool:
        """Wait, on the host, until it has ended; false if it has not after `timeout` seconds.
        Callable from any thread, again and again.
        """

    @abstractmethod
    def order(self) -> None:
        """Have what the calling thread does next with the device come after the copy: on a GPU its
        current stream waits, the host does not; elsewhere as `wait`.
        """


class OutTicket(Ticket):
    """A copy out of pages."""

    @abstractmethod
    def sums(self) -> Sums:
        """After it has ended: int64 `[n, layers]`, the checksums kept when the pages were
        sealed.
        """


class InTicket(Ticket):
    """A copy into pages."""

    @abstractmethod
    def wrong(self) -> npt.NDArray[np.bool_]:
        """After it has ended: bool `[n]`, whose bytes, as they lie in the pages now, are not what
        the checksums say.
        """


class Copies(ABC):
    """Begins copies for the pages of one class. Any thread may call; calls do not touch books."""

    @abstractmethod
    def out(self, ids: Ids, records: Tensor) -> OutTicket:
        """Begin to copy pages, in the given order, into `records`, uint8 `[n, record_bytes]`
        (contiguous; pinned where the device wants that).

        It comes after everything the device was told to do before this call. Runs of adjacent
        pages go in one copy. Raises nothing for what happens later: `wait` of a copy that failed
        returns True, and `sums` raises.
        """

    @abstractmethod
    def into(self, ids: Ids, records: Tensor, sums: Sums, layers: slice) -> InTicket:
        """Begin to copy some layers' slices of records into pages, and to sum them there.

        Args:
            ids: int32 `[n]`, pages.
            records: uint8 `[n, record_bytes]`, rows contiguous, at any stride.
            sums: int64 `[n, layers of the class]`: what the slices should sum to.
            layers: which layers of the class, `slice(start, stop)`.
        """


class MixedCopies(Copies):
    """Copies of a layer group's pages of two classes, under one numbering; each call is of pages of
    one of them.
    """

    def __init__(self, first_sealed: int, exact: Copies, sealed: Copies) -> None:
        """`first_sealed`: see `pages.mixed.MixedAllocator`."""
        self._first, self._exact, self._sealed = first_sealed, exact, sealed

    def out(self, ids: Ids, records: Tensor) -> OutTicket:
        """See `Copies.out`."""
        copies, mine = self._of(ids)
        return copies.out(mine, records)

    def into(self, ids: Ids, records: Tensor, sums: Sums, layers: slice) -> InTicket:
        """See `Copies.into`."""
        copies, mine = self._of(ids)
        return copies.into(mine, records, sums, layers)

    def _of(self, ids: Ids) -> tuple[Copies, Ids]:
        compressed = ids >= self._first
        if not compressed.any():
            return self._exact, ids
        assert compressed.all(), "a copy is of pages of one class"
        return self._sealed, (ids - self._first).astype(np.int32)
