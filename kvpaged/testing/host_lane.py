"""A lane without a GPU: what the engines and the kernel would do is done on host memory, at once.

What `CudaCopies` tells its lanes (addresses, pitches, sizes) is so really carried out.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.offload.lane import Lane, Mark


class HostMark(Mark):
    """All that its lane was told is done."""

    def __init__(self, lane: "HostLane") -> None:
        self._lane = lane

    def passed(self) -> bool:
        """True, or what a broken device raises."""
        if self._lane.broken:
            raise RuntimeError("an illegal memory access was encountered")
        return True

    def wait(self, timeout: float | None) -> bool:
        """As `passed`."""
        return self.passed()

    def order(self) -> None:
        """Count the call."""
        self._lane.ordered += 1


class HostLane(Lane):
    """Stands in for a stream.

    Attributes:
        copies: width and height of each copy so far.
        followed, ordered: calls of `follow`, and of `order` of its marks.
        broken: whether the device has failed.
        pinned: what `reaches` says.
        times: what `seconds` says, one after the other; without them it measures.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies: list[tuple[int, int]] = []
        self.followed = self.ordered = 0
        self.broken = False
        self.pinned = True
        self.times: Iterator[float] | None = None

    def follow(self) -> None:
        """Count the call."""
        self.followed += 1

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing."""
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        """A mark that is passed."""
        return HostMark(self)

    def copy(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Copy, row by row; what the driver would refuse is refused."""
        if not (0 < width <= min(to_pitch, source_pitch) and height > 0):
            raise RuntimeError(f"invalid pitch: {to_pitch}, {source_pitch} for rows of {width}")
        self.copies.append((width, height))
        for row in range(height):
            ctypes.memmove(to + row * to_pitch, source + row * source_pitch, width)

    def reaches(self, memory: Tensor) -> bool:
        """As `pinned` says."""
        return self.pinned

    def send(self, numbers: npt.NDArray[Any]) -> Tensor:
        """A copy, int64."""
        return torch.from_numpy(numbers.astype(np.int64))

    def fetch(self, found: Tensor) -> Tensor:
        """A copy."""
        return found.clone()

    def scratch(self, size: int) -> tuple[Tensor, Tensor]:
        """Bytes, twice."""
        return torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)

    def seconds(self, work: Callable[[], None]) -> float:
        """Do the work; the next of `times`, or how long it took."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start if self.times is None else next(self.times)
