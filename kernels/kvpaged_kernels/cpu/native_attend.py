"""Attention on a CPU in native code: pages anywhere, rows of any length and any new tokens.

A layer's call puts the new tokens of each row into their slots and attends. What a step's layers
have in common, who computes what above all, is worked out once (`NativeStep`).
"""

import ctypes
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvpaged_kernels.cpu.native import load, native_threads

_int, _address = ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        ("k", _address), ("v", _address),
        ("k_entry", _int), ("k_head", _int), ("k_slot", _int),
        ("v_entry", _int), ("v_head", _int), ("v_slot", _int),
        ("kv_heads", _int), ("entries", _int), ("window", _int),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("table", _address), ("lengths", _address), ("cu_q", _address),
        ("table_row", _int), ("rows", _int),
        ("q_row", _int), ("q_head", _int),
        ("k_row", _int), ("k_head", _int),
        ("v_row", _int), ("v_head", _int),
    )  # fmt: skip


class _Told(ctypes.Structure):
    """What native_check.h says of a step."""

    _fields_ = (
        ("what", _int), ("row", _int), ("a", _int), ("b", _int),
        ("entries", _int), ("trunks", _int),
    )  # fmt: skip


_WRONG = (
    "",
    "cu_q begins with {a}, not with 0",
    "cu_q falls from {a} to {b} at row {row}",
    "cu_q ends with {a}, for {b} new tokens of rows",
    "row {row} has {b} new tokens and {a} in all",
    "row {row} has {a} tokens, a table {b} pages of {page_size}",
    "page {a} of row {row} is entry {b} of {entries}",
)
"""By `_Told.what`; what follows is that there is no memory."""


class _Code:
    """The library for a dtype and a layer's sizes."""

    def __init__(
        self, dtype: torch.dtype, group: int, k_dim: int, v_dim: int, page_size: int
    ) -> None:
        constants = (("GROUP", group), ("K_DIM", k_dim), ("V_DIM", v_dim), ("PAGE", page_size))
        code = load("native_attend", dtype, constants)
        self.attend, self.plan, self.drop = code.attend, code.plan_step, code.drop_plan
        self.attend.restype, self.plan.restype, self.drop.restype = _int, _address, None
        self.attend.argtypes = [_address] * 7
        self.plan.argtypes = [_address, _address, _int, _int, ctypes.c_int, _address]
        self.drop.argtypes = [_address]


_code = lru_cache(maxsize=64)(_Code)


class NativeStep:
    """What the layers of a step have in common: tables, lengths, how new tensors lie, and a plan.

    `NativeLayer.plan` makes it. Serves one call at a time.

    Attributes:
        form: see `form_of`.
        kind: what layers must have in common besides: dtype, page size, window.
        address: of the plan.
        entries: above all that its queries see.
        trunks: runs of pages that are read once for several rows, or once for a row in tasks.
    """

    def __init__(
        self, code: _Code, address: int, told: _Told, form: tuple[Any, ...],
        kind: tuple[Any, ...], kept: Any,
    ) -> None:  # fmt: skip
        self._code, self._kept = code, kept
        self.address, self.form, self.kind = address, form, kind
        self.entries: int = told.entries
        self.trunks: int = told.trunks

    def __del__(self) -> None:
        self._code.drop(self.address)


def form_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What must be alike for two layers to share a `NativeStep`."""
    return q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()


class NativeLayer:
    """A layer's pages, as native code has them."""

    def __init__(
        self, k_pages: Tensor, v_pages: Tensor, q_heads: int, *, scale: float, window: int | None,
        softcap: float | None,
    ) -> None:  # fmt: skip
        """
        Args:
            k_pages, v_pages: `[entries, kv_heads, page_size, width]`, of one dtype; any strides
                with the last 1.
            q_heads: a multiple of `kv_heads`.
            scale, window, softcap: as of `reference.attention.paged_prefill`.

        Raises:
            NativeError: there can be no code for it here.
            ValueError: the pages don't fit one another.
        """
        _, kv_heads, self._page_size, k_dim = k_pages.shape
        v_dim = v_pages.shape[3]
        fits = v_pages.shape[1:3] == k_pages.shape[1:3] and k_pages.dtype == v_pages.dtype
        if not fits or q_heads % kv_heads or not k_pages.stride(3) == v_pages.stride(3) == 1:
            raise ValueError(
                f"{q_heads} query heads, pages {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
            )
        self._kept = k_pages, v_pages
        self._layer = _Layer(
            k_pages.data_ptr(), v_pages.data_ptr(), *k_pages.stride()[:3], *v_pages.stride()[:3],
            kv_heads, min(len(k_pages), len(v_pages)), window or 0, scale, softcap or 0.0,
        )  # fmt: skip
        self.options = scale, softcap
        self._address = ctypes.addressof(self._layer)
        self._heads = q_heads, kv_heads, k_dim, v_dim
        self._dtype = k_pages.dtype
        self._kind = k_pages.dtype, self._page_size, window
        self._entries = self._layer.entries
        self._code = _code(k_pages.dtype, q_heads // kv_heads, k_dim, v_dim, self._page_size)

    def plan(
        self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, cu_q: Tensor
    ) -> NativeStep:
        """Plan a step, for this layer and all that differ from it in `scale`, `softcap` and pages
        alone. What native code will read and write by the step is checked here, once: row
        boundaries, lengths, and each entry that a query sees; others may be anything.

        Args:
            q, k, v: `[tokens, heads, width]`, as any layer of the step gives them.
            table: int32 `[rows, width]`, entries of logical pages.
            lengths: int32 `[rows]`, new tokens included.
            cu_q: int32 `[rows + 1]`: row `i`'s new tokens, its last, are `[cu_q[i], cu_q[i + 1])`.

        The last three are kept, and read by each call: they must stay as they are.

        Raises:
            MemoryError: for the plan.
            ValueError: shapes or dtypes disagree; `cu_q` doesn't rise from 0 to all tokens; a row
                has fewer tokens than new ones, or more than its pages hold, or sees an entry that
                there isn't.
        """
        rows, tables = len(lengths), (table, lengths, cu_q)
        fits = q.ndim == k.ndim == v.ndim == 3 and table.ndim == 2
        fits = fits and len(q) == len(k) == len(v) and len(table) == rows == len(cu_q) - 1
        fits = fits and all(x.dtype == torch.int32 and x.stride(-1) == 1 for x in tables)
        fits = fits and q.stride(2) == k.stride(2) == v.stride(2) == 1
        if not fits:
            raise ValueError(
                f"new tokens of rows: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
                f"table {tuple(table.shape)} of {table.dtype}, lengths {tuple(lengths.shape)} of "
                f"{lengths.dtype}, cu_q {tuple(cu_q.shape)} of {cu_q.dtype}"
            )
        self._check(q, k, v)
        step = _Step(
            table.data_ptr(), lengths.data_ptr(), cu_q.data_ptr(), table.stride(0), rows,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        )  # fmt: skip
        told = _Told()
        address = self._code.plan(
            self._address, ctypes.addressof(step), len(q), table.shape[1], native_threads(),
            ctypes.addressof(told),
        )  # fmt: skip
        if address is None:
            self._refuse(told, rows, len(q))
        return NativeStep(self._code, address, told, form_of(q, k, v), self._kind, tables)

    def __call__(
        self, step: NativeStep, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Write `k` and `v` (`[tokens, kv_heads, width]`) and attend.

        Args:
            step: of tensors that lie as these do, and of a layer like this one.
            q: `[tokens, q_heads, k_dim]`.
            sinks: `[q_heads]`; see `reference.attention.paged_prefill`.

        Returns:
            `[tokens, q_heads, v_dim]`, contiguous, of `q`'s dtype.

        Raises:
            MemoryError: to work in; nothing was written.
            ValueError: shapes or dtypes are others than the layer's, or the step's, or the step
                sees entries that this layer doesn't have.
        """
        self._check(q, k, v)
        if form_of(q, k, v) != step.form:
            raise ValueError(f"tensors don't lie as the step says: {form_of(q, k, v)}, {step.form}")
        if step.kind != self._kind or step.entries > self._entries:
            raise ValueError(
                f"a step of {step.entries} entries, (dtype, page size, window) {step.kind}, for a "
                f"layer of {self._entries}, {self._kind}"
            )
        out = q.new_empty((*q.shape[:2], v.shape[2]))
        if sinks is not None:
            if sinks.shape != q.shape[1:2]:
                raise ValueError(f"sinks {tuple(sinks.shape)} of {q.shape[1]} query heads")
            sinks = sinks.detach().float().contiguous()
        wanted = self._code.attend(
            self._address, step.address, q.data_ptr(), k.data_ptr(), v.data_ptr(),
            None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        if wanted:
            raise MemoryError(f"no {wanted} bytes for native attention to work in")
        return out

    def _refuse(self, told: _Told, rows: int, tokens: int) -> NoReturn:
        if told.what == len(_WRONG):
            raise MemoryError(
                f"no {told.a} bytes or more for a plan of {rows} rows and {tokens} new tokens"
            )
        text = _WRONG[told.what].format(
            row=told.row, a=told.a, b=told.b, entries=self._entries, page_size=self._page_size
        )
        raise ValueError(text)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads = q.shape[1], k.shape[1], k.shape[2], v.shape[2]
        fits = heads == self._heads and q.dtype == k.dtype == v.dtype == self._dtype
        if not fits or q.shape[2] != k.shape[2] or v.shape[1] != k.shape[1]:
            raise ValueError(
                f"a layer of {self._heads} (heads, KV heads, widths) of {self._dtype} got "
                f"{heads} of {q.dtype}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
            )
