"""What a store says of itself and of its values."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from kvpaged.lsm.keeper import Keeper
from kvpaged.lsm.layout import Entry
from kvpaged.lsm.reader import ReadCounts
from kvpaged.lsm.tree import Found, InLog, Tree
from kvpaged.lsm.writer import Writer


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One tensor of a value: what it is, how it is stored (codec by id), and the gain."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    stored: int
    codec: int


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """What is known of a value without reading it.

    Attributes:
        key, parent: bytes; the parent is empty for none.
        single: a tensor was put, not a dict.
        metadata: what was put with it.
        parts: its tensors.
        nbytes, stored: of all tensors, decoded and as they are stored.
        expires: milliseconds since 1970, or 0.
        file: where it lies; `offset` in bytes.
    """

    key: bytes
    parent: bytes
    single: bool
    metadata: dict[str, Any]
    parts: tuple[PartInfo, ...]
    nbytes: int
    stored: int
    expires: int
    file: str
    offset: int


def info_of(found: Found) -> ValueInfo:
    """Of a value that was found."""
    entry = found.entry
    name = found.log.name if isinstance(found, InLog) else found.segment.name
    return ValueInfo(
        entry.key, entry.parent, entry.single, metadata_of(entry),
        tuple(
            PartInfo(form.name, form.dtype, form.shape, form.nbytes, part.stored, part.codec)
            for form, part in zip(entry.forms, entry.parts, strict=True)
        ),
        entry.nbytes, entry.stored, entry.expires, name, entry.offset,
    )  # fmt: skip


def metadata_of(entry: Entry) -> dict[str, Any]:
    """Of an entry."""
    return dict(json.loads(entry.metadata)) if entry.metadata else {}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file: its level (`None`: not sealed), values written and alive, and their bytes."""

    file: str
    level: int | None
    values: int
    live: int
    bytes: int
    live_bytes: int


def files_of(tree: Tree) -> list[FileInfo]:
    """All of them, by name; under the store's lock."""
    segments = [
        FileInfo(s.name, s.level, s.written, s.live_values, s.file_bytes, s.live_bytes)
        for s in tree.segments.values()
    ]
    logs = [
        FileInfo(g.name, None, g.written, len(g.live), g.end, g.live_bytes) for g in tree.logs()
    ]
    return sorted([*segments, *logs], key=lambda one: one.file)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStats:
    """A store in figures; what counts events counts them since it was opened.

    Attributes:
        values, live_bytes: that can be found, and what they take up on disk.
        used_bytes, max_bytes: of all files (with what compaction is writing), and the bound.
        segments, levels, logs: sealed files, how many of each level, and files not sealed yet.
        pending_bytes, memory_bytes: not written yet, and of the memtable's memory.
        hits, misses: keys asked for.
        asked_bytes, read_bytes, requests, runs: bytes of tensors read, of files, calls, and
            contiguous pieces.
        viewed, from_memory: values handed out where they lie, or still in memory.
        puts, deletes, put_bytes, tensor_bytes: that came; bytes as stored and as tensors.
        written_bytes: to logs, indexes, by compaction, and of manifests.
        compactions, compacted_bytes, recoded, recoded_bytes: tasks, bytes they wrote, values
            that became colder, and what that saved.
        evicted, evicted_bytes, expired, dropped: values that went for lack of room, and their
            bytes; whose time was over; that were found and could not be written (durability none).
        stalls, refused: puts that waited, and that waited in vain.
        damaged: reads of values that were not what their checksums say.
        damage: what was wrong when it was opened.
        error: why the disk refuses at present, if it does.
    """

    values: int
    live_bytes: int
    used_bytes: int
    max_bytes: int | None
    segments: int
    levels: dict[int, int]
    logs: int
    pending_bytes: int
    memory_bytes: int
    hits: int
    misses: int
    asked_bytes: int
    read_bytes: int
    requests: int
    runs: int
    viewed: int
    from_memory: int
    damaged: int
    damage: tuple[str, ...]
    puts: int = 0
    deletes: int = 0
    put_bytes: int = 0
    tensor_bytes: int = 0
    written_bytes: int = 0
    compactions: int = 0
    compacted_bytes: int = 0
    recoded: int = 0
    recoded_bytes: int = 0
    evicted: int = 0
    evicted_bytes: int = 0
    expired: int = 0
    dropped: int = 0
    stalls: int = 0
    refused: int = 0
    error: str | None = None

    @property
    def write_amplification(self) -> float:
        """Bytes written to disk for each byte put, as it is stored."""
        return self.written_bytes / self.put_bytes if self.put_bytes else 0.0

    @property
    def space_amplification(self) -> float:
        """Bytes of files for each that lives."""
        return self.used_bytes / self.live_bytes if self.live_bytes else 0.0

    @property
    def read_amplification(self) -> float:
        """Bytes read from files for each byte of a tensor; below 1 where it was coded."""
        return self.read_bytes / self.asked_bytes if self.asked_bytes else 0.0

    @property
    def compression(self) -> float:
        """Bytes of tensors put for each byte stored."""
        return self.tensor_bytes / self.put_bytes if self.put_bytes else 0.0


def collect(
    tree: Tree, reads: ReadCounts, writer: Writer | None, keeper: Keeper | None
) -> StoreStats:
    """The figures; under the store's lock."""
    logs = list(tree.logs())
    own: dict[str, Any] = {}
    if writer is not None and keeper is not None:
        counts, merges = writer.counts, keeper.compactor.merger.counts
        own = {
            "puts": counts.puts, "deletes": counts.deletes, "put_bytes": counts.put_bytes,
            "tensor_bytes": counts.tensor_bytes, "dropped": counts.dropped,
            "stalls": counts.stalls, "refused": counts.refused,
            "written_bytes": counts.log_bytes + keeper.sealed_bytes + keeper.manifest_bytes
            + merges.written_bytes,
            "compactions": merges.tasks, "compacted_bytes": merges.written_bytes,
            "recoded": merges.recoded, "recoded_bytes": merges.recoded_bytes,
            "evicted": keeper.evicted, "evicted_bytes": keeper.evicted_bytes,
            "expired": keeper.expired + keeper.compactor.expired, "error": keeper.error,
        }  # fmt: skip
    return StoreStats(
        values=tree.live_values, live_bytes=tree.live_bytes, used_bytes=tree.used_bytes(),
        max_bytes=None if keeper is None else keeper.options.max_bytes,
        segments=len(tree.segments),
        levels=dict(sorted(Counter(s.level for s in tree.segments.values()).items())),
        logs=len(logs), pending_bytes=tree.pending_bytes(),
        memory_bytes=sum(log.slab_bytes() for log in logs),
        hits=reads.hits, misses=reads.misses, asked_bytes=reads.asked_bytes,
        read_bytes=reads.read_bytes, requests=reads.requests, runs=reads.runs, viewed=reads.viewed,
        from_memory=reads.from_memory, damaged=reads.damaged, damage=tuple(tree.damage), **own,
    )  # fmt: skip
