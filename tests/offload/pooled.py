"""Classes of pages full of random bytes, and records of them made view by view."""

from typing import Any

import numpy as np
import torch

from kvpaged.geometry import PageGeometry
from kvpaged.pages.pool import PageClass, PagePool
from kvpaged.tiers.record import body_bytes
from kvpaged_kernels.reference.checksum import checksum

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"layers": 3, "kv_heads": 2, "head_dim": 16, "page_size": 16},
    "unlike widths": {"layers": 2, "kv_heads": 3, "head_dim": 24, "v_dim": 8, "page_size": 32},
    "no V": {"layers": 4, "kv_heads": 1, "head_dim": 40, "v_dim": 0, "page_size": 16},
    "float32": {
        "layers": 3, "kv_heads": 1, "head_dim": 8, "page_size": 16, "dtype": torch.float32
    },
}  # fmt: skip
LAYOUTS = ("page-major", "layer-major")


def make(
    shape: str = "plain", layout: str = "page-major", *, pages: int = 12, checksums: bool = True
) -> PageClass:
    """A class whose pages are random bytes."""
    geometry = PageGeometry(layout=layout, **SHAPES[shape])  # type: ignore[arg-type]
    pool = PagePool(
        [geometry], memory=pages * geometry.page_bytes, device=torch.device("cpu"),
        checksums=checksums,
    )  # fmt: skip
    (page_class,) = pool.classes
    generator = torch.Generator().manual_seed(7)
    found = page_class.flat.view(torch.uint8)
    found.copy_(torch.randint(256, found.shape, dtype=torch.uint8, generator=generator))
    return page_class


def record_of(page_class: PageClass, page: int) -> torch.Tensor:
    """A page's record, uint8: the concatenation of its layers' views."""
    entry = int(page_class.entries(np.array([page], np.int32))[0])
    parts = []
    for layer in page_class.layers:
        for view in (layer.k_pages, layer.v_pages):
            if view is not None:
                parts.append(view[entry].contiguous().view(torch.uint8).flatten())
    return torch.cat(parts)


def records_of(page_class: PageClass, ids: np.ndarray) -> torch.Tensor:
    """The records of pages, uint8 `[n, bytes]`."""
    if not ids.size:
        return torch.empty(0, body_bytes(page_class.geometry), dtype=torch.uint8)
    return torch.stack([record_of(page_class, int(page)) for page in ids])


def sums_of(page_class: PageClass, records: torch.Tensor) -> np.ndarray:
    """The checksums of records' slices, int64 `[n, layers]`."""
    layers = page_class.geometry.layers
    words = (
        records.contiguous()
        .view(torch.int32)
        .reshape(len(records), layers, 1, records.shape[1] // layers // 4)
    )
    found: np.ndarray = checksum(words, torch.arange(len(records))).numpy()
    return found
