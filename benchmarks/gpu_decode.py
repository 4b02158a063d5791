"""Decode attention: against its floor, beside others, and what of it depends on what.

The grid is 32 query heads on 8 KV heads of 128, batch 1 to 256, 1k to 128k tokens, pages of 16 and
64 in random order, beside FlashInfer, vLLM's and SGLang's Triton kernels, SDPA and FlexAttention. A
ratio to a peer above one means that ours took less time. Then: one long row among short ones, more
queries a row, options, the planner, other heads, and a captured graph of many layers.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common, roofline
from benchmarks.gpu_common import (
    Record,
    Sequences,
    Setting,
    ceilings,
    dtype_on,
    finite,
    free_bytes,
    geometry,
    layer_pages,
    median_seconds,
    random_sequences,
    time_peers,
)
from benchmarks.gpu_peers import Call, Work, peers_of
from kvpaged_kernels.gpu.decode import paged_decode
from kvpaged_kernels.gpu.plan import DecodePlan, Shape, plan_decode

PAGE_SIZES = (16, 64)
PEAK_GB_S = {"H100": 3350.0, "H200": 4800.0, "A100": 2039.0, "B200": 8000.0}
"""Bandwidth of the data sheets (SXM), by a part of the device's name."""

GRID = (
    (1, 1024), (1, 8192), (1, 32768), (1, 131072), (4, 8192), (4, 32768), (8, 131072), (16, 1024),
    (16, 8192), (32, 32768), (64, 1024), (64, 4096), (256, 1024), (256, 4096),
)  # fmt: skip
"""Batch and tokens: 4 MiB to 4 GiB of K and V, of which all systems together hold nine times."""


class Point(NamedTuple):
    """Rows of these lengths, `queries` of each attending."""

    lengths: tuple[int, ...]
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    queries: int = 1
    window: int | None = None

    def floor(self, page_size: int, element: int) -> roofline.Floor:
        """The least it could take."""
        heads = roofline.Heads(self.q_heads, self.kv_heads, self.dim, self.dim, element)
        counts = [self.queries] * len(self.lengths)
        return roofline.attention(
            heads, self.lengths, counts, page_size=page_size, window=self.window
        )

    def kv_bytes(self, element: int) -> int:
        """K and V of all tokens."""
        return sum(self.lengths) * 2 * self.kv_heads * self.dim * element


class Ours(NamedTuple):
    """Our decode of a point: the call, its plan's call, and what it reads."""

    call: Call
    planning: Callable[[], DecodePlan]
    found: Sequences
    q: Tensor


def ours(point: Point, page_size: int, setting: Setting, **options: Any) -> Ours:
    """Our decode with a plan made before, as a step's layers have it."""
    device, dtype = setting.device, dtype_on(setting.device)
    shape = geometry(
        layers=1, kv_heads=point.kv_heads, dim=point.dim, page_size=page_size, dtype=dtype,
        layout="page-major",
    )  # fmt: skip
    found = random_sequences(point.lengths, shape, device)
    assert found.pages.v_pages is not None
    rows = len(point.lengths)
    q = torch.randn(rows * point.queries, point.q_heads, point.dim, device=device).to(dtype)
    cu_q = None
    if point.queries > 1:
        cu_q = torch.arange(rows + 1, dtype=torch.int32, device=device) * point.queries
    facts = Shape(
        rows, point.kv_heads, point.q_heads // point.kv_heads, point.dim, point.dim, page_size,
        point.queries, point.window, dtype,
    )  # fmt: skip
    planning = functools.partial(plan_decode, facts, found.seq_lens, cu_q)
    call = functools.partial(
        paged_decode, q, found.pages.k_pages, found.pages.v_pages, found.block_table,
        found.seq_lens, scale=point.dim**-0.5, cu_q=cu_q, max_q=point.queries,
        window=point.window, plan=planning(), **options,
    )  # fmt: skip
    return Ours(call, planning, found, q)


def beside_peers(point: Point, setting: Setting) -> tuple[dict[str, Call], dict[str, str]]:
    """Ours by page size, the peers with the tokens of the last one, and why others don't run."""
    calls: dict[str, Call] = {}
    made = None
    for page_size in PAGE_SIZES:
        made = ours(point, page_size, setting)
        calls[f"paged-{page_size}"] = made.call
    assert made is not None
    assert made.found.pages.v_pages is not None
    length = point.lengths[0]
    k, v = (
        common.contiguous(x, made.found.block_table, length)
        for x in (made.found.pages.k_pages, made.found.pages.v_pages)
    )
    work = Work(made.q.unsqueeze(1), k, v, PAGE_SIZES[0])
    ready, skipped = peers_of(work, setting.folders, setting.without)
    return {**calls, **ready}, skipped


def measured(
    point: Point, calls: dict[str, Call], setting: Setting, limits: dict[str, float], page_size: int
) -> dict[str, Any]:
    """Times of calls in turn, as shares of the ceiling and multiples of the floor."""
    element = dtype_on(setting.device).itemsize
    floor = point.floor(page_size, element)
    peak = next((gb for name, gb in PEAK_GB_S.items() if name in device_name(setting)), None)
    times = time_peers(calls, setting)
    seconds = median_seconds(times)
    least = floor.seconds(
        bytes_per_s=limits["copy_gb_s"] * 1e9, operations_per_s=limits["matrix_tflop_s"] * 1e12
    )
    mine = [name for name in calls if name.startswith("paged")]
    return {
        **point._asdict(),
        "lengths": [len(point.lengths), max(point.lengths)],
        "kv_bytes": point.kv_bytes(element),
        "floor_bytes": floor.bytes,
        "floor_operations": floor.operations,
        "seconds": seconds,
        "of_ceiling": {
            n: floor.bytes / s / (limits["copy_gb_s"] * 1e9) for n, s in seconds.items()
        },
        "of_peak": peak and {n: floor.bytes / s / (peak * 1e9) for n, s in seconds.items()},
        "over_floor": {name: each / least for name, each in seconds.items()},
        "over_peers": {
            name: {
                peer: common.paired_ratio(times[peer], times[name])
                for peer in calls
                if peer not in mine
            }
            for name in mine
        },
    }


def device_name(setting: Setting) -> str:
    """The device's name, or nothing on a CPU."""
    return torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else ""


def grid_rows(setting: Setting, limits: dict[str, float], record: Record) -> None:
    """Every point of the grid that there is memory for, beside the peers."""
    grid = ((2, 64),) if setting.quick else GRID
    for batch, length in grid:
        point = Point((length,) * batch)
        if setting.quick:
            point = Point((length,) * batch, 4, 2, 64)
        # Two page sizes of ours, contiguous, each peer's copy, and temporaries.
        needed = 9 * point.kv_bytes(dtype_on(setting.device).itemsize)
        if record.late() or (needed > free_bytes(setting.device) and record.leave_out()):
            continue
        calls, skipped = beside_peers(point, setting)
        mine = calls[f"paged-{PAGE_SIZES[-1]}"]()
        difference = {
            name: finite((call().view_as(mine) - mine).abs().max().item())
            for name, call in calls.items()
            if not name.startswith("paged")
        }
        row = measured(point, calls, setting, limits, PAGE_SIZES[-1])
        row |= {"kind": "grid", "difference": difference, "skipped": skipped}
        record.add(row, line_of(row))


def varied(setting: Setting) -> Iterator[tuple[str, dict[str, tuple[Point, int, dict[str, Any]]]]]:
    """Sets of our own decodes that are timed in turn: name, then label: point, page, options."""
    quick = setting.quick
    long, short, rows = (192, 16, 3) if quick else (131072, 4096, 31)
    heads = (4, 2, 64) if quick else (32, 8, 128)
    mixed = (long, *[short] * rows)
    mean = sum(mixed) // len(mixed)
    device = setting.device
    yield (
        "mixed",
        {
            "paged-mixed": (Point(mixed, *heads), 64, {}),
            "paged-uniform": (Point((mean,) * len(mixed), *heads), 64, {}),
        },
    )
    batch, length = (2, 64) if quick else (16, 8192)
    same = (length,) * batch
    yield (
        "queries",
        {
            f"paged-{n}": (Point(same, *heads, queries=n), 64, {})
            for n in ((1, 4) if quick else (1, 2, 4, 8, 16))
        },
    )
    plain = Point(same, *heads)
    each_head = torch.linspace(-1, 1, heads[0], device=device)
    yield (
        "options",
        {
            "paged-plain": (plain, 64, {}),
            "paged-softcap": (plain, 64, {"softcap": 50.0}),
            "paged-sinks": (plain, 64, {"sinks": each_head.to(dtype_on(device))}),
            "paged-alibi": (plain, 64, {"alibi_slopes": each_head.abs()}),
            "paged-window": (plain._replace(window=length), 64, {}),
        },
    )
    if quick:
        return
    for name, q_heads, kv_heads, dim in (
        ("smollm2", 9, 3, 64), ("gemma3", 4, 1, 256), ("mha", 32, 32, 128), ("mqa", 48, 1, 128),
    ):  # fmt: skip
        yield name, {f"paged-{p}": (Point(same, q_heads, kv_heads, dim), p, {}) for p in PAGE_SIZES}


def own_rows(setting: Setting, limits: dict[str, float], record: Record) -> None:
    """Ours beside itself: mixed lengths, more queries, options, other heads."""
    for kind, cases in varied(setting):
        if record.late():
            continue
        calls = {n: ours(p, page, setting, **more).call for n, (p, page, more) in cases.items()}
        times = time_peers(calls, setting)
        first = next(iter(cases))
        row: dict[str, Any] = {
            "kind": kind,
            "seconds": median_seconds(times),
            "over_floor": {
                name: seconds
                / point.floor(page, dtype_on(setting.device).itemsize).seconds(
                    bytes_per_s=limits["copy_gb_s"] * 1e9,
                    operations_per_s=limits["matrix_tflop_s"] * 1e12,
                )
                for (name, (point, page, _)), seconds in zip(
                    cases.items(), median_seconds(times).values(), strict=True
                )
            },
            "over_first": {
                name: common.paired_ratio(each, times[first]) for name, each in times.items()
            },
        }
        shown = "  ".join(
            f"{name.removeprefix('paged-')} {s * 1e6:.1f} us ({row['over_floor'][name]:.2f} floors)"
            for name, s in row["seconds"].items()
        )
        record.add(row, f"{kind}: {shown}")


def planner_rows(setting: Setting, limits: dict[str, float], record: Record) -> None:
    """The planner, once a step: on a device many of it in a captured graph, so that neither a
    launch nor the clock is in the figure.
    """
    sizes = ((4, 64),) if setting.quick else ((1, 8192), (32, 4096), (256, 1024), (1024, 256))
    for rows, length in sizes:
        if record.late():
            continue
        made = ours(Point((length,) * rows, 4, 2, 64), 64, setting)
        times = 1 if setting.device.type != "cuda" else 50
        call: Callable[[], object] = made.planning
        if times > 1:
            call = captured(setting, lambda made=made: [made.planning() for _ in range(50)])  # type: ignore[misc]
        seconds = median_seconds(time_peers({"plan": call}, setting))["plan"] / times
        floor = roofline.plan(rows, made.planning().programs)
        least = floor.seconds(bytes_per_s=limits["copy_gb_s"] * 1e9, operations_per_s=1.0)
        record.add(
            {"kind": "planner", "rows": rows, "seconds": {"plan": seconds},
             "over_floor": {"plan": seconds / least}},
            f"planner, {rows} rows: {seconds * 1e6:.1f} us",
        )  # fmt: skip


def captured(setting: Setting, step: Callable[[], object]) -> Callable[[], object]:
    """What `step` launches, as a CUDA graph."""
    step()
    torch.cuda.synchronize(setting.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()

    def replay() -> object:
        graph.replay()
        return kept  # the graph's memory lives as long as this call

    return replay


def graph_rows(setting: Setting, limits: dict[str, float], record: Record) -> None:
    """A captured step over 16 layers with pages of their own and one plan: the time of a layer."""
    if setting.device.type != "cuda":
        return
    layers, dtype = 16, dtype_on(setting.device)
    shape = geometry(
        layers=layers, kv_heads=8, dim=128, page_size=64, dtype=dtype, layout="page-major"
    )
    for rows, length in ((1, 8192), (32, 1024), (32, 4096)):
        if record.late():
            continue
        point = Point((length,) * rows)
        found = random_sequences(point.lengths, shape, setting.device)
        pages = found.pages.flat.nbytes // shape.page_bytes
        views = [layer_pages(shape, found.pages.flat, i, pages=pages) for i in range(layers)]
        q = torch.randn(rows, 32, 128, device=setting.device).to(dtype)
        facts = Shape(rows, 8, 4, 128, 128, 64, 1, None, dtype)

        def step() -> list[Tensor]:
            plan = plan_decode(facts, found.seq_lens)  # noqa: B023 - called in this turn only
            outs = []
            for view in views:  # noqa: B023
                assert view.v_pages is not None
                outs.append(
                    paged_decode(
                        q, view.k_pages, view.v_pages, found.block_table, found.seq_lens,  # noqa: B023
                        scale=128**-0.5, plan=plan,
                    )
                )  # fmt: skip
            return outs

        seconds = median_seconds(time_peers({"graph": captured(setting, step)}, setting))["graph"]
        floor = point.floor(64, dtype.itemsize)
        least = floor.seconds(
            bytes_per_s=limits["copy_gb_s"] * 1e9, operations_per_s=limits["matrix_tflop_s"] * 1e12
        )
        each = seconds / layers
        record.add(
            {"kind": "graph", "rows": rows, "length": length, "layers": layers,
             "seconds": {"layer": each}, "over_floor": {"layer": each / least}},
            f"captured, {rows} x {length}: {each * 1e6:.1f} us a layer, {each / least:.2f} floors",
        )  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means over the grid for each of our page sizes, and page 16 against page 64."""
    grid = [row for row in rows if row["kind"] == "grid"]
    means: dict[str, dict[str, float]] = {}
    for name in (f"paged-{page_size}" for page_size in PAGE_SIZES):
        for peer in sorted({peer for row in grid for peer in row["over_peers"][name]}):
            ratios = [
                row["over_peers"][name][peer] for row in grid if peer in row["over_peers"][name]
            ]
            means.setdefault(name, {})[peer] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    pages = [row["seconds"]["paged-16"] / row["seconds"]["paged-64"] for row in grid]
    return {"geometric_mean_over": means, "page_16_over_page_64": pages}


def line_of(row: dict[str, Any]) -> str:
    """A row of the grid for people."""
    shares = row["of_peak"] or row["of_ceiling"]
    times = "  ".join(
        f"{name} {each * 1e6:.1f} us ({shares[name]:.0%}, {row['over_floor'][name]:.2f} floors)"
        for name, each in row["seconds"].items()
    )
    skipped = "".join(f"; {name} skipped: {why}" for name, why in row["skipped"].items())
    batch, length = row["lengths"]
    return f"{batch} x {length} ({row['kv_bytes'] / 2**20:.0f} MiB): {times}{skipped}"


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """All of it."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    # What only this part can tell comes before the peers, which compile for long.
    own_rows(setting, limits, record)
    planner_rows(setting, limits, record)
    graph_rows(setting, limits, record)
    grid_rows(setting, limits, record)
    return record.finish(**summary(record.rows))
