"""Native code for the CPU beside torch's own: products, and attention over pages.

    python -m benchmarks.cpu_native [--rounds N] [--quick]

Products: all linear layers of SmolLM2-135M's shape once, one after another, so that weights come
from memory as they do in a step; beside oneDNN's packed weights and `linear` as it is. Attention:
9 query heads on 3 KV heads of 64, pages of 16, in fp32 and bf16, beside what stock torch makes of
the same pages, plans made before. GFLOP/s count what a causal mask lets through.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from kvpaged import ops
from kvpaged.geometry import PageGeometry
from kvpaged.ops import LayerPages, Options
from kvpaged_kernels.cpu.native_attend import NativeLayer
from kvpaged_kernels.cpu.native_linear import pack

PRODUCTS = [(960, 576), (576, 576), (3072, 576), (576, 1536)] * 30 + [(49152, 576)]
"""Columns and inputs: q, k, v together; output; gate, up together; down; the vocabulary."""
ROWS = (1, 4, 8, 32, 64, 256, 1024)
KV_HEADS, GROUP, DIM, PAGE = 3, 3, 64, 16


class Case(NamedTuple):
    """Rows of a step: new tokens and lengths of each, and how many pages all begin with."""

    name: str
    new: list[int]
    lengths: list[int]
    common: int = 0


CASES = (
    Case("a prompt of 2,000", [2000], [2000]),
    Case("8 prompts of 300", [300] * 8, [300] * 8),
    Case("32 prompts of 32", [32] * 32, [32] * 32),
    Case("32 prompts of 32 after 2,000 shared", [32] * 32, [2032] * 32, 125),
    Case("decode, 32 rows after 2,000 shared", [1] * 32, [2033] * 32, 125),
    Case("decode, 32 rows of 100 to 720", [1] * 32, list(range(100, 740, 20))),
    Case("64 tokens after 8,000", [64], [8064]),
    Case("8 guesses after 8,000", [8], [8008]),
)


def products(dtype: torch.dtype, rows: int, shapes: list[tuple[int, int]], rounds: int) -> Any:
    """Milliseconds of all products by each way, and GFLOP/s of ours."""
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    xs = {inner: torch.randn(1, rows, inner).to(dtype) for _, inner in shapes}
    ours = [pack(weight, None) for weight in weights]
    emulated = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    packed = [] if emulated else [torch.ops.mkldnn._reorder_linear_weight(w, None) for w in weights]

    def one_dnn() -> None:
        for (_, inner), weight in zip(shapes, packed, strict=True):
            torch.ops.mkldnn._linear_pointwise(xs[inner], weight, None, "none", [], "")

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: [layer(xs[layer.inner]) for layer in ours],
        "oneDNN": one_dnn,
        "plain": lambda: [torch.nn.functional.linear(xs[w.shape[1]], w) for w in weights],
    }
    if emulated:  # torch's are ten times slower
        del ways["oneDNN"], ways["plain"]
    flop = sum(2 * rows * columns * inner for columns, inner in shapes)
    return {"dtype": str(dtype), "rows": rows, **_figures(ways, flop, rounds)}


def attention(dtype: torch.dtype, case: Case, rounds: int) -> Any:
    """Milliseconds of one layer by each way, and GFLOP/s of ours."""
    width = -(-max(case.lengths) // PAGE)
    shape = PageGeometry(
        layers=1, kv_heads=KV_HEADS, head_dim=DIM, page_size=PAGE, dtype=dtype,
        layout="layer-major",
    )  # fmt: skip
    count = len(case.new) * width
    flat = torch.randn(count * shape.page_bytes // shape.itemsize).to(dtype)
    k_view, v_view = (shape.view(0, x, pages=count, storage_bytes=flat.nbytes) for x in ("k", "v"))
    pages = LayerPages.of(flat, k_view, v_view, step=1)
    assert pages.v_pages is not None
    table = torch.arange(count, dtype=torch.int32).view(len(case.new), width)
    table[1:, : case.common] = table[0, : case.common]
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    cu_q = torch.tensor([0, *itertools.accumulate(case.new)], dtype=torch.int32)
    total, options = sum(case.new), Options(DIM**-0.5)
    q = torch.randn(total, KV_HEADS * GROUP, DIM).to(dtype)
    k, v = (torch.randn(total, KV_HEADS, DIM).to(dtype) for _ in range(2))
    layer = NativeLayer(
        pages.k_pages, pages.v_pages, KV_HEADS * GROUP, scale=options.scale, window=None,
        softcap=None,
    )  # fmt: skip
    step = layer.plan(q, k, v, table, lengths, cu_q)
    if max(case.new) == 1:
        plan = ops.plan_decode(pages, table, lengths, None)

        def stock() -> Tensor:
            return ops.decode(pages, q, table, lengths, options, backend="cpu", plan=plan)
    else:
        spans = ops.plan_spans(pages, table, cu_q, lengths, None)

        def stock() -> Tensor:
            return ops.prefill(
                pages, q, table, cu_q, lengths, options, max_q=max(case.new),
                max_len=max(case.lengths), backend="cpu", spans=spans,
            )  # fmt: skip

    pairs = sum(
        n * (length - n) + n * (n + 1) // 2
        for n, length in zip(case.new, case.lengths, strict=True)
    )
    ways = {"native": lambda: layer(step, q, k, v), "stock": stock}
    flop = 4 * DIM * KV_HEADS * GROUP * pairs
    return {"dtype": str(dtype), "case": case.name, **_figures(ways, flop, rounds)}


def _figures(ways: Mapping[str, Callable[[], object]], flop: int, rounds: int) -> dict[str, Any]:
    times = common.alternate(
        {name: functools.partial(common.seconds, way, repeat=3) for name, way in ways.items()},
        rounds,
    )
    medians = {name: common.summary([1e3 * t for t in each]) for name, each in times.items()}
    return {
        "ms": medians,
        "gflops": round(flop / medians["native"]["median"] / 1e6, 1),
        "over": {
            name: round(common.paired_ratio(each, times["native"]), 3)
            for name, each in times.items()
            if name != "native"
        },
    }


def report(rows: list[Any], first: str, ways: list[str]) -> str:
    """One line a row: milliseconds of ours, GFLOP/s, and how many times as long others take."""
    lines = [
        [
            f"{row['dtype'].removeprefix('torch.')}, {row[first]}",
            f"{row['ms']['native']['median']:.2f}", row["gflops"],
            *(f"{row['over'][way]:.2f}x" if way in row["over"] else "" for way in ways),
        ]
        for row in rows
    ]  # fmt: skip
    return common.table([first, "ms", "GFLOP/s", *(f"{way} / ours" for way in ways)], lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="results folder")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    shapes, some = (PRODUCTS[-5:-1], ROWS[:2]) if chosen.quick else (PRODUCTS, ROWS)
    cases = CASES[2:3] if chosen.quick else CASES
    dtypes = (torch.float32, torch.bfloat16)
    with torch.inference_mode():
        linear = [products(t, rows, shapes, chosen.rounds) for t in dtypes for rows in some]
        attend = [attention(t, case, chosen.rounds) for t in dtypes for case in cases]
    print(
        report(linear, "rows", ["oneDNN", "plain"]), report(attend, "case", ["stock"]), sep="\n\n"
    )
    document = {"benchmark": "cpu_native", "environment": common.environment()}
    common.publish("cpu_native", {**document, "products": linear, "attention": attend}, chosen.out)


if __name__ == "__main__":
    main()
