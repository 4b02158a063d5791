"""Page-major against layer-major: a decode step's attention over all layers of a large pool.

The question: whether reading one layer of pages that lie megabytes apart costs address translation
(TLB misses) that layers side by side would not. Both layouts have views over the same storage.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu_common import (
    Record,
    Setting,
    ceilings,
    dtype_on,
    free_bytes,
    geometry,
    layer_pages,
    median_seconds,
    table_of,
    time_peers,
)
from kvpaged.config import Layout
from kvpaged_kernels.gpu.decode import paged_decode

LARGEST_POOL = 40 * 2**30
LAYOUTS: tuple[Layout, ...] = ("page-major", "layer-major")
KV_HEADS, GROUP, DIM = 8, 4, 128


def step_of(
    flat: torch.Tensor, layout: Layout, *, layers: int, page_size: int, rows: int, scattered: bool
) -> tuple[Callable[[], None], int]:
    """The attention of one decode step over all layers, and the tokens of each row.

    The rows take every page of the pool.
    """
    shape = geometry(
        layers=layers, kv_heads=KV_HEADS, dim=DIM, page_size=page_size, dtype=flat.dtype,
        layout=layout,
    )  # fmt: skip
    pages = flat.nbytes // shape.page_bytes
    width = pages // rows
    step = shape.entries_per_page()
    table = table_of(rows, width, step, flat.device, pages=pages, scattered=scattered)
    length = width * page_size
    lens = torch.full((rows,), length, dtype=torch.int32, device=flat.device)
    q = torch.randn(rows, KV_HEADS * GROUP, DIM, device=flat.device).to(flat.dtype)
    views = [layer_pages(shape, flat, layer, pages=pages) for layer in range(layers)]

    def step_call() -> None:
        for view in views:
            assert view.v_pages is not None
            paged_decode(q, view.k_pages, view.v_pages, table, lens, scale=DIM**-0.5)

    return step_call, length


def measure(
    flat: torch.Tensor, page_size: int, rows: int, layers: int, setting: Setting, copy_gb_s: float
) -> dict[str, Any]:
    """The row of a page size: both layouts, pages from anywhere and pages in order."""
    make = functools.partial(step_of, flat, layers=layers, page_size=page_size, rows=rows)
    calls: dict[str, Callable[[], None]] = {}
    length = 0
    for layout in LAYOUTS:
        calls[f"{layout} anywhere"], length = make(layout, scattered=True)
        calls[f"{layout} in order"], length = make(layout, scattered=False)
    times = time_peers(calls, setting)
    seconds = median_seconds(times)
    read = layers * rows * length * 2 * KV_HEADS * DIM * flat.element_size()
    page_major, layer_major = (times[f"{layout} anywhere"] for layout in LAYOUTS)
    return {
        "page_size": page_size,
        "layers": layers,
        "rows": rows,
        "length": length,
        "pool_bytes": flat.nbytes,
        "read_bytes": read,
        "seconds": seconds,
        "of_ceiling": {name: read / each / (copy_gb_s * 1e9) for name, each in seconds.items()},
        "page_major_over_layer_major": common.paired_ratio(layer_major, page_major),
    }


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """One row a page size and batch."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    layers = 2 if setting.quick else 32
    dtype = dtype_on(setting.device)
    # Two pages a row at the interpreter's sizes; on a device what is free, less a share for others.
    token_bytes = layers * 2 * KV_HEADS * DIM * dtype.itemsize
    size = min(LARGEST_POOL, int(0.75 * free_bytes(setting.device)))
    size = (
        4 * 16 * token_bytes if setting.quick else size // (256 * token_bytes) * 256 * token_bytes
    )
    flat = torch.empty(size // dtype.itemsize, dtype=dtype, device=setting.device).normal_()
    grid = ((16, 2),) if setting.quick else ((16, 32), (64, 32), (256, 32), (64, 4), (64, 256))
    for page_size, rows in grid:
        if record.late():
            continue
        row = measure(flat, page_size, rows, layers, setting, limits["copy_gb_s"])
        shares = "  ".join(f"{name} {share:.0%}" for name, share in row["of_ceiling"].items())
        record.add(
            row,
            f"page {page_size}, {rows} x {row['length']}, pool {size / 2**30:.2f} GiB: of copy "
            f"bandwidth {shares}; page-major {row['page_major_over_layer_major']:.3f}x layer-major",
        )
    return record.finish()
