"""Decode on a CPU in native code: pages anywhere, rows of any length, nothing planned.

A layer's call puts the one new token of each row into its slot and attends. What a step's layers
have in common (`NativeStep`) is looked at once.
"""

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvpaged_kernels.cpu.native import load

_int, _address = ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        ("k", _address), ("v", _address),
        ("k_entry", _int), ("k_head", _int), ("k_slot", _int),
        ("v_entry", _int), ("v_head", _int), ("v_slot", _int),
        ("kv_heads", _int), ("window", _int),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("table", _address), ("lengths", _address),
        ("table_row", _int), ("rows", _int),
        ("q_row", _int), ("q_head", _int),
        ("k_row", _int), ("k_head", _int),
        ("v_row", _int), ("v_head", _int),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _code(
    dtype: torch.dtype, group: int, k_dim: int, v_dim: int, page_size: int
) -> Callable[..., None]:
    constants = (("GROUP", group), ("K_DIM", k_dim), ("V_DIM", v_dim), ("PAGE", page_size))
    run: Any = load("native_decode", dtype, constants).decode
    run.restype = None
    run.argtypes = [_address] * 7 + [ctypes.c_int]
    return run  # type: ignore[no-any-return]


class NativeStep:
    """What the layers of a step have in common: tables, lengths, and how new tensors lie."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> None:
        """
        Args:
            q, k, v: `[rows, heads, width]`, as any layer of the step gives them.
            table: int32 `[rows, width]`, entries of logical pages; kept.
            lengths: int32 `[rows]`, new tokens included; kept.

        Raises:
            ValueError: shapes or dtypes disagree.
        """
        rows = len(lengths)
        self.form = form_of(q, k, v)
        fits = q.ndim == k.ndim == v.ndim == 3 and table.ndim == 2
        fits = fits and len(q) == len(k) == len(v) == len(table) == rows
        fits = fits and table.dtype == lengths.dtype == torch.int32
        fits = fits and table.stride(1) == 1 and lengths.is_contiguous()
        fits = fits and k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0
        fits = fits and q.stride(2) == k.stride(2) == v.stride(2) == 1
        if not fits:
            raise ValueError(
                f"one new token of each row: q {tuple(q.shape)}, k {tuple(k.shape)}, "
                f"v {tuple(v.shape)}, table {tuple(table.shape)} of {table.dtype}, lengths "
                f"{tuple(lengths.shape)} of {lengths.dtype}"
            )
        self._kept = table, lengths
        step = _Step(
            table.data_ptr(), lengths.data_ptr(), table.stride(0), rows, *q.stride()[:2],
            *k.stride()[:2], *v.stride()[:2],
        )  # fmt: skip
        self._step = step
        self.address = ctypes.addressof(step)


def form_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What must be alike for two layers to share a `NativeStep`."""
    return q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()


class NativeDecode:
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
            scale, window, softcap: as of `reference.attention.paged_decode`.

        Raises:
            NativeError: there can be no code for it here.
            ValueError: the pages don't fit one another.
        """
        _, kv_heads, page_size, k_dim = k_pages.shape
        v_dim = v_pages.shape[3]
        fits = v_pages.shape[1:3] == k_pages.shape[1:3] and k_pages.dtype == v_pages.dtype
        if not fits or q_heads % kv_heads or not k_pages.stride(3) == v_pages.stride(3) == 1:
            raise ValueError(
                f"{q_heads} query heads, pages {tuple(k_pages.shape)} and {tuple(v_pages.shape)}"
            )
        self._kept = k_pages, v_pages
        self._layer = _Layer(
            k_pages.data_ptr(), v_pages.data_ptr(), *k_pages.stride()[:3], *v_pages.stride()[:3],
            kv_heads, window or 0, scale, softcap or 0.0,
        )  # fmt: skip
        self.options = scale, softcap
        self._address = ctypes.addressof(self._layer)
        self._heads = q_heads, kv_heads, k_dim, v_dim
        self._dtype = k_pages.dtype
        self._run = _code(k_pages.dtype, q_heads // kv_heads, k_dim, v_dim, page_size)

    def __call__(
        self, step: NativeStep, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Write `k` and `v` (`[rows, kv_heads, width]`) and attend.

        Args:
            step: of tensors that lie as these do.
            q: `[rows, q_heads, k_dim]`.
            sinks: `[q_heads]`; see `reference.attention.paged_decode`.

        Returns:
            `[rows, q_heads, v_dim]`, contiguous, of `q`'s dtype.

        Raises:
            ValueError: shapes or dtypes are others than the layer's, or the step's.
        """
        heads = q.shape[1], k.shape[1], k.shape[2], v.shape[2]
        fits = heads == self._heads and q.dtype == k.dtype == v.dtype == self._dtype
        if not fits or form_of(q, k, v) != step.form or q.shape[2] != heads[2]:
            raise ValueError(
                f"a layer of {self._heads} (heads, KV heads, widths) of {self._dtype} got "
                f"{heads} of {q.dtype}, or tensors that don't lie as the step says"
            )
        out = q.new_empty((q.shape[0], heads[0], heads[3]))
        if sinks is not None:
            sinks = sinks.detach().float().contiguous()
        self._run(
            self._address, step.address, q.data_ptr(), k.data_ptr(), v.data_ptr(),
            None if sinks is None else sinks.data_ptr(), out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out
