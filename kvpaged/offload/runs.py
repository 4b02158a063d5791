"""Where the bytes of pages lie in a pool and in records: arithmetic only, in Python ints.

A copy of adjacent pages is described by blocks, of one or two kinds: page-major pages are one block
(a page's layers are adjacent), layer-major ones a block of K and one of V.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpaged.geometry import UNIT_BYTES, Kind, PageGeometry, SealedGeometry
from kvpaged.pages.extents import Ids


class Run(NamedTuple):
    """Pages adjacent in a pool whose records are adjacent, too.

    Attributes:
        entry: block-table entry of the first page.
        row: the first page's place among the records.
        pages: how many.
    """

    entry: int
    row: int
    pages: int


_MOST_PITCH = 2**31 - 1
"""Bytes between two rows of a CUDA copy, at most."""


class Rectangle(NamedTuple):
    """What one copy of a copy engine can be: rows of adjacent bytes.

    Attributes:
        pool, record: offset of the first byte on each side.
        width, height: bytes of a row, rows.
        pool_pitch, record_pitch: bytes from a row to the next.
    """

    pool: int
    record: int
    width: int
    height: int
    pool_pitch: int
    record_pitch: int


class Block(NamedTuple):
    """Bytes of a run, `shape` being `(layers, heads, pages, bytes)` on both sides.

    Attributes:
        shape: counts; the last is of adjacent bytes.
        pool, record: offset of the first byte in the storage of the pool and from the first record.
        pool_strides, record_strides: bytes from a layer, a head, a page to the next.
        entry: bytes from an entry of the pool to the next.
    """

    shape: tuple[int, int, int, int]
    pool: int
    pool_strides: tuple[int, int, int]
    record: int
    record_strides: tuple[int, int, int]
    entry: int

    def of(self, run: Run) -> "Block":
        """This block, of the page at entry 0 and the first record, for a run."""
        layers, heads, pages, size = self.shape
        assert pages == 1
        record = self.record + run.row * self.record_strides[2]
        return Block(
            (layers, heads, run.pages, size), self.pool + run.entry * self.entry,
            self.pool_strides, record, self.record_strides, self.entry,
        )  # fmt: skip

    def by_layer(
        self, geometry: PageGeometry | SealedGeometry, layers: slice
    ) -> list[tuple[slice, "Block"]]:
        """The same, each layer by itself also where they are adjacent: layers of one size in one
        block, and which of `layers` these are, counted from its first.
        """
        if isinstance(geometry, PageGeometry):
            if geometry.layout == "layer-major":
                return [(slice(0, self.shape[0]), self)]
            sizes = [geometry.slice_bytes] * (self.shape[3] // geometry.slice_bytes)
        else:
            sizes = [layout.slice_bytes for layout in geometry.layouts[layers]]
        (_, _, here), (_, _, there) = self.pool_strides, self.record_strides
        found, first, at = [], 0, 0
        for size, alike in itertools.groupby(sizes):
            count = len(list(alike))
            block = Block(
                (count, 1, self.shape[2], size), self.pool + at, (size, 0, here),
                self.record + at, (size, 0, there), self.entry,
            )  # fmt: skip
            found.append((slice(first, first + count), block))
            first, at = first + count, at + count * size
        return found

    def rectangles(self) -> Iterator[Rectangle]:
        """The block in rectangles, as few as its shape allows: the longest axis makes the rows."""
        width = self.shape[3]
        axes = [
            axis
            for axis in (2, 1, 0)
            if width <= self.pool_strides[axis] <= _MOST_PITCH
            and width <= self.record_strides[axis] <= _MOST_PITCH
        ]
        rows = max(axes, key=lambda axis: self.shape[axis], default=2)
        height = self.shape[rows]
        here, there = self.pool_strides[rows], self.record_strides[rows]
        if height == 1 or here == there == width:
            width, height, here, there = width * height, 1, width * height, width * height
        counts = [1 if axis == rows else self.shape[axis] for axis in range(3)]
        for place in itertools.product(*map(range, counts)):
            pool, record = self.pool, self.record
            for i, ours, theirs in zip(place, self.pool_strides, self.record_strides, strict=True):
                pool, record = pool + i * ours, record + i * theirs
            yield Rectangle(pool, record, width, height, here, there)

    def in_pool(self, storage: Tensor) -> Tensor:
        """A view of the pool's bytes, `[entries, layers, heads, bytes]`: for the kernel."""
        layers, heads, _, width = self.shape
        size = (layers, heads, width)
        strides = (*self.pool_strides[:2], 1)
        span = sum((n - 1) * stride for n, stride in zip(size, strides, strict=True)) + 1
        entries = (storage.numel() - self.pool - span) // self.entry + 1
        return storage.as_strided((entries, *size), (self.entry, *strides), self.pool)

    def in_records(self, records: Tensor) -> Tensor:
        """A view of records, `[n, layers, heads, bytes]`: for the kernel."""
        layers, heads, _, width = self.shape
        strides = (self.record_strides[2], *self.record_strides[:2], 1)
        at = records.storage_offset() + self.record
        return records.as_strided((len(records), layers, heads, width), strides, at)


def check_records(records: Tensor, count: int, record_bytes: int) -> None:
    """Raise ValueError unless there are `count` records, uint8, in host memory, each contiguous."""
    good = records.dtype == torch.uint8 and records.device.type == "cpu"
    good = good and records.shape == (count, record_bytes) and records.stride(1) == 1
    if not good or (count > 1 and records.stride(0) < record_bytes):
        raise ValueError(
            f"records of {count} pages are uint8 [{count}, {record_bytes}] in host memory with "
            f"contiguous rows, got {records.dtype} {tuple(records.shape)} at strides "
            f"{records.stride()} on {records.device}"
        )


def runs_of(entries: Ids, step: int = 1) -> list[Run]:
    """The runs in block-table entries, each `step` after the one before it (`entries_per_page`).

    Entries and not page ids: pages of two frames can have adjacent ids and room between them.
    """
    if not entries.size:
        return []
    starts = np.flatnonzero(np.diff(entries.astype(np.int64)) != step) + 1
    bounds = [0, *starts.tolist(), entries.size]
    return [
        Run(int(entries[start]), start, stop - start) for start, stop in itertools.pairwise(bounds)
    ]


def blocks_of(
    geometry: PageGeometry | SealedGeometry,
    layers: slice,
    *,
    pages: int,
    storage_bytes: int,
    record_stride: int,
) -> list[Block]:
    """The blocks of some layers' slices of the page at entry 0 and of the first record.

    Args:
        geometry: the page.
        layers: `slice(start, stop)` of the geometry's layers.
        pages, storage_bytes: see `PageGeometry.view`.
        record_stride: bytes from a record to the next.
    """
    first, stop, _ = layers.indices(geometry.layers)
    if stop == first:
        return []
    if isinstance(geometry, SealedGeometry):
        at, size = geometry.offsets[first], geometry.offsets[stop] - geometry.offsets[first]
        here, there = (0, 0, geometry.page_bytes), (0, 0, record_stride)
        return [Block((1, 1, 1, size), at, here, at, there, UNIT_BYTES)]
    count, layer_bytes = stop - first, geometry.slice_bytes
    if geometry.layout == "page-major":
        entry = geometry.entry_elements("k") * geometry.itemsize
        shape, there = (1, 1, 1, count * layer_bytes), (0, 0, record_stride)
        at = first * layer_bytes
        here = 0, 0, entry * geometry.entries_per_page()
        return [Block(shape, at, here, at, there, entry)]
    kinds: tuple[Kind, ...] = ("k", "v") if geometry.v_width else ("k",)
    blocks = []
    for kind in kinds:
        view = geometry.view(first, kind, pages=pages, storage_bytes=storage_bytes)
        entry, head = (stride * geometry.itemsize for stride in view.stride[:2])
        layer = geometry.layer_elements(kind, pages=pages) * geometry.itemsize
        record = first * layer_bytes + (0 if kind == "k" else 4 * geometry.v_first_word)
        shape, there = (count, geometry.kv_heads, 1, entry), (layer_bytes, entry, record_stride)
        pool = view.offset * geometry.itemsize
        blocks.append(Block(shape, pool, (layer, head, entry), record, there, entry))
    return blocks
