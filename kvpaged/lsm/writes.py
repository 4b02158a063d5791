"""Puts on their way to disk, and what has been written."""

from dataclasses import dataclass
from typing import NamedTuple

from kvpaged.lsm.log import Log, Placed


@dataclass(eq=False, slots=True)
class Fate:
    """What becomes of a batch: whoever waits for it holds this, not the file that it is in, which
    may have to go meanwhile.
    """

    where: str
    done: bool = False
    error: BaseException | None = None


@dataclass(eq=False, slots=True)
class Batch:
    """What one call put, from its place until it is committed."""

    log: Log
    placed: list[Placed]
    fate: Fate
    arrived: bool = False


class Begun(NamedTuple):
    """A call half done: what becomes of its batch, if it has any, and which entries are put."""

    fate: Fate | None
    put: list[bool]


@dataclass(slots=True)
class WriteCounts:
    """What has been written.

    Attributes:
        puts, deletes: entries that came.
        put_bytes: of payloads that came, as they are stored.
        tensor_bytes: of the tensors they were.
        log_bytes, writes: to logs, and calls.
        stalls, refused: puts that had to wait, and those that waited in vain.
        dropped: values that were found already and could not be written (durability `none`).
    """

    puts: int = 0
    deletes: int = 0
    put_bytes: int = 0
    tensor_bytes: int = 0
    log_bytes: int = 0
    writes: int = 0
    stalls: int = 0
    refused: int = 0
    dropped: int = 0
