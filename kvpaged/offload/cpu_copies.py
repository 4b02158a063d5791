"""Copies of a pool in host memory: made within the call, by the thread that calls."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.config import Backend
from kvpaged.geometry import PageGeometry
from kvpaged.offload.copies import Copies, InTicket, OutTicket, Sums
from kvpaged.offload.runs import Block, blocks_of, check_records, runs_of
from kvpaged.pages import classops
from kvpaged.pages.extents import Ids
from kvpaged.pages.pool import PageClass, SealedClass
from kvpaged.tiers.record import body_bytes
from kvpaged_kernels.cpu.native_copy import Side, copy_block, prepare

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
    interpreter's lock while it copies: a run of adjacent pages goes in one piece for K and one for
    V, where they lie apart. Native code sums the words as it writes them; where there is none, or
    not yet, numpy copies, and what was copied is read again to be summed.
    """

    def __init__(
        self, page_class: PageClass | SealedClass, backend: Backend, *, native: bool = True
    ) -> None:
        """
        Args:
            page_class: whose pages.
            backend: by what checksums are computed where they are computed apart.
            native: have native code made, and use it once it is there.
        """
        assert page_class.flat.device.type == "cpu"
        self._class = page_class
        self._backend: Backend = backend
        self._pool: Bytes = page_class.flat.view(torch.uint8).numpy()
        self._record_bytes = body_bytes(page_class.geometry)
        self._native = native
        if native:
            prepare()

    def out(self, ids: Ids, records: Tensor) -> OutTicket:
        """See `Copies.out`; a pool that keeps no checksums has them computed."""
        every, kept = slice(0, self._class.geometry.layers), self._class.checksums
        if kept is not None:
            self._copy(ids, records, every, None, inwards=False)
            return DoneOut(kept.numpy()[ids])
        sums = np.zeros((ids.size, every.stop), np.int64)
        if not self._copy(ids, records, every, sums, inwards=False):
            sums = self._sums(ids, every)
        return DoneOut(sums)

    def into(self, ids: Ids, records: Tensor, sums: Sums, layers: slice) -> InTicket:
        """See `Copies.into`; the pool keeps the given sums."""
        expected = sums[:, layers]
        found = np.zeros(expected.shape, np.int64)
        if not self._copy(ids, records, layers, found, inwards=True):
            found = self._sums(ids, layers)
        if self._class.checksums is not None:
            self._class.checksums.numpy()[ids, layers] = expected
        return DoneIn((found != expected).any(1))

    def _copy(
        self, ids: Ids, records: Tensor, layers: slice, sums: Sums | None, *, inwards: bool
    ) -> bool:
        """Copy some layers; whether their checksums are added to `sums`, `[n, layers]`."""
        check_records(records, ids.size, self._record_bytes)
        if not ids.size:
            return True
        geometry = self._class.geometry
        span = (len(records) - 1) * records.stride(0) + self._record_bytes
        theirs = records.as_strided((span,), (1,)).numpy()
        blocks = blocks_of(
            geometry, layers, pages=self._class.allocator.capacity,
            storage_bytes=self._pool.size, record_stride=records.stride(0),
        )  # fmt: skip
        v_first_word = geometry.v_first_word if isinstance(geometry, PageGeometry) else 0
        summed = True
        for run in runs_of(self._class.entries(ids), geometry.entries_per_page()):
            rows = None if sums is None else sums[run.row : run.row + run.pages]
            for place, block in enumerate(blocks):
                first_word = v_first_word if place else 0  # of K, or of K and V
                for some, here in block.of(run).by_layer(geometry, layers):
                    pool = Side(self._pool.ctypes.data + here.pool, here.pool_strides)
                    record = Side(theirs.ctypes.data + here.record, here.record_strides)
                    ends = (pool, record) if inwards else (record, pool)
                    mine = None if rows is None else rows[:, some]
                    done = self._native and copy_block(
                        here.shape, *ends, sums=mine, first_word=first_word
                    )
                    if not done:
                        arrays = _sides(here, self._pool, theirs)
                        np.copyto(*(arrays if inwards else arrays[::-1]))
                        summed = False
        return summed

    def _sums(self, ids: Ids, layers: slice) -> Sums:
        found: Sums = classops.page_checksums(
            self._class, ids, backend=self._backend, layers=layers
        ).numpy()
        return found
