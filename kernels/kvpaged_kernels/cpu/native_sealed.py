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
from kvpaged_kernels.sealed import MOVE_BLOCK, MOVES, Part, Receipt, SliceLayout

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
        ("queries", _address),
    )  # fmt: skip


class NativeSeal:
    """The code that makes slices of a layout."""

    def __init__(self, layout: SliceLayout) -> None:
        """Raises `NativeError`: there can be none for it here."""
        self._layout = layout
        self._code = load("native_seal", layout.dtype, _constants(layout)).seal_pages
        self._code.restype, self._code.argtypes = None, [_address, ctypes.c_int]

    def __call__(
        self, k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor,
        queries: Tensor | None,
    ) -> Receipt:  # fmt: skip
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
            None if queries is None else queries.data_ptr(),
        )  # fmt: skip
        self._code(ctypes.addressof(told), native_threads())
        return Receipt(sums.sum(2), errors.amax(2))


class _Layer(ctypes.Structure):
    """native_sealed.h's `Pages`."""

    _fields_ = (
        ("k", _address), ("v", _address),
        ("k_entry", _int), ("k_head", _int), ("k_slot", _int),
        ("v_entry", _int), ("v_head", _int), ("v_slot", _int),
        ("kv_heads", _int), ("entries", _int), ("window", _int),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
        ("slices", _address), ("slice_entry", _int), ("sealed_entries", _int), ("keep", _int),
    )  # fmt: skip


class _Decode(ctypes.Structure):
    _fields_ = (
        ("pages", _Layer), ("table", _address), ("lengths", _address),
        ("table_row", _int), ("width", _int), ("rows", _int),
        ("q", _address), ("q_row", _int), ("q_head", _int),
        ("sinks", _address), ("out", _address),
    )  # fmt: skip


class _Prefill(ctypes.Structure):
    _fields_ = (
        ("pages", _Layer),
        ("k", _address), ("v", _address),
        ("k_entry", _int), ("k_head", _int), ("k_slot", _int),
        ("v_entry", _int), ("v_head", _int), ("v_slot", _int),
        ("kv_heads", _int), ("entries", _int), ("window", _int),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
        ("table", _address), ("lengths", _address), ("cu_q", _address), ("cu_own", _address),
        ("table_row", _int), ("width", _int), ("rows", _int),
        ("q", _address), ("q_row", _int), ("q_head", _int),
        ("sinks", _address), ("out", _address),
    )  # fmt: skip


class _Told(ctypes.Structure):
    _fields_ = (("what", _int), ("row", _int), ("a", _int), ("b", _int), ("entries", _int))


_WRONG = (
    "",
    "row {row} has {a} tokens, a table of {b} pages",
    "page {a} of row {row} is entry {b} of {entries}",
    "row {row} has {a} new tokens of {b} in all; there are {entries} queries",
    "row {row} has {a} own pages, its new tokens need {b}; there are {entries}",
)
"""By `_Told.what`."""


class _Code:
    """The library for a layout and a number of query heads a KV head."""

    def __init__(self, layout: SliceLayout, group: int) -> None:
        constants = (("GROUP", group), *_constants(layout))
        code = load("native_sealed", layout.dtype, constants)
        self.decode = code.mixed_decode
        self.decode.restype, self.decode.argtypes = _int, [_address, ctypes.c_int, _address]
        self.prefill = code.mixed_prefill
        self.prefill.restype = _int
        self.prefill.argtypes = [_address, _int, _int, ctypes.c_int, _address]


_code = lru_cache(maxsize=64)(_Code)


class NativeSealed:
    """A layer's pages of which some are sealed, as native code has them."""

    def __init__(
        self, k_pages: Tensor, v_pages: Tensor, slices: Tensor, layout: SliceLayout, q_heads: int,
        *, keep: int, scale: float, window: int | None, softcap: float | None,
    ) -> None:  # fmt: skip
        """Arguments are those of `reference.mixed.mixed_decode`, checked.

        Raises:
            NativeError: there can be no code for it here.
        """
        self._kept = k_pages, v_pages, slices
        self._layout = layout
        self._pages = _Layer(
            k_pages.data_ptr(), v_pages.data_ptr(), *k_pages.stride()[:3], *v_pages.stride()[:3],
            layout.kv_heads, min(len(k_pages), len(v_pages)), window or 0, scale, softcap or 0.0,
            slices.data_ptr(), slices.stride(0), len(slices), keep,
        )  # fmt: skip
        self._code = _code(layout, q_heads // layout.kv_heads)

    def decode(
        self, q: Tensor, block_table: Tensor, seq_lens: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Attention of one query a row, as `reference.mixed.mixed_decode` defines it; arguments are
        checked but for what tables and lengths hold.

        Raises:
            MemoryError: to work in.
            ValueError: a row has more tokens than its pages hold, or sees an entry that there
                isn't.
        """
        out = q.new_empty((*q.shape[:2], self._layout.v_dim))
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        call = _Decode(
            self._pages, block_table.data_ptr(), seq_lens.data_ptr(), block_table.stride(0),
            block_table.shape[1], len(seq_lens), q.data_ptr(), *q.stride()[:2],
            None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        told = _Told()
        wanted = self._code.decode(ctypes.addressof(call), native_threads(), ctypes.addressof(told))
        _refuse(wanted, told)
        return out

    def prefill(
        self, q: Tensor, own_k: Tensor, own_v: Tensor, cu_own: Tensor, block_table: Tensor,
        cu_q: Tensor, seq_lens: Tensor, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of ragged new tokens, as `reference.mixed.mixed_prefill` defines it; arguments
        are checked but for what tables, lengths and boundaries hold.

        Raises:
            MemoryError: to work in.
            ValueError: as of `decode`; boundaries don't rise from 0 to all queries, or own pages
                are not those of a row's new tokens.
        """
        out = q.new_empty((*q.shape[:2], self._layout.v_dim))
        sinks = None if sinks is None else sinks.detach().float().contiguous()
        call = _Prefill(
            self._pages, own_k.data_ptr(), own_v.data_ptr(), *own_k.stride()[:3],
            *own_v.stride()[:3], self._layout.kv_heads, len(own_k), 0, 0.0, 0.0,
            block_table.data_ptr(), seq_lens.data_ptr(), cu_q.data_ptr(), cu_own.data_ptr(),
            block_table.stride(0), block_table.shape[1], len(seq_lens), q.data_ptr(),
            *q.stride()[:2], None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        told = _Told()
        wanted = self._code.prefill(
            ctypes.addressof(call), len(q), len(own_k), native_threads(), ctypes.addressof(told)
        )
        _refuse(wanted, told)
        return out


def _refuse(wanted: int, told: _Told) -> None:
    if wanted:
        raise MemoryError(f"no {wanted} bytes for native attention to work in")
    if told.what:
        text = _WRONG[told.what]
        raise ValueError(text.format(row=told.row, a=told.a, b=told.b, entries=told.entries))


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
        ("HEAD", layout.head_bytes), ("MOVES", MOVES), ("MOVE_BLOCK", MOVE_BLOCK),
    )  # fmt: skip


@lru_cache(maxsize=64)
def native_seal(layout: SliceLayout) -> NativeSeal | None:
    """The code that makes slices of a layout; `None`: there is none, and it has been said why."""
    try:
        return NativeSeal(layout)
    except NativeError as error:
        # As text: whoever keeps the record would keep the frames of the error, and so batches.
        _log.warning("pages are sealed by stock torch: %s", str(error))
        return None


@lru_cache(maxsize=64)
def has_native_sealed(layout: SliceLayout, group: int) -> bool:
    """Whether there is code for attention over a layout; where not, it has been said why."""
    try:
        _code(layout, group)
    except NativeError as error:
        _log.warning("attention over sealed pages stays with stock torch: %s", str(error))
        return False
    return True
