"""The kernels that write, move and sum pages, against the bytes they cannot do without."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import roofline
from benchmarks.gpu_common import (
    Record,
    Setting,
    ceilings,
    dtype_on,
    geometry,
    median_seconds,
    time_peers,
)
from kvpaged_kernels.gpu.append import append
from kvpaged_kernels.gpu.checksum import checksum
from kvpaged_kernels.gpu.copy import copy_pages

Case = tuple[str, Callable[[], object], roofline.Floor]


def cases(setting: Setting) -> Iterator[Case]:
    """Each kernel at a few sizes: of 32 layers, 8 KV heads of 128, pages of 64 tokens."""
    quick, device = setting.quick, setting.device
    layers, kv_heads, dim, page_size = (2, 2, 64, 16) if quick else (32, 8, 128, 64)
    dtype = dtype_on(device)
    shape = geometry(
        layers=layers, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype,
        layout="page-major",
    )  # fmt: skip
    pages = 6 if quick else 512
    flat = torch.empty(pages * shape.page_bytes // dtype.itemsize, dtype=dtype, device=device)
    flat.normal_()
    heads = roofline.Heads(kv_heads, kv_heads, dim, dim, dtype.itemsize)
    step = shape.entries_per_page()
    size = flat.nbytes
    k_view, v_view = (shape.view(0, kind, pages=pages, storage_bytes=size) for kind in ("k", "v"))
    k_pages, v_pages = (
        flat.as_strided(view.size, view.stride, view.offset) for view in (k_view, v_view)
    )
    for tokens in (4,) if quick else (1, 32, 256, 8192):
        k, v = (torch.randn(tokens, kv_heads, dim, device=device).to(dtype) for _ in range(2))
        place = torch.randperm(pages * page_size, device=device)[:tokens]
        slots = place // page_size * step * page_size + place % page_size
        yield (
            f"append {tokens} tokens",
            lambda k=k, v=v, slots=slots: append(k, v, k_pages, v_pages, slots),  # type: ignore[misc]
            roofline.append(heads, tokens),
        )
    order = torch.randperm(pages, device=device) * step
    whole = flat.as_strided(
        ((pages - 1) * step + 1, 1, shape.page_bytes // dtype.itemsize),
        (shape.page_bytes // dtype.itemsize // step, shape.page_bytes // dtype.itemsize, 1),
    )
    words = flat.view(torch.int32)
    page_words = shape.page_bytes // 4
    summed = words.as_strided(
        ((pages - 1) * step + 1, layers, 2 * kv_heads, page_words // layers // (2 * kv_heads)),
        (page_words // step, page_words // layers, page_words // layers // (2 * kv_heads), 1),
    )
    for count in (2,) if quick else (1, 16, 128):
        src, dst = order[:count], order[count : 2 * count]
        yield (
            f"copy {count} pages",
            lambda src=src, dst=dst: copy_pages(whole, src, dst),  # type: ignore[misc]
            roofline.copy(count, shape.page_bytes),
        )
        yield (
            f"checksum {count} pages",
            lambda src=src: checksum(summed, src, first_word=0),  # type: ignore[misc]
            roofline.checksum(count, shape.page_bytes, layers),
        )


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """One row a kernel and size."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    for name, call, floor in cases(setting):
        if record.late():
            continue
        seconds = median_seconds(time_peers({name: call}, setting))[name]
        least = floor.seconds(
            bytes_per_s=limits["copy_gb_s"] * 1e9, operations_per_s=limits["matrix_tflop_s"] * 1e12
        )
        row = {"case": name, "seconds": seconds, "floor_bytes": floor.bytes}
        record.add(
            {**row, "over_floor": seconds / least},
            f"{name}: {seconds * 1e6:.1f} us, {seconds / least:.2f} floors",
        )
    return record.finish()
