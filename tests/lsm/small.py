"""Small stores on disks that fail, and values that tell which they are."""

from typing import Any

import torch
from torch import Tensor

from kvpaged.lsm.options import StoreOptions
from kvpaged.lsm.store import TensorStore
from kvpaged.testing.faulty_files import FaultyFiles

KIB = 1 << 10


class Clock:
    """Milliseconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


def options(**changes: Any) -> StoreOptions:
    """No threads, small files: everything happens in the calls that need it."""
    given: dict[str, Any] = {
        "background": False, "memtable_bytes": 256 * KIB, "segment_bytes": 96 * KIB,
        "codec": "raw", "read_threads": 1, "clock": Clock(),
    }  # fmt: skip
    return StoreOptions(**{**given, **changes})


def open_store(files: FaultyFiles, **changes: Any) -> TensorStore:
    read_only = changes.pop("read_only", False)
    return TensorStore("unused", files=files, options=options(**changes), read_only=read_only)


def value(number: int, size: int = 100) -> Tensor:
    """`size` numbers that say which value they are."""
    return torch.arange(number, number + size, dtype=torch.int32)


def number_of(found: Any) -> int | None:
    """Which value it is, whole; `None` for none."""
    if found is None:
        return None
    number = int(found[0])
    assert torch.equal(found, value(number, len(found)))
    return number
