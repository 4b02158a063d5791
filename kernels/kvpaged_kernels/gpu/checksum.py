"""The checksum of page slices on the device; `reference/checksum.py` has the definition."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import check_checksum
from kvpaged_kernels.gpu.launch import Launch

_MAX_BLOCK = 1024
_GOLDEN = tl.constexpr(0x9E3779B9)
_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B)


@triton.jit
def _mix32(x):
    """The uint32 hash "lowbias32"; arithmetic wraps."""
    x ^= x >> 16
    x *= _MIX_1
    x ^= x >> 15
    x *= _MIX_2
    x ^= x >> 16
    return x


@triton.jit
def coefficients(index):
    """The factor of each word, int64, by its index in the slice."""
    return _mix32(index.to(tl.uint32) + _GOLDEN).to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _checksum(
    words,
    entries,
    sums,
    stride_entry,
    stride_slice,
    stride_piece,
    slices,
    pieces,
    piece_words,
    first_word,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    entry = tl.load(entries + program // slices).to(tl.int64)
    base = words + entry * stride_entry + (program % slices).to(tl.int64) * stride_slice
    offset = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    index = offset + first_word
    for _ in range(pieces):
        for start in range(0, piece_words, BLOCK):
            word = tl.load(base + start + offset, mask=start + offset < piece_words, other=0)
            total += word.to(tl.int64) * coefficients(index + start)
        base += stride_piece
        index += piece_words
    tl.store(sums + program, tl.sum(total, 0))


def checksum_launch(words: Tensor, entries: Tensor, sums: Tensor, first_word: int) -> Launch:
    """The launch of `checksum` into `sums`; reads shapes and strides only."""
    _, slices, pieces, piece_words = words.shape
    return Launch(
        kernel=_checksum,
        grid=(entries.shape[0] * slices,),
        arguments={
            "words": words,
            "entries": entries,
            "sums": sums,
            "stride_entry": words.stride(0),
            "stride_slice": words.stride(1),
            "stride_piece": words.stride(2),
            "slices": slices,
            "pieces": pieces,
            "piece_words": piece_words,
            "first_word": first_word,
            "BLOCK": min(_MAX_BLOCK, triton.next_power_of_2(piece_words)),
        },
    )


def checksum(words: Tensor, entries: Tensor, *, first_word: int = 0) -> Tensor:
    """Checksums of every slice of some pages, one program a slice.

    - `words`: int32 `[entries_total, slices, pieces, piece_words]`, last stride 1. A slice is one
      layer of a page; its words in logical order are pieces outermost.
    - `entries`: int32 or int64 `[n]`.
    - `first_word`: the index in its slice of the first word of this part.

    Returns int64 `[n, slices]`. Raises ValueError where shapes, strides or dtypes disagree.
    """
    check_checksum(words, entries, first_word=first_word)
    sums = torch.zeros(entries.shape[0], words.shape[1], dtype=torch.int64, device=words.device)
    if sums.numel() > 0 and words.shape[2] > 0 and words.shape[3] > 0:
        checksum_launch(words, entries, sums, first_word).run(words.device)
    return sums
