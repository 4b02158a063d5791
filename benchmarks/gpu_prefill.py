"""Prefill over pages in random order beside SDPA, FlexAttention and FlashInfer.

A ratio to a peer above one means that ours took less time. The floor is the larger of the time of
the operations under the diagonal at the rate of matrix products and that of the bytes.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks import common, roofline
from benchmarks.gpu_common import (
    Record,
    Setting,
    ceilings,
    dtype_on,
    finite,
    free_bytes,
    geometry,
    median_seconds,
    random_sequences,
    time_peers,
)
from benchmarks.gpu_peers import Call, Work, peers_of
from kvpaged.ops import LayerPages
from kvpaged_kernels.gpu.prefill import paged_prefill

LAYERS = 2
GRID = ((1, 1024), (1, 4096), (1, 16384), (4, 2048), (8, 1024))


class Point(NamedTuple):
    """`batch` prompts of `length` tokens; ours runs with each of the page sizes."""

    batch: int
    length: int
    q_heads: int
    kv_heads: int
    dim: int
    page_sizes: tuple[int, ...]

    def floor(self, element: int) -> roofline.Floor:
        """The least it could take."""
        heads = roofline.Heads(self.q_heads, self.kv_heads, self.dim, self.dim, element)
        lengths = [self.length] * self.batch
        return roofline.attention(heads, lengths, lengths, page_size=self.page_sizes[-1])


def points(*, quick: bool) -> Iterator[Point]:
    """The grid: the common shape first, then SmolLM2's."""
    if quick:
        yield Point(1, 32, 3, 1, 64, (16,))
        return
    for heads, sizes in (((32, 8, 128), (16, 64)), ((9, 3, 64), (64,))):
        for batch, length in GRID:
            yield Point(batch, length, *heads, sizes)


def calls_of(point: Point, setting: Setting) -> tuple[dict[str, Call], dict[str, str]]:
    """Ours by page size, then the peers; and the peers that don't run.

    The peers get the tokens of the last page size, with which their results can be compared.
    """
    device = setting.device
    dtype = dtype_on(device)
    q = torch.randn(point.batch, point.length, point.q_heads, point.dim, device=device).to(dtype)
    ends = torch.arange(point.batch + 1, dtype=torch.int32, device=device) * point.length
    calls: dict[str, Call] = {}
    for page_size in point.page_sizes:
        shape = geometry(
            layers=LAYERS, kv_heads=point.kv_heads, dim=point.dim, page_size=page_size,
            dtype=dtype, layout="page-major",
        )  # fmt: skip
        found = random_sequences([point.length] * point.batch, shape, device)
        pages: LayerPages = found.pages
        assert pages.v_pages is not None
        calls[f"paged-{page_size}"] = functools.partial(
            paged_prefill, q.flatten(0, 1), pages.k_pages, pages.v_pages, found.block_table, ends,
            found.seq_lens, max_q=point.length, max_len=point.length, scale=point.dim**-0.5,
        )  # fmt: skip
    assert pages.v_pages is not None
    k, v = (
        common.contiguous(x, found.block_table, point.length)
        for x in (pages.k_pages, pages.v_pages)
    )
    ready, skipped = peers_of(Work(q, k, v, point.page_sizes[-1]), setting.folders, setting.without)
    return {**calls, **ready}, skipped


def measure(point: Point, setting: Setting, limits: dict[str, float]) -> dict[str, Any]:
    """The row of a point."""
    calls, skipped = calls_of(point, setting)
    ours = [name for name in calls if name.startswith("paged-")]
    peers = [name for name in calls if name not in ours]
    mine = calls[ours[-1]]()
    difference = {name: finite((calls[name]() - mine).abs().max().item()) for name in peers}
    times = time_peers(calls, setting)
    seconds = median_seconds(times)
    floor = point.floor(dtype_on(setting.device).itemsize)
    rate = limits["matrix_tflop_s"] * 1e12
    least = floor.seconds(bytes_per_s=limits["copy_gb_s"] * 1e9, operations_per_s=rate)
    return {
        **point._asdict(),
        "dtype": str(dtype_on(setting.device)).removeprefix("torch."),
        "operations": floor.operations,
        "floor_bytes": floor.bytes,
        "seconds": seconds,
        "of_ceiling": {name: floor.operations / each / rate for name, each in seconds.items()},
        "over_floor": {name: each / least for name, each in seconds.items()},
        "over_peers": {
            name: {peer: common.paired_ratio(times[peer], times[name]) for peer in peers}
            for name in ours
        },
        "difference": difference,
        "skipped": skipped,
    }


def line_of(row: dict[str, Any]) -> str:
    """A row for people."""
    times = "  ".join(
        f"{name} {each * 1e6:.1f} us ({row['of_ceiling'][name]:.0%}, "
        f"{row['over_floor'][name]:.2f} floors)"
        for name, each in row["seconds"].items()
    )
    heads = f"{row['q_heads']}/{row['kv_heads']} x {row['dim']}"
    skipped = "".join(f"; {name} skipped: {why}" for name, why in row["skipped"].items())
    return f"{row['batch']} x {row['length']} heads {heads}: {times}{skipped}"


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """All points that the device has memory for."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    for point in points(quick=setting.quick):
        # Ours in pages of two layers at each size, contiguous, FlashInfer's copy, and temporaries.
        needed = point.floor(2).bytes * (LAYERS * len(point.page_sizes) + 4)
        if record.late() or (needed > free_bytes(setting.device) and record.leave_out()):
            continue
        row = measure(point, setting, limits)
        record.add(row, line_of(row))
    return record.finish()
