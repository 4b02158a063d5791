"""Records on disk, in a `TensorStore`."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kvpaged.config import parse_bytes
from kvpaged.errors import ConfigError
from kvpaged.lsm.batch import Put
from kvpaged.lsm.compaction import budget
from kvpaged.lsm.eviction import lru_except
from kvpaged.lsm.files import Files
from kvpaged.lsm.layout import BLOCK, Entry
from kvpaged.lsm.options import Durability, StoreOptions
from kvpaged.lsm.store import TensorStore
from kvpaged.tiers.base import KEPT, Demotion, Record, Stored, Tier, Usage, check_records
from kvpaged.tiers.record import dtype_of

HEAD, BODY = "head", "kv"
REFRESH_S = 1.0
"""How often a reader looks again, at most, for keys that were not there."""
OVERHEAD = 16 * BLOCK
"""More than a record takes of the store beyond its body and twice its head."""


class DiskTier(Tier):
    """Records in a store on disk, which gives up what was not read or put for longest.

    Each is a value of two tensors, `kv`, the body in the dtype that its head names, else uint8, so
    that codecs know what the numbers are, and `head`, uint8 (docs/format.md). Raw bodies are read
    straight into rooms whose address is a multiple of 4,096. What is damaged is no longer there,
    and named in `gone`.

    Any thread may call; the store reads and writes with threads of its own.

    Args:
        path: a directory, `~` is the home; made if it is not there.
        bytes: what all files take up at most, an int or text like `"100GiB"`; about three quarters
            can be records (`StoreOptions.max_bytes`). `None`: as much as comes.
        policy: see `Tier`.
        codec: how bodies are stored, see `StoreOptions.codec`: `"raw"` is read straight to where it
            belongs, `"lossless"` saves a fifth to a third of the bytes.
        durability: when a put returns, see `StoreOptions.durability`: by default what is put
            survives kill -9.
        read_only: read what another process puts there: `put` keeps nothing, `delete` deletes
            nothing, and `gone` tells of damage only. What has come is seen by `scan`, and by `read`
            when a key is missing and a second has passed since it last looked.
        options: the store's other dials; what is said above goes first.
        files: the file system, for tests.
        clock: seconds.

    Raises:
        StorageError, IntegrityError, ConfigError: see `TensorStore`.
    """

    name = "disk"
    persistent = True

    def __init__(
        self, path: str | os.PathLike[str], bytes: int | str | None, *,
        policy: Demotion = "write-through", codec: str = "raw", read_only: bool = False,
        durability: Durability = "process", options: StoreOptions | None = None,
        files: Files | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy = policy
        self.read_only = read_only
        self._clock = clock
        self._looked = clock()
        most = None if bytes is None else parse_bytes(bytes)
        dials = replace(
            options or StoreOptions(), max_bytes=most, codec=codec, durability=durability
        )
        self._capacity = most
        self._largest = None if most is None else budget(most, dials.file_bytes, 0).live
        self.store = TensorStore(
            Path(path).expanduser(), read_only=read_only, options=dials, policy=lru_except(KEPT),
            on_gone=self.gone.append, files=files,
        )  # fmt: skip

    def put(self, records: Sequence[Record]) -> list[bool]:
        """See `Tier.put`. Raises `StorageError` if the disk refuses, or has no room in time."""
        check_records(records)
        if self.read_only:
            return [False] * len(records)
        there = self.store.touch_many([record.key for record in records])
        fits = [is_there or self._fits(r) for is_there, r in zip(there, records, strict=True)]
        coming = [
            Put(r.key, _value(r), None, r.parent)
            for r, is_there, fit in zip(records, there, fits, strict=True)
            if fit and not is_there
        ]
        if coming:
            self.store.add_many(coming)
        return fits

    def _fits(self, record: Record) -> bool:
        size = record.body.numel() + 2 * len(record.head) + OVERHEAD
        return self._largest is None or size <= self._largest

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        """See `Tier.read`. All are read by one call, into `room`.

        Raises:
            ConfigError: there is less room than a record has bytes; nothing was read.
        """
        records = self._read(keys, room)
        missing = [n for n, record in enumerate(records) if record is None]
        if missing and self._look(patient=False):
            again = self._read([keys[n] for n in missing], [room[n] for n in missing])
            for number, record in zip(missing, again, strict=True):
                records[number] = record
        yield records

    def _read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> list[Record | None]:
        out = [partial(_destination, one) for one in room]
        values = self.store.get_many(keys, out=out, damaged="miss")
        return [
            None if value is None else _record(key, value, one)
            for key, value, one in zip(keys, values, room, strict=True)
        ]

    def _look(self, *, patient: bool) -> bool:
        """See what another process has put; whether it was time to."""
        if not self.read_only or (not patient and self._clock() - self._looked < REFRESH_S):
            return False
        self.store.refresh()
        self._looked = self._clock()
        return True

    def delete(self, keys: Sequence[bytes]) -> None:
        """See `Tier.delete`. Raises `StorageError` if the disk refuses."""
        if not self.read_only:
            self.store.delete_many(keys)

    def scan(self) -> Iterator[Stored]:
        """See `Tier.scan`."""
        self._look(patient=True)
        found = sorted((entry.sequence, _stored(entry)) for entry in self.store.entries())
        return (stored for _, stored in found)

    def usage(self) -> Usage:
        """See `Tier.usage`."""
        return Usage(len(self.store), self.store.live_bytes, self._capacity)

    def check_integrity(self) -> None:
        """Check the store's books; raises `IntegrityError`, naming the first thing that is off."""
        self.store.check_integrity()

    def close(self) -> None:
        """See `Tier.close`: all that was put is in sealed files. Raises `StorageError`."""
        self.store.close()


def _value(record: Record) -> dict[str, Tensor]:
    body, dtype = record.body.detach().contiguous(), dtype_of(record.head)
    if dtype is not None and body.numel() % dtype.itemsize == 0:
        body = (body if _aligned(body, dtype) else body.clone()).view(dtype)
    head = torch.frombuffer(bytearray(record.head), dtype=torch.uint8) if record.head else _NONE
    return {BODY: body, HEAD: head}


_NONE = torch.empty(0, dtype=torch.uint8)


def _destination(room: Tensor, entry: Entry) -> dict[str, Tensor]:
    """Where the parts of a record go: the body to the beginning of `room`."""
    head, body = (next((f for f in entry.forms if f.name == name), None) for name in (HEAD, BODY))
    if head is None or body is None:
        raise ConfigError(f"{entry.key.hex()} is no record: it has {[f.name for f in entry.forms]}")
    if body.nbytes > room.numel():
        raise ConfigError(
            f"the record {entry.key.hex()} has {body.nbytes:,} bytes, the room {room.numel():,}"
        )
    into = room[: body.nbytes]
    if _aligned(into, body.dtype):
        into = into.view(body.dtype)
    else:  # by way of memory of its own
        into = torch.empty(body.nbytes // body.dtype.itemsize, dtype=body.dtype)
    return {BODY: into, HEAD: torch.empty(head.nbytes, dtype=torch.uint8)}


def _aligned(tensor: Tensor, dtype: torch.dtype) -> bool:
    size = dtype.itemsize
    return tensor.data_ptr() % size == 0 and tensor.storage_offset() % size == 0


def _record(key: bytes, value: dict[str, Tensor], room: Tensor) -> Record:
    body = value[BODY].view(torch.uint8)
    if body.numel() and body.data_ptr() != room.data_ptr():
        body = room[: body.numel()].copy_(body)
    return Record(key, value[HEAD].numpy().tobytes(), body)


def _stored(entry: Entry) -> Stored:
    sizes = {form.name: form.nbytes for form in entry.forms}
    return Stored(entry.key, sizes.get(HEAD, 0), sizes.get(BODY, 0))
