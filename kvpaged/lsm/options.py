"""Options of a store: one main dial (`max_bytes`), the rest derived or defaulted."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kvpaged.codecs import codec
from kvpaged.errors import ConfigError
from kvpaged.lsm.compaction import budget
from kvpaged.lsm.layout import BLOCK

Durability = Literal["none", "process", "power"]
DURABILITIES: tuple[Durability, ...] = ("none", "process", "power")
LEAST_LIVE = 16 * BLOCK
"""Bytes that a bound must leave for values: the smallest put asks for eleven blocks."""
SEGMENT_BYTES = 256 << 20
SEGMENTS = 16
"""A bounded store has at least so many segments, so that rewriting one needs little room."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """What a store is opened with. None of it is stored: the next opening may have others.

    Attributes:
        max_bytes: bytes of all its files together, never exceeded; `None`: as many as come. Values
            can be three quarters of it, and more from 4 GiB (85 % of 16 GiB) on; less below
            16 MiB, half of 1 MiB and a fifth of 500,000: the rest is kept free for compaction
            (`compaction.budget`, `docs/format.md`). A call that comes with more is refused.
        codec: how tensors are coded that are put: `"raw"`, `"zstd"`, `"lossless"`, or one that was
            registered. What gains less than 3 % is stored raw.
        durability: when a put returns: `"none"` (in memory; written within 50 ms), `"process"`
            (written: survives kill -9), `"power"` (synced: survives a loss of power).
        memtable_bytes: unwritten bytes, at most, unless a single call has more; as many of the
            active file are kept in memory to be read.
        segment_bytes: of a file, at most, unless a single call has more. `None`: 256 MiB, and at
            most a sixteenth of `max_bytes`.
        max_stall_s: how long a put may wait for room or for the disk before it is refused. Without
            `background` nothing is waited for: the put makes room itself, however long that takes.
        read_threads: requests in flight of one store; 1: no threads, the caller reads.
        direct: large reads pass by the page cache. Turn it off where the same values are read over
            and over and memory is free for them.
        background: threads of the store seal files, compact and evict. Without them that happens in
            the calls that need it: for tests, and for single-threaded programs.
        compact_bytes_per_s: what compaction writes a second, at most, while no put waits for it.
        cold_codec: how compaction recodes what was not asked for in `cold_after_s` seconds; `None`:
            not at all.
        clock: milliseconds since 1970.
    """

    max_bytes: int | None = None
    codec: str = "lossless"
    durability: Durability = "process"
    memtable_bytes: int = 64 << 20
    segment_bytes: int | None = None
    max_stall_s: float = 30.0
    read_threads: int = 16
    direct: bool = True
    background: bool = True
    compact_bytes_per_s: int | None = None
    cold_codec: str | None = None
    cold_after_s: float = 3600.0
    clock: Callable[[], int] = now_ms

    def __post_init__(self) -> None:
        if self.durability not in DURABILITIES:
            raise ConfigError(f"durability is one of {DURABILITIES}, not {self.durability!r}")
        for name in (self.codec, self.cold_codec):
            if name is not None:
                codec(name)
        for name in ("memtable_bytes", "file_bytes", "read_threads", "max_stall_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_bytes is not None:
            live = 0
            if 0 < self.file_bytes <= self.max_bytes:
                live = budget(self.max_bytes, self.file_bytes, 0).live
            if live < LEAST_LIVE:
                raise ConfigError(
                    f"max_bytes of {self.max_bytes:,}, with files of {self.file_bytes:,}, leaves "
                    f"{max(0, live):,} for values; {LEAST_LIVE:,} are the least"
                )
        if self.compact_bytes_per_s is not None and self.compact_bytes_per_s <= 0:
            raise ConfigError(f"compact_bytes_per_s: {self.compact_bytes_per_s} is not positive")

    @property
    def file_bytes(self) -> int:
        """Bytes of a full segment."""
        if self.segment_bytes is not None:
            return self.segment_bytes
        most = SEGMENT_BYTES if self.max_bytes is None else self.max_bytes // SEGMENTS
        return min(SEGMENT_BYTES, most)
