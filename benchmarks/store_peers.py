"""What `benchmarks.store` measures beside each other: ours and its peers behind one small face.

Tensors of one dtype and size by key, put in batches, read into buffers, or looked at where they lie
in memory. A peer that is not installed is left out by name.
"""

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpaged.lsm.options import Durability, StoreOptions
from kvpaged.lsm.store import TensorStore

THREADS = 16
"""Reads in flight, of each that can have several."""
MAP_BYTES = 4 << 30


class System(Protocol):
    """A store of bf16 tensors of one size, open."""

    def put(self, items: Sequence[tuple[bytes, Tensor]]) -> None:
        """Put them in one batch; return when they are as durable as was asked for."""

    def read(self, keys: Sequence[bytes], into: Sequence[Tensor]) -> None:
        """Copy values into tensors."""

    def view(self, keys: Sequence[bytes]) -> list[Tensor]:
        """The values, not copied where that can be; valid until the next call."""

    def has(self, key: bytes) -> bool:
        """Whether there is one."""

    def close(self) -> None:
        """All that was put can be read by the next that opens it."""


def as_bf16(raw: Any) -> Tensor:
    """A buffer as the tensor that was put: what a user of a store of bytes has to do."""
    return torch.frombuffer(raw, dtype=torch.bfloat16)


def raw_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.view(torch.uint8).numpy().data


class Ours:
    """`TensorStore`; nothing of it is set but durability and codec."""

    def __init__(self, path: Path, *, power: bool, codec: str = "raw"):
        durability: Durability = "power" if power else "process"
        options = StoreOptions(codec=codec, durability=durability, read_threads=THREADS)
        self.store = TensorStore(path, options=options)

    def put(self, items: Sequence[tuple[bytes, Tensor]]) -> None:
        """See `System`."""
        self.store.put_many(dict(items))

    def read(self, keys: Sequence[bytes], into: Sequence[Tensor]) -> None:
        """See `System`."""
        self.store.get_many(keys, out=into)

    def view(self, keys: Sequence[bytes]) -> list[Tensor]:
        """See `System`."""
        return self.store.view_many(keys)

    def has(self, key: bytes) -> bool:
        """See `System`."""
        return self.store.contains(key)

    def close(self) -> None:
        """See `System`."""
        self.store.close()


class Lmdb:
    """LMDB: a transaction a batch; synced only for `power`."""

    def __init__(self, path: Path, *, power: bool):
        import lmdb

        with warnings.catch_warnings():  # once a process: its memory cannot be written to
            warnings.simplefilter("ignore")
            as_bf16(bytes(2))
        self._env = lmdb.open(str(path), map_size=MAP_BYTES, sync=power, metasync=power)
        self._txn: Any = None

    def put(self, items: Sequence[tuple[bytes, Tensor]]) -> None:
        """See `System`."""
        with self._env.begin(write=True) as txn:
            for key, tensor in items:
                txn.put(key, raw_of(tensor))

    def _reading(self) -> Any:
        if self._txn is None:
            self._txn = self._env.begin(buffers=True)
        return self._txn

    def read(self, keys: Sequence[bytes], into: Sequence[Tensor]) -> None:
        """See `System`."""
        txn = self._reading()
        for key, out in zip(keys, into, strict=True):
            raw_of(out)[:] = txn.get(key)

    def view(self, keys: Sequence[bytes]) -> list[Tensor]:
        """See `System`."""
        txn = self._reading()
        return [as_bf16(txn.get(key)) for key in keys]

    def has(self, key: bytes) -> bool:
        """See `System`."""
        return self._reading().get(key) is not None

    def close(self) -> None:
        """See `System`."""
        if self._txn is not None:
            self._txn.abort()
        self._env.close()


class Rocks:
    """RocksDB with its own files for large values, uncompressed; the log synced for `power`."""

    def __init__(self, path: Path, *, power: bool):
        import rocksdict

        options = rocksdict.Options(raw_mode=True)
        options.set_compression_type(rocksdict.DBCompressionType.none())
        options.set_enable_blob_files(True)
        options.set_min_blob_size(4096)
        self._writing = rocksdict.WriteOptions()
        self._writing.sync = power
        self._batch: Callable[[], Any] = lambda: rocksdict.WriteBatch(raw_mode=True)
        self._db = rocksdict.Rdict(str(path), options)

    def put(self, items: Sequence[tuple[bytes, Tensor]]) -> None:
        """See `System`."""
        batch = self._batch()
        for key, tensor in items:
            batch.put(key, bytes(raw_of(tensor)))
        self._db.write(batch, self._writing)

    def read(self, keys: Sequence[bytes], into: Sequence[Tensor]) -> None:
        """See `System`."""
        for raw, out in zip(self._db.get(list(keys)), into, strict=True):
            raw_of(out)[:] = raw

    def view(self, keys: Sequence[bytes]) -> list[Tensor]:
        """See `System`; its values are always copies."""
        return [as_bf16(bytearray(raw)) for raw in self._db.get(list(keys))]

    def has(self, key: bytes) -> bool:
        """See `System`."""
        return self._db.get(key) is not None

    def close(self) -> None:
        """See `System`."""
        self._db.flush()
        self._db.close()


class OneFile:
    """A file for each value, in a folder of 256, as disk caches of inference engines do."""

    def __init__(self, path: Path, *, power: bool):
        self._path, self._power = path, power
        self._pool = ThreadPoolExecutor(THREADS)
        for number in range(256):
            (path / f"{number:02x}").mkdir(parents=True, exist_ok=True)

    def _file(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._path}/{name[:2]}/{name}"

    def _write(self, item: tuple[bytes, Tensor]) -> None:
        fd = os.open(self._file(item[0]), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(fd, raw_of(item[1]))
            if self._power:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _read(self, key: bytes, into: memoryview) -> None:
        fd = os.open(self._file(key), os.O_RDONLY)
        try:
            os.readv(fd, [into])
        finally:
            os.close(fd)

    def put(self, items: Sequence[tuple[bytes, Tensor]]) -> None:
        """See `System`."""
        list(self._pool.map(self._write, items))

    def read(self, keys: Sequence[bytes], into: Sequence[Tensor]) -> None:
        """See `System`."""
        list(self._pool.map(self._read, keys, map(raw_of, into)))

    def view(self, keys: Sequence[bytes]) -> list[Tensor]:
        """See `System`; mapping a file that is read once costs more than reading it."""
        return [as_bf16(bytearray(Path(self._file(key)).read_bytes())) for key in keys]

    def has(self, key: bytes) -> bool:
        """See `System`."""
        return os.path.exists(self._file(key))

    def close(self) -> None:
        """See `System`."""
        self._pool.shutdown()


class OursLossless(Ours):
    """The store with the codec it has by default."""

    def __init__(self, path: Path, *, power: bool):
        super().__init__(path, power=power, codec="lossless")


SYSTEMS: dict[str, Callable[..., System]] = {
    "ours": Ours,
    "ours, lossless": OursLossless,
    "LMDB": Lmdb,
    "RocksDB": Rocks,
    "file a value": OneFile,
}
PEERS = ("LMDB", "RocksDB", "file a value")
NEEDS = {"LMDB": "lmdb", "RocksDB": "rocksdict"}


def missing() -> list[str]:
    """What cannot be measured here, because it is not installed."""
    absent = [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None]
    return absent if shutil.which("fio") else [*absent, "fio"]
