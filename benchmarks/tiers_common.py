"""What benchmarks of tiers share: one document in parts, the page cache, what a disk gives."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from kvpaged.bench.common import PAGE_SIZE

NAME = "tiers"
"""Of the document."""


def page_bytes(dtype: torch.dtype) -> int:
    """Of a page of SmolLM2: 30 layers, K and V, 3 heads of 64 numbers."""
    return 30 * 2 * 3 * PAGE_SIZE * 64 * dtype.itemsize


def publish_part(part: str, document: Mapping[str, Any], folder: Path) -> Path:
    """Write `document` as a part of `folder/tiers.json`, whose other parts stay as they are, and
    print it as the last line of stdout.
    """
    file = folder / f"{NAME}.json"
    whole = json.loads(file.read_text()) if file.exists() else {"benchmark": NAME}
    kept = json.dumps({**whole, part: document}, indent=1) + "\n"
    common.publish(NAME, document, folder)
    file.write_text(kept)
    return file


def drop_page_cache(folder: Path) -> int:
    """Have the system forget what it keeps in memory of files below a folder (what no process has
    mapped), so that they are read from the disk again; the bytes of them.
    """
    size = 0
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                size += os.fstat(handle).st_size
            finally:
                os.close(handle)
    return size


def read_bandwidth(folder: Path, *, megabytes: int, repeat: int = 3) -> dict[str, float]:
    """Bytes a second of one thread that reads a file from the disk, and from the page cache."""
    file = folder / "bandwidth"
    room = bytearray(megabytes << 20)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file.write_bytes(os.urandom(1 << 20) * megabytes)

        def read() -> None:
            with open(file, "rb", buffering=0) as handle:
                while handle.readinto(memoryview(room)[handle.tell() :]):
                    pass

        times = []
        for _ in range(repeat):
            drop_page_cache(folder)
            start = common.clock()
            read()
            times.append(common.clock() - start)
        again = common.seconds(read, repeat=repeat)
    finally:
        file.unlink(missing_ok=True)
    return {
        "disk_bytes_s": len(room) / sorted(times)[len(times) // 2],
        "page_cache_bytes_s": len(room) / again,
    }
