"""What a tier is: it keeps records by key, in batches, and answers in order.

Whoever owns it (the mover) owns concurrency too: it calls from one thread at a time, but for
`usage`, with a deadline of its own, and stops asking a tier that does not answer.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kvpaged.errors import ConfigError, KVPagedError

MOST_KEY = 255
MOST_HEAD = 64 << 10

Demotion = Literal["write-through", "write-back", "second-use"]
DEMOTIONS: tuple[Demotion, ...] = ("write-through", "write-back", "second-use")


class Record(NamedTuple):
    """Bytes under a key; what they mean is not the tier's business.

    Attributes:
        key: 1 to 255 bytes. Bytes under a key never change: who puts a key again puts the same.
        head: what the record says of itself (`tiers.record.Head`); at most 64 KiB.
        body: uint8 `[bytes]` on the CPU, contiguous unless it is put; may be empty.
        parent: the key of the record this one follows, empty for none: a hint, to lie beside it;
            what is read has none.
    """

    key: bytes
    head: bytes
    body: Tensor
    parent: bytes = b""


def check_records(records: Sequence[Record]) -> None:
    """Raise `ConfigError` unless each is what `Record` says; at any stride, for a copy is made."""
    for key, head, body, _ in records:
        if not 0 < len(key) <= MOST_KEY:
            raise ConfigError(f"a key has 1 to {MOST_KEY} bytes, not {len(key):,}")
        if len(head) > MOST_HEAD:
            raise ConfigError(f"a head has up to {MOST_HEAD:,} bytes, not {len(head):,}")
        if body.dtype != torch.uint8 or body.dim() != 1 or not body.is_cpu:
            raise ConfigError(
                f"a body is uint8 [bytes] on the CPU, not {body.dtype} {tuple(body.shape)} on "
                f"{body.device}"
            )


class TierDownError(KVPagedError):
    """A tier is not asked at present: it failed, or was too slow, and its time is not over."""


class Usage(NamedTuple):
    """What a tier holds, by its own count.

    Attributes:
        records: how many.
        bytes: that they take up, bodies and heads as they are stored with what goes with them; 0
            for no records.
        capacity: bytes it may take, or `None`.
    """

    records: int
    bytes: int
    capacity: int | None


class Stored(NamedTuple):
    """What `scan` tells of a record: its key, the bytes of its head and of its body."""

    key: bytes
    head_bytes: int
    body_bytes: int


KEPT = b"s"
"""Keys that begin so (saved sessions) are never given up by a tier by itself."""


class Tier(ABC):
    """Keeps records. Any method may raise any exception when it fails, and may then be called
    again: its owner takes it for a miss. What `put` returned True for, later reads find, with those
    very bytes, until it is deleted or named in `gone`.

    Attributes:
        name: in statistics and messages.
        policy: when pages come here: `"write-through"`: as soon as they are full; `"write-back"`:
            before they leave the level above; `"second-use"`: as soon as they are used again.
        persistent: what it holds outlives the process.
        gone: keys it has given up by itself (no room, damage), oldest first; its owner takes them
            out. Appending and taking are atomic, so a thread of the tier's own may append. A key
            that was put again before its owner took it out may be there all the same.
    """

    name: str = "tier"
    policy: Demotion = "write-back"
    persistent: bool = False

    def __init__(self) -> None:
        self.gone: deque[bytes] = deque()

    @abstractmethod
    def put(self, records: Sequence[Record]) -> list[bool]:
        """Keep records, giving up others that were not read for longest if there is no room.

        Memory of the records is the caller's again when this returns.

        Returns:
            For each, whether it is kept; what there is no room for (larger than the tier, or than
            what it may give up) is not. A key that is there is kept, and counts as read.
        """

    @abstractmethod
    def read(
        self, keys: Sequence[bytes], room: Sequence[Tensor]
    ) -> AbstractContextManager[list[Record | None]]:
        """The records of keys, in order; `None` for one that is not there.

        Args:
            keys: of the records.
            room: uint8 `[bytes]` for each, at least as large as its body, for a tier whose bytes do
                not lie in memory; one whose bytes do may return views of them instead.

        Returns:
            A context: the records are valid, and not given up, within it.
        """

    @abstractmethod
    def delete(self, keys: Sequence[bytes]) -> None:
        """Forget records; keys that are not there are nothing."""

    @abstractmethod
    def scan(self) -> Iterator[Stored]:
        """All it holds, those put longest ago first as far as it knows."""

    @abstractmethod
    def usage(self) -> Usage:
        """Its own count; callable from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Let go; nothing else may be called. Closing twice is nothing."""
