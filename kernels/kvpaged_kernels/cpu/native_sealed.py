"""Sealed pages in native code: to make them, and attention over them (`native_seal.cpp`,
`native_sealed.cpp`).
"""

import ctypes
import logging
from functools import lru_cache

import torch
from torch import Tensor

from kvpaged_kernels.cpu.native import NativeError, load, native_threads
from kvpaged_kernels.cpu.native_copy import coefficients
from kvpaged_kernels.cpu.sealing import Receipt
from kvpaged_kernels.sealed import Part, SliceLayout

_log = logging.getLogger(__name__)
_int, _address = ctypes.c_int64, ctypes.c_void_p

WHOLE = 16
"""Widths and groups that native code knows are multiples of it."""


class _Seal(ctypes.Structure):
    _fields_ = (
        ("k", _address), ("v", _address),
        ("k_entry", _int), ("k_layer", _int), ("k_head", _int), ("k_slot", _int),
        ("v_entry", _int), ("v_layer", _int), ("v_head", _int), ("v_slot", _int),
        ("slices", _address), ("slice_entry", _int), ("slice_layer", _int),
        ("src", _address), ("dst", _address),
        ("pages", _int), ("layers", _int), ("heads", _int),
        ("factors", _address), ("sums", _address), ("errors", _address),
    )  # fmt: skip


class NativeSeal:
    """The code that makes slices of a layout."""

    def __init__(self, layout: SliceLayout) -> None:
        """Raises `NativeError`: there can be none for it here."""
        self._layout = layout
        self._code = load("native_seal", layout.dtype, _constants(layout)).seal_pages
        self._code.restype, self._code.argtypes = None, [_address, ctypes.c_int]

    def __call__(
        self, k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor
    ) -> Receipt:
        """Seal, as `reference.seal.seal` defines it; arguments are checked.

        Raises:
            ValueError: an entry that there isn't.
        """
        layers, heads = k_pages.shape[1:3]
        src, dst = src.contiguous(), dst.contiguous()
        for name, entries, count in (
            ("src", src, min(len(k_pages), len(v_pages))), ("dst", dst, len(slices)),
        ):  # fmt: skip
            if len(entries) and not 0 <= int(entries.min()) <= int(entries.max()) < count:
                raise ValueError(f"{name} has entries {entries.tolist()} of {count}")
        sums = torch.empty(len(src), layers, heads, dtype=torch.int64)
        errors = torch.empty(len(src), layers, heads, 2)
        factors = coefficients(0, self._layout.slice_bytes // 4)
        told = _Seal(
            k_pages.data_ptr(), v_pages.data_ptr(), *k_pages.stride()[:4], *v_pages.stride()[:4],
            slices.data_ptr(), *slices.stride()[:2], src.data_ptr(), dst.data_ptr(),
            len(src), layers, heads, factors.ctypes.data, sums.data_ptr(), errors.data_ptr(),
        )  # fmt: skip
        self._code(ctypes.addressof(told), native_threads())
        return Receipt(sums.sum(2), errors.amax(2))


def _form(part: Part) -> int:
    """As native_codes.h numbers them."""
    return {"exact": 0, "fp8": 1, "int": 2 + (part.bits == 4)}[part.form]


def _constants(layout: SliceLayout) -> tuple[tuple[str, int], ...]:
    """What code for a layout is compiled with. Raises `NativeError`: there is none."""
    parts = layout.k, layout.v
    sizes = [layout.k_dim, layout.v_dim, layout.page_size]
    sizes += [part.group for part in parts if part.form == "int"]
    if any(size % WHOLE or not size for size in sizes):
        raise NativeError(f"widths and groups {sizes} are not all multiples of {WHOLE}")
    return (
        ("K_DIM", layout.k_dim), ("V_DIM", layout.v_dim), ("PAGE", layout.page_size),
        ("K_FORM", _form(layout.k)), ("V_FORM", _form(layout.v)),
        ("K_PER", layout.k.group or WHOLE), ("V_PER", layout.v.group or WHOLE),
        ("HEAD", layout.head_bytes),
    )  # fmt: skip


@lru_cache(maxsize=64)
def native_seal(layout: SliceLayout) -> NativeSeal | None:
    """The code that makes slices of a layout; `None`: there is none, and it has been said why."""
    try:
        return NativeSeal(layout)
    except NativeError as error:
        _log.warning("pages are sealed by stock torch: %s", error)
        return None
