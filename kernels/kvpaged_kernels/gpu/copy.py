"""Copy whole pages inside one pool."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import check_copy
from kvpaged_kernels.gpu.launch import Launch

_BLOCK = 1024
_WIDE_FIRST = (torch.int64, torch.int32, torch.int16, torch.int8)


@triton.jit
def _copy_pages(
    pages,
    src,
    dst,
    stride_entry,
    stride_piece,
    pieces,
    piece_len,
    chunks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program % chunks
    piece = program // chunks % pieces
    copy = program // chunks // pieces
    source = pages + tl.load(src + copy).to(tl.int64) * stride_entry
    target = pages + tl.load(dst + copy).to(tl.int64) * stride_entry
    within = piece.to(tl.int64) * stride_piece
    offset = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < piece_len
    values = tl.load(source + within + offset, mask=mask)
    tl.store(target + within + offset, values, mask=mask)


def as_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one dtype, last stride 1, seen as the widest integers that the addresses, strides
    and lengths of all of them allow.
    """
    size = tensors[0].element_size()
    extents: list[int] = []
    for t in tensors:
        extents += [t.shape[-1], int(t.storage_offset()), *t.stride()[:-1]]
    addresses = [0 if t.device.type == "meta" else t.data_ptr() for t in tensors]
    for word in _WIDE_FIRST:
        wide = word.itemsize
        if not any(address % wide for address in addresses) and all(
            extent * size % wide == 0 for extent in extents
        ):
            return tuple(t.view(word) for t in tensors)
    raise AssertionError("every tensor is a tensor of bytes")


def copy_launch(pages: Tensor, src: Tensor, dst: Tensor) -> Launch:
    """The launch of `copy_pages`; reads shapes, strides and the alignment of `pages` only."""
    (words,) = as_words(pages)
    _, pieces, piece_len = words.shape
    chunks = triton.cdiv(piece_len, _BLOCK)
    return Launch(
        kernel=_copy_pages,
        grid=(src.shape[0] * pieces * chunks,),
        arguments={
            "pages": words,
            "src": src,
            "dst": dst,
            "stride_entry": words.stride(0),
            "stride_piece": words.stride(1),
            "pieces": pieces,
            "piece_len": piece_len,
            "chunks": chunks,
            "BLOCK": _BLOCK,
        },
    )


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole pages inside one pool, as the widest words its strides allow.

    - `pages`: `[entries, pieces, piece_len]` of any dtype, last stride 1, **mutated**: a page is
      `pieces` runs of `piece_len` contiguous elements. It may overlap itself in dimension 0.
    - `src`, `dst`: int32 or int64 `[n]`, entries; `dst` distinct and disjoint from `src`.

    Bytes are copied exactly. Raises ValueError where shapes, strides, dtypes or devices disagree.
    """
    check_copy(pages, src, dst)
    if src.shape[0] > 0 and pages.shape[1] > 0 and pages.shape[2] > 0:
        copy_launch(pages, src, dst).run(pages.device)
