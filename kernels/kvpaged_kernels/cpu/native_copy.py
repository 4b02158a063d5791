"""Bytes copied and summed in one pass over memory, in native code, by the thread that asks."""

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from itertools import chain
from operator import or_
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpaged_kernels.cpu.native import NativeError, load

_log = logging.getLogger(__name__)
_int, _address = ctypes.c_int64, ctypes.c_void_p


class _Block(ctypes.Structure):
    _fields_ = (
        ("to", _address), ("from_", _address),
        ("layers", _int), ("heads", _int), ("pages", _int), ("words", _int),
        ("to_layer", _int), ("to_head", _int), ("to_page", _int),
        ("from_layer", _int), ("from_head", _int), ("from_page", _int),
        ("factors", _address), ("sums", _address), ("sums_page", _int), ("sums_layer", _int),
    )  # fmt: skip


class Side(NamedTuple):
    """Where a block begins, an address, and bytes from a layer, a head, a page to the next."""

    address: int
    strides: tuple[int, int, int]


_Code = Callable[[int], None]


class _Library:
    """The code, once it is there: it is compiled behind whoever asks for it first."""

    def __init__(self) -> None:
        self.code: _Code | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def prepare(self) -> threading.Thread:
        """Begin to make it, if nobody has; the thread that does."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._make, name="kvpaged native copies", daemon=True
                )
                self._thread.start()
            return self._thread

    def _make(self) -> None:
        try:
            code = load("native_copy", torch.float32).copy_block
        except NativeError as error:  # all is done without it, more slowly
            _log.info("copies are summed apart: %s", error)
            return
        code.restype, code.argtypes = None, [_address]
        self.code = code


_library = _Library()


@lru_cache(maxsize=64)
def coefficients(first_word: int, words: int) -> npt.NDArray[np.int32]:
    """The multipliers of `reference.checksum`, int32 `[words]`, made once; nobody writes to it."""
    mask = 0xFFFFFFFF
    x = torch.arange(first_word, first_word + words, dtype=torch.int64)
    x = (x + 0x9E3779B9) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    x ^= x >> 16
    return x.to(torch.int32).numpy()


def prepare(timeout: float = 0.0) -> bool:
    """Have the code made if it is not, and wait so long for it; whether it is there."""
    thread = _library.prepare()
    if timeout:
        thread.join(timeout)
    return _library.code is not None


def _lies_at(sides: Sequence[Side]) -> int:
    """All bits that are set in addresses and strides."""
    return reduce(or_, chain.from_iterable((s.address, *s.strides) for s in sides))


def copy_block(
    shape: tuple[int, int, int, int], to: Side | None, source: Side, *,
    sums: npt.NDArray[np.int64] | None = None, first_word: int = 0,
) -> bool:  # fmt: skip
    """Copy `(layers, heads, pages, bytes)`, bytes being a multiple of 4.

    Args:
        shape: counts; the last is of adjacent bytes.
        to: where to; `None`: they are summed only.
        source: where from.
        sums: int64 `[pages, layers]`, to which the checksums of what is copied are added; `None`:
            they are not summed.
        first_word: of the first head, in its slice (see `reference.checksum`); the other heads
            follow it.

    Returns:
        Whether it is done: false where there is no native code (yet), or something lies at no
        multiple of 4.
    """
    code = _library.code
    layers, heads, pages, size = shape
    sides = (source,) if to is None else (source, to)
    if code is None or (size | _lies_at(sides)) & 3:
        return False
    assert sums is None or (sums.dtype == np.int64 and sums.shape == (pages, layers))
    words = size // 4
    factors = None if sums is None else coefficients(first_word, heads * words)
    block = _Block(
        None if to is None else to.address, source.address, layers, heads, pages, words,
        *((0, 0, 0) if to is None else to.strides), *source.strides,
        None if factors is None else factors.ctypes.data,
        None if sums is None else sums.ctypes.data,
        *((0, 0) if sums is None else (stride // 8 for stride in sums.strides)),
    )  # fmt: skip
    code(ctypes.addressof(block))
    return True
