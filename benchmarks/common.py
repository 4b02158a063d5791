"""What the benchmarks of this tree share: `kvpaged.bench.common`, and what knows the tree."""

import os
from pathlib import Path

import torch

from kvpaged.bench.common import (
    alternate,
    clock,
    describe,
    environment,
    paired_ratio,
    publish,
    seconds,
    summary,
    table,
)

__all__ = [
    "RESULTS",
    "ROOT",
    "alternate",
    "clock",
    "contiguous",
    "copy_bandwidth",
    "describe",
    "environment",
    "paired_ratio",
    "publish",
    "seconds",
    "summary",
    "table",
    "tree_env",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def tree_env() -> dict[str, str]:
    """This environment, in which the packages of this tree can be imported without installing."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def copy_bandwidth(device: torch.device | str = "cpu", *, megabytes: int = 256) -> float:
    """Bytes a second that a copy reads and writes, between two tensors of `megabytes` each."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def contiguous(pages: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens of rows of one length, `[rows, kv_heads, length, dim]`, from pages
    `[entries, kv_heads, page_size, dim]` and a block table.
    """
    chosen = pages[table.long()]  # [rows, width, heads, slots, dim]
    return chosen.transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
