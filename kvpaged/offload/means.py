"""Which means a copy into pages takes: the copy engines, or a small kernel."""

import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from kvpaged import ops
from kvpaged.config import Backend
from kvpaged.offload.lane import Lane

Means = Literal["dma", "kernel"]

SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
"""Bytes of a piece at which both are timed."""

_TRIAL_BYTES = 8 << 20
_MOST_PIECES = 64
_ROUNDS = 3


class Timing(NamedTuple):
    """Seconds of copying the same pieces.

    Attributes:
        piece_bytes: of each.
        dma, kernel: seconds.
    """

    piece_bytes: int
    dma: float
    kernel: float


def choose(table: Sequence[Timing], piece_bytes: int) -> Means:
    """What was faster at the timed size next to `piece_bytes` (by ratio); the engines in a draw,
    and with nothing timed: they take nothing from the model.
    """
    if not table:
        return "dma"
    nearest = min(
        table,
        key=lambda timed: max(
            timed.piece_bytes / max(piece_bytes, 1), piece_bytes / timed.piece_bytes
        ),
    )
    return "kernel" if nearest.kernel < nearest.dma else "dma"


def calibrate(lane: Lane, backend: Backend, sizes: Sequence[int] = SIZES) -> tuple[Timing, ...]:
    """Time both at some sizes, in memory of its own; waits for the device, a few milliseconds.

    Pieces are apart on both sides, as they are in pages and records.
    """
    device, host = lane.scratch(_TRIAL_BYTES)
    with lane.active():
        return tuple(_timing(lane, backend, device, host, size) for size in sizes)


def _timing(lane: Lane, backend: Backend, device: Tensor, host: Tensor, size: int) -> Timing:
    step = 2 * size
    order = list(range(min(_MOST_PIECES, _TRIAL_BYTES // step)))[::-1]
    entries = lane.send(np.array(order))
    pages, records = (
        each.as_strided((len(order), 1, 1, size), (step, 0, 0, 1)) for each in (device, host)
    )

    def by_engine() -> None:
        for row, entry in enumerate(order):
            to, source = device.data_ptr() + step * entry, host.data_ptr() + step * row
            lane.copy(to, size, source, size, size, 1)

    def by_kernel() -> None:
        ops.fill_pages(records, pages, entries, backend=backend)

    def seconds(work: Callable[[], None]) -> float:
        work()  # compiles, warms
        return statistics.median(lane.seconds(work) for _ in range(_ROUNDS))

    return Timing(size, dma=seconds(by_engine), kernel=seconds(by_kernel))
