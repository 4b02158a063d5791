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
    """

    shape: tuple[int, int, int, int]
    pool: int
    pool_strides: tuple[int, int, int]
    record: int
    record_strides: tuple[int, int, int]


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
    geometry: PageGeometry, run: Run, layers: slice, *, pages: int, storage_bytes: int,
    record_stride: int,
) -> list[Block]:  # fmt: skip
    """The blocks of some layers' slices of a run.

    Args:
        geometry: the page.
        run: which pages and records.
        layers: `slice(start, stop)` of the geometry's layers.
        pages, storage_bytes: see `PageGeometry.view`.
        record_stride: bytes from a record to the next.
    """
    first, stop, _ = layers.indices(geometry.layers)
    count, layer_bytes = stop - first, geometry.slice_bytes
    record = run.row * record_stride + first * layer_bytes
    if geometry.layout == "page-major":
        entry = geometry.entry_elements("k") * geometry.itemsize
        pool = run.entry * entry + first * layer_bytes
        shape = (1, 1, run.pages, count * layer_bytes)
        between = entry * geometry.entries_per_page()
        return [Block(shape, pool, (0, 0, between), record, (0, 0, record_stride))]
    kinds: tuple[Kind, ...] = ("k", "v") if geometry.v_width else ("k",)
    blocks = []
    for kind in kinds:
        view = geometry.view(first, kind, pages=pages, storage_bytes=storage_bytes)
        entry, head = (stride * geometry.itemsize for stride in view.stride[:2])
        layer = geometry.layer_elements(kind, pages=pages) * geometry.itemsize
        pool = view.offset * geometry.itemsize + run.entry * entry
        within = 0 if kind == "k" else 4 * geometry.v_first_word
        shape = (count, geometry.kv_heads, run.pages, entry)
        there = layer_bytes, entry, record_stride
        blocks.append(Block(shape, pool, (layer, head, entry), record + within, there))
    return blocks
