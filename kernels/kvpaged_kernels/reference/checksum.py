"""The checksum of page slices: its definition, in torch and in numpy.

    h   = sum_i int64(w_i) * int64(a_i)  mod 2**64, seen as int64
    a_i = int32(mix32(uint32(i) + 0x9E3779B9))

`w_i` is the i-th int32 word of the slice, counted from `first_word`. The coefficients depend on the
position, so swapped words are found; the sum is additive, so K and V (or any other parts of a
slice) can be summed apart and added. It finds faults of memory and transport; it is not
cryptographic.

`mix32` is the "lowbias32" integer hash of Chris Wellons' hash prospector
(https://github.com/skeeto/hash-prospector); 0x9E3779B9 is 2**32 over the golden ratio and keeps
`a_0` from being 0.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged_kernels.checks import check_checksum

_GOLDEN = 0x9E3779B9
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B
_UINT32 = 0xFFFFFFFF


def _coefficients(first_word: int, count: int, device: torch.device) -> Tensor:
    """`a_i` for `first_word <= i < first_word + count`: int64 `[count]`, values of int32.

    torch has no unsigned arithmetic: int64 holds the uint32, masked after each step. Products
    wrap modulo 2**64, which leaves their low 32 bits right.
    """
    x = torch.arange(first_word, first_word + count, dtype=torch.int64, device=device)
    x = (x + _GOLDEN) & _UINT32
    x ^= x >> 16
    x = (x * _MIX_1) & _UINT32
    x ^= x >> 15
    x = (x * _MIX_2) & _UINT32
    x ^= x >> 16
    return x.to(torch.int32).to(torch.int64)


def checksum(words: Tensor, entries: Tensor, *, first_word: int = 0) -> Tensor:
    """Checksums of every slice of some pages; see the module for the definition.

    - `words`: int32 `[entries_total, slices, pieces, piece_words]`, last stride 1. A slice is one
      layer of a page; its words in logical order are pieces outermost.
    - `entries`: int32 or int64 `[n]`.
    - `first_word`: the index in its slice of the first word of this part.

    Returns int64 `[n, slices]`. Raises ValueError where shapes, strides or dtypes disagree.
    """
    check_checksum(words, entries, first_word=first_word)
    chosen = words[entries.long()].flatten(2).to(torch.int64)
    coefficients = _coefficients(first_word, chosen.shape[2], words.device)
    return (chosen * coefficients).sum(-1)


def checksum_numpy(
    words: npt.NDArray[np.int32],
    entries: npt.NDArray[np.integer[Any]],
    *,
    first_word: int = 0,
) -> npt.NDArray[np.int64]:
    """`checksum` for numpy arrays of the same shapes and dtypes."""
    chosen = words[entries]
    chosen = chosen.reshape(*chosen.shape[:2], -1).astype(np.int64)
    x = np.arange(first_word, first_word + chosen.shape[2], dtype=np.uint64).astype(np.uint32)
    x = x + np.uint32(_GOLDEN)
    x ^= x >> np.uint32(16)
    x *= np.uint32(_MIX_1)
    x ^= x >> np.uint32(15)
    x *= np.uint32(_MIX_2)
    x ^= x >> np.uint32(16)
    result: npt.NDArray[np.int64] = (chosen * x.view(np.int32).astype(np.int64)).sum(
        axis=-1, dtype=np.int64
    )
    return result


def root(slice_sums: Tensor) -> Tensor:
    """The checksum of a page over the checksums of its slices.

    - `slice_sums`: int64 `[n, slices]`, contiguous, taken as `2 * slices` int32 words, the low
      half of each first (the byte order of a little-endian machine).

    Returns int64 `[n]`.
    """
    low = (slice_sums & _UINT32).to(torch.int32)
    high = (slice_sums >> 32).to(torch.int32)
    words = torch.stack((low, high), dim=-1).flatten(1).to(torch.int64)
    return (words * _coefficients(0, words.shape[1], words.device)).sum(-1)
