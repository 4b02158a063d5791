"""Copy pieces of records in host memory into pages: for pieces too small for the copy engines."""

import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import check_fill, require
from kvpaged_kernels.gpu.copy import as_words
from kvpaged_kernels.gpu.launch import Launch

PROGRAMS = 12
"""Enough to keep a bus busy, and few of a device's multiprocessors: the model runs beside it."""

_TILE = 2048
"""Words in flight a program, 16 KiB of the widest: 12 of them cover the time a bus takes."""


@triton.jit
def _fill_pages(
    records,
    pages,
    entries,
    stride_record,
    stride_record_slice,
    stride_record_piece,
    stride_entry,
    stride_slice,
    stride_piece,
    count,
    slices,
    pieces,
    piece_len,
    chunks,
    tiles,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        place = tile // chunks * ROWS + tl.arange(0, ROWS)
        present = place < count
        piece = (place % pieces).to(tl.int64)
        each = (place // pieces % slices).to(tl.int64)
        row = place // pieces // slices
        entry = tl.load(entries + row, mask=present, other=0).to(tl.int64)
        source = (
            row.to(tl.int64) * stride_record
            + each * stride_record_slice
            + piece * stride_record_piece
        )
        target = entry * stride_entry + each * stride_slice + piece * stride_piece
        offset = (tile % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = present[:, None] & (offset < piece_len)[None, :]
        values = tl.load(records + (source[:, None] + offset[None, :]), mask=mask)
        tl.store(pages + (target[:, None] + offset[None, :]), values, mask=mask)


def fill_launch(records: Tensor, pages: Tensor, entries: Tensor) -> Launch:
    """The launch of `fill_pages`; reads shapes, strides and alignments only."""
    source, target = as_words(records, pages)
    n, slices, pieces, piece_len = source.shape
    block = min(_TILE, triton.next_power_of_2(piece_len))
    rows = _TILE // block
    chunks = triton.cdiv(piece_len, block)
    tiles = triton.cdiv(n * slices * pieces, rows) * chunks
    require(tiles * rows < 2**31, f"{n * slices * pieces} pieces are too many for one launch")
    return Launch(
        kernel=_fill_pages,
        grid=(min(PROGRAMS, tiles),),
        arguments={
            "records": source,
            "pages": target,
            "entries": entries,
            "stride_record": source.stride(0),
            "stride_record_slice": source.stride(1),
            "stride_record_piece": source.stride(2),
            "stride_entry": target.stride(0),
            "stride_slice": target.stride(1),
            "stride_piece": target.stride(2),
            "count": n * slices * pieces,
            "slices": slices,
            "pieces": pieces,
            "piece_len": piece_len,
            "chunks": chunks,
            "tiles": tiles,
            "PROGRAMS": PROGRAMS,
            "ROWS": rows,
            "BLOCK": block,
        },
        num_warps=16,
    )


def fill_pages(records: Tensor, pages: Tensor, entries: Tensor) -> None:
    """Copy pieces of records into pages, a few programs taking them in turn.

    - `records`: `[n, slices, pieces, piece_len]` of any dtype, last stride 1, on the device of the
      pages or in pinned host memory.
    - `pages`: `[entries_total, slices, pieces, piece_len]` of that dtype, last stride 1,
      **mutated**. It may overlap itself in dimension 0.
    - `entries`: int32 or int64 `[n]`, distinct.

    Bytes are copied exactly. Raises ValueError where shapes, strides, dtypes or devices disagree.
    """
    check_fill(records, pages, entries)
    if records.numel() > 0:
        fill_launch(records, pages, entries).run(pages.device)
