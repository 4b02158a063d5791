"""Copies of a pool on a GPU: two streams beside the model's, and no wait on the host."""

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged import ops
from kvpaged.config import Backend
from kvpaged.offload.copies import Copies, InTicket, OutTicket, Sums
from kvpaged.offload.lane import Lane, Mark
from kvpaged.offload.means import SIZES, Means, Timing, calibrate, choose
from kvpaged.offload.runs import Block, blocks_of, check_records, runs_of
from kvpaged.pages import classops
from kvpaged.pages.extents import Ids
from kvpaged.pages.pool import PageClass, SealedClass
from kvpaged.tiers.record import body_bytes

_MOST_LOADS = 256
"""Loads in parts that are kept in mind; one that is forgotten waits a little more."""


class _Ended:
    """What both tickets are: a mark, and what the lane brings to the host before it."""

    def __init__(self, mark: Mark, found: Tensor) -> None:
        self._mark = mark
        self._found = found
        self._failure: RuntimeError | None = None

    def wait(self, timeout: float | None = None) -> bool:
        """See `Ticket.wait`."""
        try:
            return self._mark.wait(timeout)
        except RuntimeError as failure:  # the device's word on a copy that failed
            self._failure = failure
            return True

    def order(self) -> None:
        """See `Ticket.order`."""
        self._mark.order()

    def read(self) -> npt.NDArray[np.generic]:
        """What came to the host; raises what the device raised."""
        ended = self.wait(0)
        if self._failure is not None:
            raise self._failure
        assert ended, "read before the copy has ended"
        found: npt.NDArray[np.generic] = self._found.numpy()
        return found


class CudaOut(_Ended, OutTicket):
    """A copy out of a GPU's pages."""

    def sums(self) -> Sums:
        """See `OutTicket.sums`; raises RuntimeError if the copy failed."""
        return self.read().astype(np.int64)


class CudaIn(_Ended, InTicket):
    """A copy into a GPU's pages."""

    def wrong(self) -> npt.NDArray[np.bool_]:
        """See `InTicket.wrong`; raises RuntimeError if the copy failed."""
        return self.read().astype(np.bool_)


class CudaCopies(Copies):
    """Copies of a class of pages on a GPU.

    Any thread may call. Each way has a lane; what is begun comes after everything the calling
    thread's current stream was told before, in pages as in checksums. Nothing waits on the host,
    unless records are not pinned: then the driver does.

    Slices of layers of the same pages, each begun where the one before it stops, come after what
    came before the first of them: else a layer would wait for the model's layers before it, that
    were launched meanwhile. So the pages stay leased from the first slice to the last.

    Out goes by the copy engines. In goes by them or by a kernel of few programs, whichever
    `calibrate` found faster for pieces of that size; the kernel reads pinned memory only.

    Attributes:
        table: what `calibrate` measured; empty before.
        engine_copies, kernel_copies: how many of each were begun.
    """

    def __init__(
        self,
        page_class: PageClass | SealedClass,
        backend: Backend,
        device: torch.device,
        *,
        lanes: Callable[[torch.device], Lane] = Lane,
    ) -> None:
        """
        Args:
            page_class: whose pages.
            backend: whose kernels sum and, in, copy.
            device: where they lie.
            lanes: makes the two lanes; tests have some without a GPU.
        """
        assert page_class.flat.device.type == device.type
        self._class = page_class
        self._backend: Backend = backend
        self._out, self._in = lanes(device), lanes(device)
        self._bytes = page_class.flat.view(torch.uint8)
        self._record_bytes = body_bytes(page_class.geometry)
        self._lock = threading.Lock()
        self._next_layer: dict[bytes, int] = {}
        self._begun: list[tuple[Mark, Tensor]] = []
        self.table: tuple[Timing, ...] = ()
        self.engine_copies = self.kernel_copies = 0

    def calibrate(self, sizes: Sequence[int] = SIZES) -> None:
        """Time both ways in at some sizes, once at start; waits for the device."""
        self.table = calibrate(self._in, self._backend, sizes)

    def out(self, ids: Ids, records: Tensor) -> OutTicket:
        """See `Copies.out`; a pool that keeps no checksums has them computed."""
        check_records(records, ids.size, self._record_bytes)
        lane, kept = self._out, self._class.checksums
        lane.follow()
        blocks = self._blocks(classops.ALL_LAYERS, records)
        for block in self._of_runs(blocks, ids):
            self._by_engine(lane, block, records, into=False)
        with lane.active():
            if kept is not None:
                sums = kept[lane.send(ids)]
            else:
                entries = lane.send(self._class.entries(ids))
                sums = classops.entry_checksums(self._class, entries, backend=self._backend)
            found = lane.fetch(sums)
        mark = self._keep(lane, records)
        return CudaOut(mark, found)

    def into(self, ids: Ids, records: Tensor, sums: Sums, layers: slice) -> InTicket:
        """See `Copies.into`; the pool keeps the given sums."""
        check_records(records, ids.size, self._record_bytes)
        lane, kept = self._in, self._class.checksums
        if not self._goes_on(ids, layers):
            lane.follow()
        with lane.active():
            entries = lane.send(self._class.entries(ids))
            expected = lane.send(sums[:, layers])
            for block in self._blocks(layers, records):
                if ids.size and self._means(block, records) == "kernel":
                    self._by_kernel(block, records, entries)
                    continue
                for part in self._of_runs([block], ids):
                    self._by_engine(lane, part, records, into=True)
            if kept is not None:
                kept[:, layers].index_copy_(0, lane.send(ids), expected)
            arrived = classops.entry_checksums(
                self._class, entries, backend=self._backend, layers=layers
            )
            found = lane.fetch((arrived != expected).any(1))
        mark = self._keep(lane, records)
        return CudaIn(mark, found)

    def _goes_on(self, ids: Ids, layers: slice) -> bool:
        """Whether this slice begins where the last one of the same pages stopped."""
        first, stop, _ = layers.indices(self._class.geometry.layers)
        pages = ids.tobytes()
        with self._lock:
            goes_on = first > 0 and self._next_layer.pop(pages, None) == first
            self._next_layer.pop(pages, None)
            if stop < self._class.geometry.layers:
                self._next_layer[pages] = stop
                if len(self._next_layer) > _MOST_LOADS:  # loads that were given up
                    del self._next_layer[next(iter(self._next_layer))]
        return goes_on

    def _means(self, block: Block, records: Tensor) -> Means:
        if not self._in.reaches(records):
            return "dma"
        return choose(self.table, block.shape[3])

    def _blocks(self, layers: slice, records: Tensor) -> list[Block]:
        return blocks_of(
            self._class.geometry, layers, pages=self._class.allocator.capacity,
            storage_bytes=self._bytes.numel(), record_stride=records.stride(0),
        )  # fmt: skip

    def _of_runs(self, blocks: Sequence[Block], ids: Ids) -> Iterator[Block]:
        step = self._class.geometry.entries_per_page()
        for run in runs_of(self._class.entries(ids), step):
            yield from (block.of(run) for block in blocks)

    def _by_engine(self, lane: Lane, block: Block, records: Tensor, *, into: bool) -> None:
        pool, host = self._bytes.data_ptr(), records.data_ptr()
        for part in block.rectangles():
            ours, theirs = pool + part.pool, host + part.record
            self.engine_copies += 1
            if into:
                pitches = ours, part.pool_pitch, theirs, part.record_pitch
            else:
                pitches = theirs, part.record_pitch, ours, part.pool_pitch
            lane.copy(*pitches, part.width, part.height)

    def _by_kernel(self, block: Block, records: Tensor, entries: Tensor) -> None:
        self.kernel_copies += 1
        ops.fill_pages(
            block.in_records(records), block.in_pool(self._bytes), entries, backend=self._backend
        )

    def _keep(self, lane: Lane, records: Tensor) -> Mark:
        """Mark a copy's end, and hold its records until then, whoever lets them go."""
        mark = lane.mark()
        with self._lock:
            self._begun = [each for each in self._begun if not each[0].passed()]
            self._begun.append((mark, records))
        return mark
