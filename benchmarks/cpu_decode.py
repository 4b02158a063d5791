"""Decode attention over pages on a CPU, beside a gather of the pages and beside contiguous tensors.

    python -m benchmarks.cpu_decode [--rounds N] [--quick]

The grid of `make gpu`, scaled down: 32 query heads on 8 KV heads of 128, pages of 16 to 128 tokens,
in any order and in runs as the allocator hands them out; bf16 and fp32; then windows, soft cap and
sinks. `gather`: the pages are gathered into contiguous tensors and given to SDPA (enable_gqa), as
one would without kernels. `packed`: SDPA over tensors that are contiguous already, the GQA group
packed into the query length, which is the fastest way to call it and the ceiling here. Where SDPA
has no such option both do the same in plain products. Times are of one layer, the plan of the step
made before.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from kvpaged import ops
from kvpaged.geometry import PageGeometry
from kvpaged.ops import LayerPages, Options
from kvpaged_kernels.cpu.lane import attend_lane

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
GRID = ((1, 512), (1, 4096), (1, 16384), (4, 1024), (4, 4096), (16, 512), (32, 256))
PAGE_SIZES = (16, 32, 64, 128)
OPTIONS = ("window", "softcap", "sinks")
WINDOW, SOFTCAP = 1024, 30.0


class Case(NamedTuple):
    """Rows of one length in pages; `runs`: adjacent pages, as the allocator hands them out."""

    dtype: torch.dtype
    batch: int
    length: int
    page_size: int
    runs: bool
    option: str = ""

    @property
    def options(self) -> Options:
        """What attention is asked for."""
        return Options(
            DIM**-0.5,
            window=WINDOW if self.option == "window" else None,
            softcap=SOFTCAP if self.option == "softcap" else None,
            sinks=torch.linspace(-1, 1, Q_HEADS) if self.option == "sinks" else None,
        )


def cases(*, quick: bool) -> list[Case]:
    """The grid without options, then each option at one size."""
    if quick:
        return [
            Case(torch.float32, 2, 100, 16, runs, option)
            for runs in (True, False)
            for option in ("", *OPTIONS)
        ]
    found = [
        Case(dtype, batch, length, page_size, runs)
        for dtype in (torch.bfloat16, torch.float32)
        for batch, length in GRID
        for page_size in PAGE_SIZES
        for runs in (True, False)
    ]
    return found + [
        Case(dtype, 4, 4096, page_size, runs, option)
        for dtype in (torch.bfloat16, torch.float32)
        for option in OPTIONS
        for page_size in (16, 128)
        for runs in (True, False)
    ]


def pages_of(case: Case) -> tuple[LayerPages, Tensor, Tensor]:
    """A layer's pages (layer-major, the default on a CPU) of random numbers, a block table, and
    lengths.
    """
    shape = PageGeometry(
        layers=1, kv_heads=KV_HEADS, head_dim=DIM, page_size=case.page_size, dtype=case.dtype,
        layout="layer-major",
    )  # fmt: skip
    width = -(-case.length // case.page_size)
    pages = case.batch * width + 3
    flat = torch.randn(pages * shape.page_bytes // shape.itemsize).to(case.dtype)
    k, v = (shape.view(0, kind, pages=pages, storage_bytes=flat.nbytes) for kind in ("k", "v"))
    random = np.random.default_rng(0)
    order = np.arange(pages) if case.runs else random.permutation(pages)
    table = torch.from_numpy(
        order[: case.batch * width].reshape(case.batch, width).astype(np.int32)
    )
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32)
    return LayerPages.of(flat, k, v, step=1), table, lengths


def plain(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Attention of `[rows, kv_heads, group, dim]` over `[rows, kv_heads, tokens, dim]`, by SDPA or,
    with a cap or sinks, as products.
    """
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(q, k, v, scale=options.scale)
    scores = (q @ k.transpose(-1, -2)).float() * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if options.sinks is not None:
        sinks = options.sinks.view(1, k.shape[1], -1, 1).expand(len(q), -1, -1, -1)
        scores = torch.cat((scores, sinks), -1)
    return scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v


def systems(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The calls, each `[rows, q_heads, dim]` or the same packed."""
    pages, table, lengths = pages_of(case)
    assert pages.v_pages is not None
    options = case.options
    q = torch.randn(case.batch, Q_HEADS, DIM).to(case.dtype)
    packed = q.view(case.batch, KV_HEADS, -1, DIM)
    plan = ops.plan_decode(pages, table, lengths, options.window)
    lane = None
    if not case.option:  # what a step takes for rows that are alike
        lane = ops.decode_lane(pages, plan)
    # Everyone reads the pages that a window reaches, and no others.
    first = 0 if options.window is None else max(0, case.length - options.window)
    near = table[:, first // case.page_size :]
    skipped = first % case.page_size
    tokens = case.length - first // case.page_size * case.page_size
    k, v = (common.contiguous(x, near, tokens)[:, :, skipped:].contiguous()
            for x in (pages.k_pages, pages.v_pages))  # fmt: skip

    def ours() -> Tensor:
        if lane is not None:
            return attend_lane(q.unsqueeze(2), lane, options.scale)
        return ops.decode(pages, q, table, lengths, options, backend="cpu", plan=plan)

    def gather() -> Tensor:
        assert pages.v_pages is not None
        dense_k = common.contiguous(pages.k_pages, near, tokens)[:, :, skipped:]
        dense_v = common.contiguous(pages.v_pages, near, tokens)[:, :, skipped:]
        if options.softcap is None and options.sinks is None:
            return F.scaled_dot_product_attention(
                q.unsqueeze(2), dense_k, dense_v, scale=options.scale, enable_gqa=True
            )
        return plain(packed, dense_k, dense_v, options)

    return {"ours": ours, "gather": gather, "packed": lambda: plain(packed, k, v, options)}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times of a case, in turn."""
    calls = systems(case)
    expected = calls["packed"]().reshape(case.batch, Q_HEADS, DIM).double()
    error = (calls["ours"]().reshape(expected.shape).double() - expected).abs().max().item()
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-4
    assert error < tolerance, f"{case}: off by {error}"
    timed = {name: functools.partial(_time, call) for name, call in calls.items()}
    common.alternate(timed, 1)
    times = common.alternate(timed, rounds)
    return {
        **case._asdict(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "kv_bytes": 2 * case.batch * case.length * KV_HEADS * DIM * case.dtype.itemsize,
        "seconds": {name: common.summary(each) for name, each in times.items()},
        "gather_over_ours": common.paired_ratio(times["gather"], times["ours"]),
        "packed_over_ours": common.paired_ratio(times["packed"], times["ours"]),
    }


def _time(call: Callable[[], object]) -> float:
    start = common.clock()
    call()
    return common.clock() - start


def report(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    lines = [
        [
            f"{row['dtype']} {row['batch']} x {row['length']} page {row['page_size']}"
            + (" runs" if row["runs"] else " anywhere")
            + f" {row['option']}".rstrip(),
            f"{row['seconds']['ours']['median'] * 1e3:.2f}",
            f"{row['gather_over_ours']:.2f}x",
            f"{row['packed_over_ours']:.2f}x",
        ]
        for row in rows
    ]
    return common.table(["decode of one layer", "ms", "gather / ours", "packed / ours"], lines)


def geometric_mean(values: list[float]) -> float:
    """Of ratios."""
    return float(np.exp(np.mean(np.log(values))))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="results folder")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [measure(case, chosen.rounds) for case in cases(quick=chosen.quick)]
    means = {
        f"{kind} {dtype} {place}": geometric_mean(
            [r[kind] for r in rows if r["dtype"] == dtype and r["runs"] == (place == "runs")]
        )
        for kind in ("gather_over_ours", "packed_over_ours")
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
        for place in ("runs", "anywhere")
    }
    print(report(rows))
    for name, mean in means.items():
        print(f"{name}: {mean:.2f}x (geometric mean)")
    document = {"benchmark": "cpu_decode", "environment": common.environment(), "rows": rows}
    common.publish("cpu_decode", {**document, "geometric_means": means}, chosen.out)


if __name__ == "__main__":
    main()
