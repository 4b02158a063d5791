"""A stream of a GPU that copies: all that the copies of `cuda_copies` ask of the device."""

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ANY_DIRECTION = 4
"""cudaMemcpyDefault: the driver sees from the addresses which way it goes."""

_FIRST_POLL_S, _LAST_POLL_S = 50e-6, 1e-3


@functools.cache
def _runtime() -> Any:
    """The CUDA runtime that torch has loaded, for the one call that torch does not offer."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        paths = {line.split(maxsplit=5)[-1].strip() for line in lines if "libcudart" in line}
    if len(paths) != 1:
        raise RuntimeError(f"torch has one CUDA runtime loaded, found {sorted(paths)}")
    library = ctypes.CDLL(paths.pop())
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    call = library.cudaMemcpy2DAsync
    call.argtypes = [pointer, size, pointer, size, size, size, ctypes.c_int, pointer]
    call.restype = ctypes.c_int
    library.cudaGetErrorString.argtypes = [ctypes.c_int]
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


class Mark:
    """A place in a lane: everything it was told before."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def passed(self) -> bool:
        """Whether the lane has got there; raises what the device raises if it failed."""
        return bool(self._event.query())

    def wait(self, timeout: float | None) -> bool:
        """Whether it has got there within `timeout` seconds; asks again and again, so that a
        device that hangs does not hang the host for good. `None`: as long as it takes.
        """
        if timeout is None:
            self._event.synchronize()
            return True
        end, pause = time.monotonic() + timeout, _FIRST_POLL_S
        while not self.passed():
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LAST_POLL_S)
        return True

    def order(self) -> None:
        """Have the calling thread's current stream wait; the host does not."""
        torch.cuda.current_stream(self._device).wait_event(self._event)


class Lane:
    """A stream of its own. Any thread may call; nothing here waits on the host but `fetched` reads
    and `seconds`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def follow(self) -> None:
        """Have what comes after wait for what the calling thread's current stream was told."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, torch and Triton work in this lane."""
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        """The place the lane has got to when it has done all it was told so far."""
        event = torch.cuda.Event()
        event.record(self._stream)
        return Mark(event, self.device)

    def copy(
        self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Copy `height` rows of `width` bytes between addresses, each `pitch` after the one
        before. From or to memory that is not pinned, it has ended when the call returns.
        """
        library = _runtime()
        failed = library.cudaMemcpy2DAsync(
            to, to_pitch, source, source_pitch, width, height, _ANY_DIRECTION,
            self._stream.cuda_stream,
        )  # fmt: skip
        if failed:
            name = library.cudaGetErrorString(failed).decode()
            raise RuntimeError(f"copying {height} rows of {width} bytes: {name}")

    def reaches(self, memory: Tensor) -> bool:
        """Whether kernels of the device can read this host memory."""
        return memory.is_pinned()

    def send(self, numbers: npt.NDArray[Any]) -> Tensor:
        """Numbers on the device, in this lane; to be called within `active`."""
        pinned = torch.empty(numbers.shape, dtype=torch.int64, pin_memory=True)
        np.copyto(pinned.numpy(), numbers)
        return pinned.to(self.device, non_blocking=True)

    def fetch(self, found: Tensor) -> Tensor:
        """A tensor on the host, to be read after a mark that comes later; within `active`."""
        host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        host.copy_(found, non_blocking=True)
        return host

    def scratch(self, size: int) -> tuple[Tensor, Tensor]:
        """Bytes on the device and as many pinned ones on the host, for trials."""
        return (
            torch.empty(size, dtype=torch.uint8, device=self.device),
            torch.empty(size, dtype=torch.uint8, pin_memory=True),
        )

    def seconds(self, work: Callable[[], None]) -> float:
        """Time of `work` in this lane, waited for; within `active`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self._stream)
        work()
        end.record(self._stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
