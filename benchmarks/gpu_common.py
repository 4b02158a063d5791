"""What the parts of the GPU benchmark share: a record on disk, a device clock, paged sequences."""

import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from kvpaged.config import Layout
from kvpaged.geometry import PageGeometry
from kvpaged.ops import LayerPages

LIMIT_S = 450.0
"""No case of a part starts later than this unless asked for; 90 s later the part is stopped."""

FLUSH_BYTES = 256 * 2**20
"""More than any level-2 cache to date (H100: 50 MB, B200: 126 MB)."""

FLUSHES = 8
"""Passes over the flush buffer: about 0.7 ms at 3 TB/s, more than a launch takes on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how large: `quick` asks for sizes at which Triton's interpreter takes seconds.

    `folders`: of peers whose kernels are read from outside the repository (`triton_peers`).
    `limit_s`: seconds after which a part starts no more cases. `without`: peers left out.
    """

    device: torch.device
    quick: bool
    out: Path
    folders: Mapping[str, Path | None] = field(default_factory=dict)
    limit_s: float = LIMIT_S
    without: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Record:
    """The document of one part, rewritten on disk after each row.

    Invariants:
        1. The file is always a whole document: it is replaced, never written in place.
        2. `complete` is true only after `finish`, and only if no case was left out.
    """

    part: str
    folder: Path
    limit_s: float = LIMIT_S
    document: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        head = {"part": self.part, "complete": False, "seconds": 0.0, "left_out": 0, "rows": []}
        self.document = {**head, **self.document}
        self.write()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows so far."""
        rows: list[dict[str, Any]] = self.document["rows"]
        return rows

    def add(self, row: Mapping[str, Any], line: str) -> None:
        """Keep `row` on disk and show `line` to people (stderr)."""
        self.rows.append(dict(row))
        self.write()
        print(f"{self.part}: {line}", file=sys.stderr, flush=True)

    def late(self) -> bool:
        """Whether the part has used its time; the caller's case then counts as left out."""
        if time.perf_counter() - self.started < self.limit_s:
            return False
        return self.leave_out()

    def leave_out(self) -> bool:
        """Count a case as left out; true, for conditions."""
        self.document["left_out"] += 1
        return True

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Close the document with `facts`."""
        self.document.update(facts)
        self.document["complete"] = self.document["left_out"] == 0
        self.write()
        return self.document

    def write(self) -> None:
        """Replace the file."""
        self.document["seconds"] = round(time.perf_counter() - self.started, 3)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{self.part}.json"
        draft = file.with_suffix(".tmp")
        draft.write_text(json.dumps(self.document, indent=1, allow_nan=False) + "\n")
        os.replace(draft, file)


@functools.cache
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)


def device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one `call` on the device, from a cold level-2 cache; on a CPU, by the wall clock.

    The flush keeps the device busy while the host launches `call`, so that the gaps between
    launches are not in the figure unless the host falls behind by more than the flush takes.
    """
    if device.type != "cuda":
        start = common.clock()
        call()
        return common.clock() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    buffer = _flush_buffer(device)
    for _ in range(FLUSHES):
        buffer.zero_()
    buffer.view(torch.int64).max()  # read: what the cache holds then needs no writing back
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return float(start_event.elapsed_time(end_event)) / 1e3


def time_peers(
    calls: Mapping[str, Callable[[], object]], setting: Setting
) -> dict[str, list[float]]:
    """Seconds of each call, in turn, after one untimed call of each."""
    for call in calls.values():
        call()
    cases = {
        name: functools.partial(device_seconds, call, setting.device)
        for name, call in calls.items()
    }
    return common.alternate(cases, 2 if setting.quick else 9)


def median_seconds(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each, to six digits."""
    return {name: float(f"{statistics.median(each):.6g}") for name, each in times.items()}


def matrix_rate(device: torch.device, *, size: int) -> float:
    """Operations a second of a square bf16 product (2 * size**3 of them)."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / common.seconds(lambda: torch.mm(a, b, out=out), repeat=9, warmup=3)


def ceilings(setting: Setting) -> dict[str, float]:
    """What the device reaches on the two things attention is bound by; measured in each part."""
    quick = setting.quick
    megabytes = 8 if quick else min(4096, free_bytes(setting.device) // 4 // 2**20)
    return {
        "copy_gb_s": common.copy_bandwidth(setting.device, megabytes=megabytes) / 1e9,
        "matrix_tflop_s": matrix_rate(setting.device, size=128 if quick else 8192) / 1e12,
    }


def finite(number: float) -> float | None:
    """The number, or None for what JSON has no word for."""
    return number if math.isfinite(number) else None


def dtype_on(device: torch.device) -> torch.dtype:
    """bf16; under the interpreter fp16, since numpy has no bf16 to compute with."""
    return torch.float16 if device.type == "cpu" else torch.bfloat16


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; of a CPU only a little is asked for."""
    if device.type != "cuda":
        return 64 * 2**20
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


class Sequences(NamedTuple):
    """Some sequences in pages of one layer.

    Attributes:
        pages: the layer's views.
        block_table: int32 `[rows, width]`.
        seq_lens: int32 `[rows]`.
    """

    pages: LayerPages
    block_table: Tensor
    seq_lens: Tensor


def layer_pages(shape: PageGeometry, flat: Tensor, layer: int, *, pages: int) -> LayerPages:
    """The views of one layer over a storage of `pages` pages."""
    size = pages * shape.page_bytes
    k, v = (shape.view(layer, kind, pages=pages, storage_bytes=size) for kind in ("k", "v"))
    return LayerPages.of(flat, k, v, step=shape.entries_per_page())


def table_of(
    rows: int, width: int, step: int, device: torch.device, *, pages: int, scattered: bool = True
) -> Tensor:
    """A block table, int32 `[rows, width]`, of pages anywhere among `pages`, or in order.

    `step` is the distance between the entries of two adjacent pages.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(pages, generator=generator) if scattered else torch.arange(pages)
    return (order[: rows * width].reshape(rows, width) * step).to(torch.int32).to(device)


def geometry(
    *, layers: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, layout: Layout
) -> PageGeometry:
    """A geometry with K and V of one width."""
    return PageGeometry(
        layers=layers,
        kv_heads=kv_heads,
        head_dim=dim,
        page_size=page_size,
        dtype=dtype,
        layout=layout,
    )


def random_sequences(
    lengths: Sequence[int], shape: PageGeometry, device: torch.device
) -> Sequences:
    """Sequences of random numbers in pages that lie anywhere; of several layers it is the last."""
    each = [-(-n // shape.page_size) for n in lengths]
    pages = sum(each) + 2
    torch.manual_seed(0)
    flat = torch.empty(pages * shape.page_bytes // shape.itemsize, dtype=shape.dtype, device=device)
    flat.normal_()
    order = table_of(1, sum(each), shape.entries_per_page(), device, pages=pages)[0]
    table = torch.zeros(len(lengths), max(1, *each), dtype=torch.int32, device=device)
    for row, mine in enumerate(order.split(each)):
        table[row, : len(mine)] = mine
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    views = layer_pages(shape, flat, shape.layers - 1, pages=pages)
    return Sequences(views, table, lens)
