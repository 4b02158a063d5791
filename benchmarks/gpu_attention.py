"""Decode and prefill over pages in random order beside SDPA, FlexAttention and FlashInfer.

A ratio to a peer above one means that ours took less time. Of the ceiling: of copy bandwidth by the
bytes of K and V for a decode, of the matrix rate by the operations under the diagonal for a
prefill.
"""

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
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
from kvpaged_kernels.gpu.decode import paged_decode
from kvpaged_kernels.gpu.prefill import paged_prefill

Phase = Literal["decode", "prefill"]
LAYERS = 2
DECODE = (
    (1, 1024), (1, 8192), (1, 32768), (8, 1024), (8, 8192), (32, 1024), (32, 8192), (128, 4096),
)  # fmt: skip
PREFILL = ((1, 1024), (1, 4096), (1, 16384), (4, 2048), (8, 1024))


class Point(NamedTuple):
    """`batch` sequences of `length` tokens; ours runs with each of the page sizes."""

    phase: Phase
    batch: int
    length: int
    q_heads: int
    kv_heads: int
    dim: int
    page_sizes: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of all tokens, in bf16."""
        return 2 * self.batch * self.length * self.kv_heads * self.dim * 2

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products under the diagonal."""
        pairs = self.length * (self.length + 1) // 2 if self.phase == "prefill" else self.length
        return 4 * self.batch * self.q_heads * self.dim * pairs


def points(*, quick: bool) -> Iterator[Point]:
    """The grid: the common shape first, then SmolLM2's."""
    if quick:
        yield Point("decode", 2, 32, 4, 2, 64, (16,))
        yield Point("prefill", 1, 32, 3, 1, 64, (16,))
        return
    phases: tuple[tuple[Phase, tuple[tuple[int, int], ...]], ...]
    phases = (("decode", DECODE), ("prefill", PREFILL))
    for heads, sizes in (((32, 8, 128), (16, 64)), ((9, 3, 64), (64,))):
        for phase, grid in phases:
            for batch, length in grid:
                yield Point(phase, batch, length, *heads, sizes)


def contiguous(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """The tokens of all rows as `[rows, kv_heads, length, dim]`."""
    chosen = pages[table.long()]  # [rows, width, heads, slots, dim]
    return chosen.transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()


def calls_of(point: Point, setting: Setting) -> tuple[dict[str, Call], dict[str, str]]:
    """Ours by page size, then the peers; and the peers that don't run.

    The peers get the tokens of the last page size, with which their results can be compared.
    """
    device = setting.device
    dtype = dtype_on(device)
    queries = 1 if point.phase == "decode" else point.length
    q = torch.randn(point.batch, queries, point.q_heads, point.dim, device=device).to(dtype)
    calls: dict[str, Call] = {}
    for page_size in point.page_sizes:
        shape = geometry(
            layers=LAYERS, kv_heads=point.kv_heads, dim=point.dim, page_size=page_size,
            dtype=dtype, layout="page-major",
        )  # fmt: skip
        found = random_sequences([point.length] * point.batch, shape, device)
        pages: LayerPages = found.pages
        arguments: tuple[Any, ...] = (
            q.flatten(0, 1),
            pages.k_pages,
            pages.v_pages,
            found.block_table,
        )
        options: dict[str, Any] = {"scale": point.dim**-0.5}
        kernel: Any = paged_decode
        if point.phase == "prefill":
            ends = torch.arange(point.batch + 1, dtype=torch.int32, device=device) * queries
            arguments += (ends,)
            options |= {"max_q": queries, "max_len": point.length}
            kernel = paged_prefill
        call = functools.partial(kernel, *arguments, found.seq_lens, **options)
        calls[f"paged-{page_size}"] = call
    assert pages.v_pages is not None
    k, v = (contiguous(x, found.block_table, point.length) for x in (pages.k_pages, pages.v_pages))
    ready, skipped = peers_of(Work(q, k, v, point.page_sizes[-1]))
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
    work = point.kv_bytes if point.phase == "decode" else point.operations
    top = limits["copy_gb_s"] * 1e9 if point.phase == "decode" else limits["matrix_tflop_s"] * 1e12
    return {
        **point._asdict(),
        "dtype": str(dtype_on(setting.device)).removeprefix("torch."),
        "kv_bytes": point.kv_bytes,
        "operations": point.operations,
        "seconds": seconds,
        "of_ceiling": {name: work / each / top for name, each in seconds.items()},
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
        f"{name} {each * 1e6:.1f} us ({row['of_ceiling'][name]:.0%})"
        for name, each in row["seconds"].items()
    )
    heads = f"{row['q_heads']}/{row['kv_heads']} x {row['dim']}"
    skipped = "".join(f"; {name} skipped: {why}" for name, why in row["skipped"].items())
    return f"{row['phase']} {row['batch']} x {row['length']} heads {heads}: {times}{skipped}"


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """All points that the device has memory for."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    for point in points(quick=setting.quick):
        if record.late():
            continue
        # Ours in pages of two layers at each size, contiguous, FlashInfer's copy, and temporaries.
        needed = point.kv_bytes * (LAYERS * len(point.page_sizes) + 4)
        if needed > free_bytes(setting.device):
            record.document["left_out"] += 1
            continue
        row = measure(point, setting, limits)
        record.add(row, line_of(row))
    return record.finish()
