"""Copy whole pages, and sum them, on a CPU."""

from functools import lru_cache

import torch
from torch import Tensor

from kvpaged_kernels.checks import check_checksum, check_copy

_CHUNK_WORDS = 1 << 20
"""Words summed at a time: bounds the int64 copy to 8 MiB."""


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy pages as `reference.copy.copy_pages` defines it, one view a page, nothing gathered."""
    check_copy(pages, src, dst)
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        pages[target].copy_(pages[source])


@lru_cache(maxsize=64)
def _coefficients(first_word: int, pieces: int, piece_words: int) -> Tensor:
    """The multipliers of `reference.checksum`, int64 `[pieces, piece_words]`, made once a shape."""
    mask = 0xFFFFFFFF
    x = torch.arange(first_word, first_word + pieces * piece_words, dtype=torch.int64)
    x = (x + 0x9E3779B9) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    x ^= x >> 16
    return x.to(torch.int32).to(torch.int64).view(pieces, piece_words)


def checksum(words: Tensor, entries: Tensor, *, first_word: int = 0) -> Tensor:
    """Checksums of page slices as `reference.checksum.checksum` defines them."""
    check_checksum(words, entries, first_word=first_word)
    _, slices, pieces, piece_words = words.shape
    coefficients = _coefficients(first_word, pieces, piece_words)
    result = torch.empty((len(entries), slices), dtype=torch.int64)
    at_once = max(1, _CHUNK_WORDS // (pieces * piece_words))
    for place, entry in enumerate(entries.tolist()):
        page = words[entry]
        for first in range(0, slices, at_once):
            some = page[first : first + at_once].to(torch.int64).mul_(coefficients)
            result[place, first : first + at_once] = some.sum((1, 2))
    return result
