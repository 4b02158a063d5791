"""Pages to and from host memory: over a plain copy, beside a model's steps, and layer by layer.

- `pieces`: pages of one slice, scattered, each way, over one large pinned copy of as many bytes;
  in, by the copy engines, by the kernel, and by what calibration chose, sums compared.
- `beside`: decode steps while pages stream in, over the same steps alone.
- `layerwise`: what a step that waits for each layer's pages takes longer than one that has them,
  over the time of the transfer alone; a layer computes for 1.25 times its transfer.
"""

import functools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.gpu_common import (
    Record,
    Setting,
    dtype_on,
    geometry,
    median_seconds,
)
from benchmarks.gpu_layout import step_of
from kvpaged.geometry import PageGeometry
from kvpaged.offload.copies import Sums
from kvpaged.offload.cuda_copies import CudaCopies
from kvpaged.offload.lane import Lane
from kvpaged.offload.means import SIZES, Means, Timing
from kvpaged.pages import classops
from kvpaged.pages.extents import Ids
from kvpaged.pages.pool import PagePool
from kvpaged.testing.host_lane import HostLane

PIECES = ((1, 64, 16), (2, 64, 16), (4, 64, 16), (7, 64, 16), (8, 128, 16), (8, 128, 64),
          (8, 128, 256))  # fmt: skip
"""KV heads, dim, page size: slices of 4, 8, 16, 28, 64, 256 and 1,024 KiB in half precision."""

COMPUTE_OVER_TRANSFER = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """Pages, their records, and what copies them.

    Attributes:
        copies: over a pool of pages full of random numbers.
        ids: the pages, in random order.
        records: as many, pinned on a device.
        sums: their checksums.
    """

    copies: CudaCopies
    shape: PageGeometry
    ids: Ids
    records: Tensor
    sums: Sums

    def into(self, layers: slice = classops.ALL_LAYERS) -> Any:
        """Begin to copy all in."""
        return self.copies.into(self.ids, self.records, self.sums, layers)

    def groups(self, pages: int) -> list[Any]:
        """Begin to copy all in, so many pages at a time: sums are made in between."""
        return [
            self.copies.into(
                self.ids[first : first + pages], self.records[first : first + pages],
                self.sums[first : first + pages], classops.ALL_LAYERS,
            )
            for first in range(0, len(self.ids), pages)
        ]  # fmt: skip

    def out(self) -> Any:
        """Begin to copy all out."""
        return self.copies.out(self.ids, self.records)


def make_bed(shape: PageGeometry, pages: int, device: torch.device) -> Bed:
    """Pages scattered over a pool twice as large."""
    pool = PagePool([shape], memory=2 * pages * shape.page_bytes, device=device)
    (page_class,) = pool.classes
    page_class.flat.view(torch.uint8).random_(0, 60)  # no NaN, whatever the dtype
    lanes: Callable[[torch.device], Lane] = Lane if device.type == "cuda" else HostLane
    copies = CudaCopies(page_class, "triton", device, lanes=lanes)
    ids = np.random.default_rng(0).permutation(2 * pages)[:pages].astype(np.int32)
    classops.keep_checksums(page_class, ids, backend="triton")
    body = shape.layers * shape.slice_bytes
    records = torch.empty(pages, body, dtype=torch.uint8, pin_memory=device.type == "cuda")
    ticket = copies.out(ids, records)
    ticket.wait()
    return Bed(copies=copies, shape=shape, ids=ids, records=records, sums=ticket.sums())


def waited(begin: Callable[[], Any], device: torch.device) -> None:
    """Begin a copy and wait for it; one that came in must have come in right."""
    ticket = begin()
    ticket.wait()
    if hasattr(ticket, "wrong") and ticket.wrong().any():
        raise RuntimeError(f"{ticket.wrong().sum()} pages of a copy came in wrong")
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by the host's clock, in turn, after one untimed call of each."""

    def timed(call: Callable[[], object]) -> float:
        start = common.clock()
        call()
        return common.clock() - start

    for call in calls.values():
        call()
    return common.alternate(
        {name: functools.partial(timed, call) for name, call in calls.items()}, rounds
    )


def by(bed: Bed, means: Means | None, table: tuple[Timing, ...]) -> Callable[[], Any]:
    """A copy in by the given means, or as `table` chooses."""
    if means is not None:
        dma, kernel = (0.0, 1.0) if means == "dma" else (1.0, 0.0)
        table = (Timing(SIZES[0], dma, kernel),)

    def begin() -> Any:
        bed.copies.table = table
        return bed.into()

    return begin


def pieces(kv_heads: int, dim: int, page_size: int, setting: Setting) -> dict[str, Any]:
    """The row of one size of pages."""
    device = setting.device
    shape = geometry(
        layers=1, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype_on(device),
        layout="page-major",
    )  # fmt: skip
    pages = 3 if setting.quick else (64 << 20) // shape.page_bytes
    bed = make_bed(shape, pages, device)
    bed.copies.calibrate(SIZES[:1] if setting.quick else SIZES)
    table = bed.copies.table
    there = torch.empty(bed.records.numel(), dtype=torch.uint8, device=device)
    here = bed.records.view(-1)
    pinned = torch.empty_like(here, pin_memory=device.type == "cuda")

    def plain(to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    calls: dict[str, Callable[[], object]] = {
        "plain in": functools.partial(plain, there, here),
        "plain out": functools.partial(plain, pinned, there),
        "out": functools.partial(waited, bed.out, device),
    }
    ways: dict[str, Means | None] = {"dma": "dma", "kernel": "kernel", "chosen": None}
    for name, means in ways.items():
        calls[f"in, {name}"] = functools.partial(waited, by(bed, means, table), device)
    times = wall_seconds(calls, 2 if setting.quick else 9)
    over = {
        name: common.paired_ratio(times["plain out" if name == "out" else "plain in"], each)
        for name, each in times.items()
        if not name.startswith("plain")
    }
    return {
        "kind": "pieces", "piece_bytes": shape.slice_bytes, "pages": pages,
        "seconds": median_seconds(times), "calibration": [timing._asdict() for timing in table],
        "plain_over": over, "goal": 0.92 if shape.slice_bytes >= 64 << 10 else 0.85,
    }  # fmt: skip


def large_shape(setting: Setting, layers: int) -> PageGeometry:
    """Pages of a model of 8 KV heads of 128 (quick: 2 of 64)."""
    kv_heads, dim, page_size = (2, 64, 16) if setting.quick else (8, 128, 64)
    return geometry(
        layers=layers, kv_heads=kv_heads, dim=dim, page_size=page_size,
        dtype=dtype_on(setting.device), layout="page-major",
    )  # fmt: skip


def beside(setting: Setting) -> dict[str, Any]:
    """Decode steps alone and while pages stream in, by the device's clock."""
    device, layers = setting.device, 1 if setting.quick else 32
    dtype = dtype_on(device)
    rows, steps = (1, 1) if setting.quick else (32, 8)
    page_size = 16 if setting.quick else 64
    tokens = 2 * page_size if setting.quick else 4096
    token_bytes = layers * 2 * 8 * 128 * dtype.itemsize
    flat = torch.empty(rows * tokens * token_bytes // dtype.itemsize, dtype=dtype, device=device)
    step, length = step_of(
        flat.normal_(), "page-major", layers=layers, page_size=page_size, rows=rows,
        scattered=True,
    )  # fmt: skip
    bed = make_bed(large_shape(setting, layers), 3 if setting.quick else 512, device)
    outlasted: list[bool] = []

    def run_steps() -> float:
        if device.type != "cuda":
            start = common.clock()
            for _ in range(steps):
                step()
            return common.clock() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def streaming() -> float:
        tickets = bed.groups(32)
        taken = run_steps()
        outlasted.append(not tickets[-1].wait(0))
        for ticket in tickets:
            waited(lambda ticket=ticket: ticket, device)  # type: ignore[misc]
        return taken

    run_steps()
    streaming()
    outlasted.clear()
    times = common.alternate(
        {"alone": run_steps, "streaming": streaming}, 2 if setting.quick else 9
    )
    return {
        "kind": "beside", "rows": rows, "length": length, "layers": layers, "steps": steps,
        "streamed_bytes": bed.records.numel(), "seconds": median_seconds(times),
        "streaming_over_alone": common.paired_ratio(times["streaming"], times["alone"]),
        "outlasted": sum(outlasted), "rounds": len(outlasted), "goal": 1.03,
    }  # fmt: skip


def layerwise(setting: Setting) -> dict[str, Any]:
    """A step over layers whose pages arrive one after the other."""
    device, layers = setting.device, 2 if setting.quick else 32
    bed = make_bed(large_shape(setting, layers), 3 if setting.quick else 64, device)
    size = 32 if setting.quick else 4096
    a = torch.randn(size, size, device=device).to(dtype_on(device))
    one = functools.partial(torch.mm, a, a, out=torch.empty_like(a))

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def many(products: int) -> None:
        for _ in range(products):
            one()
        finished()

    def transfer() -> None:
        tickets = [bed.into(slice(layer, layer + 1)) for layer in range(layers)]
        tickets[-1].wait()

    rounds = 2 if setting.quick else 9
    probe = 4 if setting.quick else 64
    rough = median_seconds(
        wall_seconds({"transfer": transfer, "products": functools.partial(many, probe)}, rounds)
    )
    wanted = COMPUTE_OVER_TRANSFER * rough["transfer"] / layers
    products = max(1, round(wanted / (rough["products"] / probe)))
    if setting.quick:
        products = min(products, 20)

    def loaded() -> None:
        many(products * layers)

    def loading() -> None:
        begun: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def begin() -> None:
            for layer in range(layers):
                begun.put(bed.into(slice(layer, layer + 1)))

        thread = threading.Thread(target=begin)
        thread.start()
        for _ in range(layers):
            begun.get(timeout=60).order()
            for _ in range(products):
                one()
        finished()
        thread.join()

    times = wall_seconds({"transfer": transfer, "loaded": loaded, "loading": loading}, rounds)
    seconds = median_seconds(times)
    return {
        "kind": "layerwise", "layers": layers, "bytes": bed.records.numel(), "seconds": seconds,
        "products_a_layer": products,
        "visible_over_transfer": (seconds["loading"] - seconds["loaded"]) / seconds["transfer"],
        "goal": 0.10,
    }  # fmt: skip


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """A row a size of pages, one beside a model, one layer by layer."""
    for kv_heads, dim, page_size in PIECES[:1] if setting.quick else PIECES:
        if record.late():
            continue
        row = pieces(kv_heads, dim, page_size, setting)
        shares = "  ".join(f"{name} {share:.2f}" for name, share in row["plain_over"].items())
        record.add(row, f"pages of {row['piece_bytes'] >> 10} KiB, of a plain copy: {shares}")
    if not record.late():
        row = beside(setting)
        record.add(
            row,
            f"decode beside streaming {row['streaming_over_alone']:.3f}x of alone "
            f"(streaming to the end in {row['outlasted']} of {row['rounds']})",
        )
    if not record.late():
        row = layerwise(setting)
        record.add(row, f"layer by layer: {row['visible_over_transfer']:.3f} of the transfer seen")
    return record.finish()
