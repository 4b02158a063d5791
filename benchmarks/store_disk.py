"""The disk under `benchmarks.store`: its ceiling as fio finds it, and forgetting what was read."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

DEPTH = 16
"""Requests in flight."""


def fio(file: Path, way: str, *, size: int, block: int, sync_every: int | None = None) -> float:
    """Bytes a second that fio reaches with direct I/O.

    Args:
        file: what it writes, or reads if it is there.
        way: `write` or `randread`.
        size: bytes in all.
        block: bytes of each request.
        sync_every: bytes after which it syncs; `None`: never.
    """
    command = [
        "fio", "--name=ceiling", f"--filename={file}", f"--rw={way}", f"--bs={block}",
        f"--size={size}", f"--iodepth={DEPTH}", "--ioengine=libaio", "--direct=1",
        "--output-format=json",
    ]  # fmt: skip
    if sync_every is not None:
        command.append(f"--fdatasync={max(1, sync_every // block)}")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    job: dict[str, Any] = json.loads(done.stdout)["jobs"][0]
    return float(job["write" if way == "write" else "read"]["bw_bytes"])


def forget(folder: Path) -> None:
    """Everything under it is on disk, and none of it in the page cache."""
    for file in [one for one in sorted(folder.rglob("*")) if one.is_file()]:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def file_bytes(folder: Path) -> int:
    """What all files under it take up on disk."""
    return sum(512 * one.stat().st_blocks for one in folder.rglob("*") if one.is_file())


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and those of files that it has mapped."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(lines[f"Rss{name}"].split()[0]) for name in ("Anon", "File")}
