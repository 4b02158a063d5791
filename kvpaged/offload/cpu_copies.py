"""Copies of a pool in host memory: made within the call, by the thread that calls."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.config import Backend
from kvpaged.offload.copies import Copies, InTicket, OutTicket, Sums
from kvpaged.offload.runs import Block, blocks_of, check_records, runs_of
from kvpaged.pages import classops
from kvpaged.pages.extents import Ids
from kvpaged.pages.pool import PageClass
from kvpaged.tiers.record import body_bytes

Bytes = npt.NDArray[np.uint8]


class DoneOut(OutTicket):
    """A copy out of pages that has ended."""

    def __init__(self, sums: Sums) -> None:
        self._sums = sums

    def wait(self, timeout: float | None = None) -> bool:
        """True."""
        return True

    def order(self) -> None:
        """Nothing to wait for."""

    def sums(self) -> Sums:
        """The checksums."""
        return self._sums


class DoneIn(InTicket):
    """A copy into pages that has ended."""

    def __init__(self, wrong: npt.NDArray[np.bool_]) -> None:
        self._wrong = wrong

    def wait(self, timeout: float | None = None) -> bool:
        """True."""
        return True

    def order(self) -> None:
        """Nothing to wait for."""

    def wrong(self) -> npt.NDArray[np.bool_]:
        """Which pages came out wrong."""
        return self._wrong


def _sides(block: Block, pool: Bytes, records: Bytes) -> tuple[Bytes, Bytes]:
    """A block's bytes in the pool and in the records, `[layers, heads, pages, bytes]`."""
    return (
        np.ndarray(block.shape, np.uint8, pool, block.pool, (*block.pool_strides, 1)),
        np.ndarray(block.shape, np.uint8, records, block.record, (*block.record_strides, 1)),
    )


class CpuCopies(Copies):
    """Copies of a class of pages in host memory, of either layout.

    Any thread may call. A call has ended when it returns; it takes one core and gives up the
    interpreter's lock while it copies: a run of adjacent pages goes in one `np.copyto` for K and
    one for V, where they lie apart.
    """

    def __init__(self, page_class: PageClass, backend: Backend) -> None:
        """`backend`: by what checksums are computed."""
        assert page_class.flat.device.type == "cpu"
        self._class = page_class
        self._backend: Backend = backend
        self._pool: Bytes = page_class.flat.view(torch.uint8).numpy()
        self._record_bytes = body_bytes(page_class.geometry)

    def out(self, ids: Ids, records: Tensor) -> OutTicket:
        """See `Copies.out`; a pool that keeps no checksums has them computed."""
        for pool, record in self._pairs(ids, records, slice(0, self._class.geometry.layers)):
            np.copyto(record, pool)
        if self._class.checksums is not None:
            return DoneOut(self._class.checksums.numpy()[ids])
        return DoneOut(self._sums(ids, slice(0, self._class.geometry.layers)))

    def into(self, ids: Ids, records: Tensor, sums: Sums, layers: slice) -> InTicket:
        """See `Copies.into`; the pool keeps the given sums."""
        for pool, record in self._pairs(ids, records, layers):
            np.copyto(pool, record)
        expected = sums[:, layers]
        if self._class.checksums is not None:
            self._class.checksums.numpy()[ids, layers] = expected
        return DoneIn((self._sums(ids, layers) != expected).any(1))

    def _sums(self, ids: Ids, layers: slice) -> Sums:
        found: Sums = classops.page_checksums(
            self._class, ids, backend=self._backend, layers=layers
        ).numpy()
        return found

    def _pairs(self, ids: Ids, records: Tensor, layers: slice) -> list[tuple[Bytes, Bytes]]:
        check_records(records, ids.size, self._record_bytes)
        if not ids.size:
            return []
        geometry = self._class.geometry
        span = (len(records) - 1) * records.stride(0) + self._record_bytes
        theirs = records.as_strided((span,), (1,)).numpy()
        blocks = blocks_of(
            geometry, layers, pages=self._class.allocator.capacity,
            storage_bytes=self._pool.size, record_stride=records.stride(0),
        )  # fmt: skip
        return [
            _sides(block.of(run), self._pool, theirs)
            for run in runs_of(self._class.entries(ids), geometry.entries_per_page())
            for block in blocks
        ]
