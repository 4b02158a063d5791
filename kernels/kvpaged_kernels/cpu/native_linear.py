"""Products of few tokens with a layer's weights, at the speed at which memory gives those.

oneDNN's packed weights take 1.2 to 2 times as long from 1 to 32 rows (docs/log.md).
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kvpaged_kernels.cpu.large_pages import LargePages
from kvpaged_kernels.cpu.native import load, native_threads


class _Layer(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
        ("inner", ctypes.c_int64),
    )


class _Code:
    """The library for a dtype and how it wants weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        code = load("native_linear", dtype)
        self.run = code.linear
        self.run.restype = None
        self.run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int]
        self.block = int(code.columns_of_block())
        self.group = self.block * int(code.blocks_of_group())
        self.step = int(code.elements_of_step())


_code = lru_cache(maxsize=8)(_Code)


def packs(weight: Tensor) -> bool:
    """Whether there is code for a weight, `[columns, inner]`, here.

    Raises:
        NativeError: no code can be made here at all for its dtype.
    """
    code = _code(weight.dtype)
    return weight.device.type == "cpu" and weight.numel() > 0 and weight.shape[1] % code.step == 0


class NativeLinear:
    """The weights of a linear layer as native code wants them: a copy; of several layers of one
    input, if their columns are side by side (`pack_together`).

    Attributes:
        columns, inner: of the weight.
    """

    def __init__(self, packed: Tensor, bias: Tensor | None, columns: int, inner: int) -> None:
        """
        Args:
            packed: see native_linear.cpp; kept.
            bias: `[columns]`, contiguous, of the same dtype; kept.
        """
        self.columns, self.inner = columns, inner
        self._kept = packed, bias
        address = None if bias is None else bias.data_ptr()
        self._layer = _Layer(packed.data_ptr(), address, columns, inner)
        self._address = ctypes.addressof(self._layer)
        self._dtype = packed.dtype
        self._run = _code(packed.dtype).run

    def __call__(self, x: Tensor) -> Tensor:
        """`x`: `[..., inner]` of the weight's dtype. Returns `[..., columns]`.

        Raises:
            ValueError: another width or dtype.
        """
        shape = x.shape
        if shape[-1] != self.inner or x.dtype != self._dtype:
            raise ValueError(
                f"a layer of {self.inner} inputs of {self._dtype} got {tuple(shape)} of {x.dtype}"
            )
        if not x.is_contiguous():
            x = x.contiguous()
        out = x.new_empty((*shape[:-1], self.columns))
        count = x.numel() // self.inner
        self._run(self._address, x.data_ptr(), out.data_ptr(), count, native_threads())
        return out


def pack(weight: Tensor, bias: Tensor | None) -> NativeLinear:
    """Of `weight` `[columns, inner]` and `bias` `[columns]`, both copied."""
    return pack_together([(weight, bias)])[0]


def pack_together(
    layers: Sequence[tuple[Tensor, Tensor | None]], pages: LargePages | None = None
) -> list[NativeLinear]:
    """Of layers of one input: each by itself, and last, if there are several, all in one product,
    which shares their memory. `fits_together` says whether that can be. `pages`: where they go.
    """
    inner = layers[0][0].shape[1]
    packed = torch.cat([_packed(weight) for weight, _ in layers])
    if pages is not None:
        packed = pages.copy(packed)
    biases = [bias for _, bias in layers if bias is not None]
    bias = torch.cat(biases) if biases else None
    made, start = [], 0
    for weight, own in layers:
        columns = weight.shape[0]
        some = packed[start * inner : (start + columns) * inner] if len(layers) > 1 else packed
        made.append(
            NativeLinear(
                some, own if bias is None else bias[start : start + columns], columns, inner
            )
        )
        start += columns
    if len(layers) > 1:
        made.append(NativeLinear(packed, bias, start, inner))
    return made


def fits_together(layers: Sequence[tuple[Tensor, Tensor | None]]) -> bool:
    """Whether layers can be one product: one input width and dtype, biases in all or none, whole
    groups of columns.
    """
    first, bias = layers[0]
    group = _code(first.dtype).group
    return all(
        w.shape[1] == first.shape[1]
        and w.dtype == first.dtype
        and w.shape[0] % group == 0
        and (b is None) == (bias is None)
        for w, b in layers
    )


def _packed(weight: Tensor) -> Tensor:
    """Flat, as native_linear.cpp reads it; columns are padded to whole blocks."""
    code = _code(weight.dtype)
    columns, inner = weight.shape
    short = -columns % code.block
    if short:
        weight = torch.cat([weight, weight.new_zeros(short, inner)])
    whole = weight.shape[0] // code.group * code.group
    parts = [weight[:whole].unflatten(0, (-1, code.group)), weight[whole:][None]]
    parts = [part.unflatten(2, (-1, code.step)).transpose(1, 2).flatten() for part in parts]
    return torch.cat(parts)
