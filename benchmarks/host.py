"""What the books cost on the host: `python -m benchmarks.host [--quick] [--out FOLDER]`.

The allocator, nanoseconds a page, at calls of 1 and of 1,024 pages; a decode step of 256 sequences,
microseconds, without any layer: pages, tables, lengths, and the seal's bookkeeping.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from kvpaged import PagedKVCache, PageGeometry
from kvpaged.batch import Batch
from kvpaged.pages.allocator import PageAllocator
from kvpaged.pages.frames import FrameBudget


def allocator_times(pages: int, calls: int) -> dict[str, float]:
    """Nanoseconds a page of taking and giving back `pages` pages a call, `calls` times each."""
    total = pages * calls
    allocator = PageAllocator(frames=FrameBudget(1), pages_per_frame=max(2 * total, 4096), extent=4)
    took, gave = [], []
    for _ in range(7):
        held = []
        last: int | None = None
        start = common.clock()
        for _ in range(calls):
            ids = allocator.alloc(pages, last)
            last = int(ids[-1])
            held.append(ids)
        took.append((common.clock() - start) / total * 1e9)
        start = common.clock()
        for ids in held:
            allocator.release(ids)
        gave.append((common.clock() - start) / total * 1e9)
    return {"alloc_ns": float(np.median(took)), "release_ns": float(np.median(gave))}


def step_times(rows: int, page_size: int, steps: int) -> dict[str, float]:
    """Microseconds of `begin` and `commit` of a decode step without checksums, median and mean.

    The mean has the steps in which rows enter a page: ragged lengths, `rows / page_size` a step.
    """
    geometry = PageGeometry(
        layers=1, kv_heads=1, head_dim=64, page_size=page_size, dtype=torch.bfloat16
    )
    cache = PagedKVCache(geometry, "512MiB", checksums=False)
    batch = Batch(cache, rows)
    batch.begin(np.arange(rows) % page_size + 1)
    batch.commit()
    one = np.ones(rows, np.int64)
    begun, committed = [], []
    for _ in range(steps):
        start = common.clock()
        batch.begin(one)
        middle = common.clock()
        batch.commit()
        begun.append((middle - start) * 1e6)
        committed.append((common.clock() - middle) * 1e6)
    cache.check_integrity()
    batch.close()
    cache.close()
    return {
        "begin_us": float(np.median(begun)),
        "begin_mean_us": float(np.mean(begun)),
        "commit_us": float(np.median(committed)),
        "commit_mean_us": float(np.mean(committed)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, end with one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    few = chosen.quick
    allocator = {
        pages: allocator_times(pages, calls)
        for pages, calls in ((1, 50 if few else 5000), (1024, 2 if few else 50))
    }
    steps = {rows: step_times(rows, 64, 10 if few else 300) for rows in (1, 32, 256)}
    document: dict[str, Any] = {
        "benchmark": "host",
        "environment": common.environment(),
        "allocator": {str(pages): times for pages, times in allocator.items()},
        "step": {str(rows): times for rows, times in steps.items()},
    }
    print(common.describe(document["environment"]))
    rows = [
        [f"{pages} pages a call", f"{t['alloc_ns']:.0f}", f"{t['release_ns']:.0f}"]
        for pages, t in allocator.items()
    ]
    print(common.table(["allocator, ns a page", "alloc", "release"], rows))
    rows = [[f"{count} sequences", *(f"{t[key]:.0f}" for key in t)] for count, t in steps.items()]
    names = ["begin", "mean", "commit", "mean"]
    print(common.table(["decode step on the host, us", *names], rows))
    chosen.out.mkdir(parents=True, exist_ok=True)
    common.publish("host", document, chosen.out)


if __name__ == "__main__":
    main()
