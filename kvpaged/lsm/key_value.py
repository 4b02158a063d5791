"""`KeyValueCache`: a store for who comes from memcached."""

import os
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import ConfigError, IntegrityError
from kvpaged.lsm.lookup import OnDamage
from kvpaged.lsm.store import TensorStore

Plain: TypeAlias = str | bytes | int | Tensor
TEXT, BYTES, INT, TENSOR = "str", "bytes", "int", "tensor"


class KeyValueCache:
    """Text, bytes, whole numbers and tensors by key, on disk, bounded, kept across runs. What was
    not asked for longest goes when there is no room. Nothing is pickled. Any thread may call.

    Args:
        path: of a directory, which is made.
        max_bytes: of all its files, bytes or a string like `"10GiB"`.
        others: what `TensorStore` takes.

    Values that are damaged on disk count as not there, and are forgotten.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int | str | None = "1GiB", **others: Any
    ):
        self.store = TensorStore(path, max_bytes=max_bytes, **others)

    def set_key(self, key: str | bytes, value: Plain, *, ttl: float | None = None) -> None:
        """Put a value in place of what is there; it expires in `ttl` seconds, or never.

        Raises:
            ConfigError: the key or the value is of another type, or empty where it may not be.
            StorageError: the disk refuses.
        """
        self.store.put(_key(key), _pack(value), ttl=ttl)

    def get_key(self, key: str | bytes, default: Any = None) -> Any:
        """The value as it was put, or `default` where there is none."""
        damaged: OnDamage = "miss"
        found = self.store.get(_key(key), damaged=damaged)
        return default if found is None else _unpack(found)

    def update_key(self, key: str | bytes, value: Plain, *, ttl: float | None = None) -> bool:
        """`set_key`, only if there is a value; whether there was."""
        return self.store.replace(_key(key), _pack(value), ttl=ttl)

    def delete_key(self, key: str | bytes) -> bool:
        """Delete a value; whether there was one."""
        return self.store.delete(_key(key))

    def __contains__(self, key: str | bytes) -> bool:
        return self.store.contains(_key(key))

    def __len__(self) -> int:
        return len(self.store)

    def close(self) -> None:
        """See `TensorStore.close`."""
        self.store.close()

    def __enter__(self) -> "KeyValueCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def _key(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _pack(value: Plain) -> dict[str, Tensor]:
    """The value as a tensor under the name of its type."""
    if isinstance(value, Tensor):
        return {TENSOR: value}
    if isinstance(value, str):
        return {TEXT: _tensor(value.encode())}
    if isinstance(value, bytes):
        return {BYTES: _tensor(value)}
    if isinstance(value, int) and not isinstance(value, bool):
        return {INT: _tensor(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))}
    raise ConfigError(f"a value is str, bytes, int or a tensor, not {type(value).__name__}")


def _tensor(raw: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8))


def _unpack(found: Tensor | dict[str, Tensor]) -> Plain:
    """What `_pack` packed.

    Raises:
        IntegrityError: something else put it.
    """
    if isinstance(found, Tensor) or len(found) != 1:
        raise IntegrityError("the value was not put by a KeyValueCache")
    ((kind, tensor),) = found.items()
    if kind == TENSOR:
        return tensor
    raw = tensor.numpy().tobytes()
    if kind == TEXT:
        return raw.decode()
    if kind == BYTES:
        return raw
    if kind == INT:
        return int.from_bytes(raw, "little", signed=True)
    raise IntegrityError(f"a value of type {kind!r} was not put by a KeyValueCache")
