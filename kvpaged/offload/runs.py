"""Where the bytes of pages lie in a pool and in records: arithmetic only, in Python ints.

A copy of adjacent pages is described by blocks, of one or two kinds: page-major pages are one block
(a page's layers are adjacent), layer-major ones a block of K and one of V.
"""

import itertools
from typing import NamedTuple

import numpy as np

from kvpaged.geometry import Kind, PageGeometry
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
    geometry: PageGeometry, layers: slice, *, pages: int, storage_bytes: int, record_stride: int
) -> list[Block]:
    """The blocks of some layers' slices of the page at entry 0 and of the first record.

    Args:
        geometry: the page.
        layers: `slice(start, stop)` of the geometry's layers.
        pages, storage_bytes: see `PageGeometry.view`.
        record_stride: bytes from a record to the next.
    """
    first, stop, _ = layers.indices(geometry.layers)
    count, layer_bytes = stop - first, geometry.slice_bytes
    if not count:
        return []
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
