"""What every benchmark shares: one timer, alternation of peers, medians, the environment, reports.

A number of one system means little on a shared machine. So peers run in turn within one process,
ratios are taken round by round, and the median over rounds is what is printed.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

import kvpaged

PAGE_SIZE = 64
"""Tokens a page, for every system that has pages."""

T = TypeVar("T")


def clock() -> float:
    """Seconds on the one timer all benchmarks use, after whatever the GPU still had to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object], *, repeat: int = 5, warmup: int = 1) -> float:
    """The median time of `call`, over `repeat` calls after `warmup` untimed ones."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeat):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times)


def alternate(
    cases: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    done: Callable[[int, str, T], None] | None = None,
) -> dict[str, list[T]]:
    """Run every case once a round, each round starting with another case.

    Args:
        cases: name to the measured call, which returns its own measurement.
        rounds: how many measurements each case gets.
        done: told round, name and measurement after each call.

    Returns:
        For each name its `rounds` measurements; index i of all of them is round i.
    """
    names = list(cases)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            measured = cases[name]()
            results[name].append(measured)
            if done is not None:
                done(number, name, measured)
    return results


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median over rounds of ours / theirs in the same round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the rounds, to six digits, as they go into a document."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{figure:.6g}") for name, figure in figures.items()}


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Hardware, versions and commit: what a reader needs to judge or repeat a number."""
    device = torch.device(device)
    where: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "device": str(device),
        "kvpaged": kvpaged.__version__,
    }
    for package in ("torch", "triton", "transformers"):
        where[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where["gpu"] = properties.name
        where["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        where["cuda"] = torch.version.cuda
    return where


def describe(where: Mapping[str, Any]) -> str:
    """One line of `environment()` for people."""
    machine = where.get("gpu") or f"{where['cpu']}, {where['cores']} cores"
    versions = f"torch {where['torch']}, transformers {where['transformers']}"
    ours = f"commit {where['commit']}"
    if where["commit"] == "unknown" and "kvpaged" in where:
        ours = f"kvpaged {where['kvpaged']}"
    return f"{machine}; {versions}; {ours}; {where['date']}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def publish(name: str, document: Mapping[str, Any], folder: Path) -> Path:
    """Write `document` to `folder/name.json` and print it as the last line of stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    file.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.flush()
    print(json.dumps(document, separators=(",", ":")), flush=True)
    return file


def _commit() -> str:
    """Of the tree this file belongs to; an installed copy has none, wherever it lies."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        except OSError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if not git("ls-files", Path(__file__).name):
        return "unknown"
    commit = git("rev-parse", "--short", "HEAD")
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
