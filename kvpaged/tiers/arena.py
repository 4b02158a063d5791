"""Host memory of exactly so many bytes, dealt out in pieces."""

import ctypes
import logging
import mmap
import threading
from bisect import bisect_left

import torch
from torch import Tensor

from kvpaged.config import format_bytes
from kvpaged.errors import ConfigError, IntegrityError, UsageError
from kvpaged.pages.pool import available_bytes

ALIGN = 256
"""Where pieces begin, and what their sizes are rounded up to: wide loads and copies like that."""
TOUCH_BYTES = 64 << 20
"""Bytes whose pages are made by a call, some 20 ms: closing waits no longer for that."""
POPULATE_WRITE = 23
"""Of madvise: make pages of a range without changing what is in them (Linux from 5.14 on)."""

_log = logging.getLogger(__name__)


def rounded(size: int) -> int:
    """Bytes that a piece of `size` takes up."""
    return -(-size // ALIGN) * ALIGN


class Arena:
    """One memory and who has which piece of it. Not thread-safe: the owner's lock is held around
    every call; the bytes are touched by whoever holds a piece.

    Invariants:
        1. Holes are sorted, not empty, do not touch each other, and begin and end at multiples of
           `ALIGN`.
        2. What is no hole was given out, or is the rest of less than `ALIGN` bytes at the end.
        3. No hole is larger than `_most`.

    Attributes:
        bytes: of the memory.
        memory: uint8 `[bytes]` on the CPU, zeros at first, committed by the system as it is
            touched; pinning commits it whole.
    """

    def __init__(self, bytes: int, *, pin: bool) -> None:
        """
        Args:
            bytes: in all.
            pin: lock the memory in place for copies by a GPU, where there is one. A thread does
                it, the memory can be used meanwhile; what cannot be pinned stays as it is, and a
                warning says so.

        Raises:
            ConfigError: `bytes` is not positive, or more than the machine has left.
        """
        if bytes <= 0:
            raise ConfigError(f"an arena has more than {bytes} bytes")
        free = available_bytes(torch.device("cpu"))
        if free is not None and bytes > free:
            raise ConfigError(
                f"{format_bytes(bytes)} of host memory were asked for and the machine has "
                f"{format_bytes(free)} left"
            )
        try:
            system = mmap.mmap(-1, bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConfigError(
                f"the system has no {format_bytes(bytes)} of address space: {error}"
            ) from error
        self.bytes = bytes
        self.memory: Tensor = torch.frombuffer(system, dtype=torch.uint8)
        whole = bytes // ALIGN * ALIGN
        self._starts, self._ends = ([0], [whole]) if whole else ([], [])
        self._most = whole
        self._closed = False
        self._pinner = _Pinner(self.memory) if pin and torch.cuda.is_available() else None

    @property
    def pinned(self) -> bool:
        """Whether all of it is pinned by now; any thread may ask."""
        return self._pinner is not None and self._pinner.done

    def alloc(self, size: int) -> int | None:
        """The offset of the first hole's start that has room for `size` bytes (above 0), a multiple
        of `ALIGN`; `None` if there is none.
        """
        assert size > 0
        need, largest = rounded(size), 0
        if need > self._most:
            return None
        for number, start in enumerate(self._starts):
            left = self._ends[number] - start - need
            if left >= 0:
                if left:
                    self._starts[number] = start + need
                else:
                    del self._starts[number], self._ends[number]
                return start
            largest = max(largest, left + need)
        self._most = largest
        return None

    def free(self, offset: int, size: int) -> None:
        """Take back a piece, or a part of one that begins at a multiple of `ALIGN`."""
        end = offset + rounded(size)
        at = bisect_left(self._starts, offset)
        before = at > 0 and self._ends[at - 1] == offset
        behind = at < len(self._starts) and self._starts[at] == end
        assert offset % ALIGN == 0 <= offset < end <= self.bytes
        assert at == 0 or self._ends[at - 1] <= offset, "taken back twice"
        assert at == len(self._starts) or end <= self._starts[at], "taken back twice"
        if before and behind:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
        elif before:
            self._ends[at - 1] = end
        elif behind:
            self._starts[at] = offset
        else:
            self._starts.insert(at, offset)
            self._ends.insert(at, end)
        at -= before
        self._most = max(self._most, self._ends[at] - self._starts[at])

    def free_bytes(self) -> int:
        """Bytes of all holes."""
        return sum(self._ends) - sum(self._starts)

    def check_integrity(self, pieces: list[tuple[int, int]] | None = None) -> None:
        """Check the books, against the (offset, size) of everything that is held if given.

        Raises:
            IntegrityError: naming the first offset that is off.
        """
        last = -1
        for start, end in zip(self._starts, self._ends, strict=True):
            if start % ALIGN or end % ALIGN or not last < start < end <= self.bytes:
                raise IntegrityError(f"the hole [{start}, {end}) after one that ends at {last}")
            if end - start > self._most:
                raise IntegrityError(f"the hole [{start}, {end}) is larger than {self._most}")
            last = end
        if pieces is None:
            return
        holes = list(zip(self._starts, self._ends, strict=True))
        held = [(offset, offset + rounded(size)) for offset, size in pieces]
        at = 0
        for start, end in sorted(holes + held):
            if start != at:
                raise IntegrityError(f"bytes from {at} to {start} are held twice, or by nobody")
            at = end
        if at != self.bytes // ALIGN * ALIGN:
            raise IntegrityError(f"bytes from {at} on are held by nobody")

    def close(self) -> None:
        """Unpin, and let the memory go as soon as nobody has a view of it. Twice is nothing."""
        if self._closed:
            return
        self._closed = True
        if self._pinner is not None:
            self._pinner.close()
        self.memory = self.memory[:0].clone()
        self._starts, self._ends = [], []

    def check_open(self) -> None:
        """Raise `UsageError` if it is closed."""
        if self._closed:
            raise UsageError("the memory is closed")


class _Pinner:
    """Pins a memory, in a thread of its own, and unpins it in the end.

    Its pages are made piece by piece, which is most of the work, and then registered in one call:
    a copy that crosses from one registered range into another, or out of one, is an invalid
    argument to CUDA, and runs of pieces lie across any border.

    Attributes:
        done: all of it is pinned.
    """

    def __init__(self, memory: Tensor) -> None:
        self.done = False
        self._memory = memory
        self._device = torch.cuda.current_device()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpaged-pinner", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        start, size = self._memory.data_ptr(), self._memory.numel()
        for offset in range(0, size, TOUCH_BYTES):
            if self._stop.is_set() or not _make(start + offset, min(TOUCH_BYTES, size - offset)):
                break
        if self._stop.is_set():
            return
        torch.cuda.set_device(self._device)
        code = int(torch.cuda.cudart().cudaHostRegister(start, size, 0))
        if code:
            _log.warning(
                "%s of host memory stay unpinned: cudaHostRegister says %d",
                format_bytes(size), code,
            )  # fmt: skip
        self.done = not code

    def close(self) -> None:
        """It is unpinned when this returns."""
        self._stop.set()
        self._thread.join()
        if self.done:
            self.done = False
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())


def _make(start: int, size: int) -> bool:
    """Have the system make pages of memory that is in use meanwhile; whether it could. By ctypes,
    which lets other Python threads run; `mmap.madvise` does not.
    """
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # no Linux: registering makes them
        return False
    made: int = madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), POPULATE_WRITE)
    return made == 0
