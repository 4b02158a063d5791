"""Tiers that fail, hang, lie and dawdle on purpose, around ones that do not."""

import errno
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from torch import Tensor, empty, uint8

from kvpaged.errors import StorageError
from kvpaged.tiers.base import Record, Tier, Usage
from kvpaged.tiers.wrappers import Asked, Kind, Wrapper

T = TypeVar("T")


def _bytes(records: Sequence[Record | None]) -> int:
    return sum(len(one.head) + one.body.numel() for one in records if one is not None)


class Delayed(Wrapper):
    """Makes calls last as long as they would elsewhere.

    Args:
        inner: the tier.
        latency_s: seconds of each call.
        bytes_per_s: of heads and bodies that are put or read; `None`: they take no time.
        jitter: up to so many times the latency in addition, at random.
        seed: of that.
        sleep: what waits.
    """

    def __init__(
        self, inner: Tier, *, latency_s: float = 0.0, bytes_per_s: float | None = None,
        jitter: float = 0.0, seed: int = 0, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        super().__init__(inner)
        self._latency, self._rate, self._jitter = latency_s, bytes_per_s, jitter
        self._rng, self._sleep = random.Random(seed), sleep

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        done = call()
        moved = asked if kind == "put" else done if kind == "read" else ()
        seconds = self._latency * (1 + self._jitter * self._rng.random())
        if self._rate is not None:
            seconds += _bytes(cast("Sequence[Record | None]", moved)) / self._rate
        if seconds > 0:
            self._sleep(seconds)
        return done


class Faulty(Wrapper):
    """Fails as told. All of it can be changed at any time.

    Attributes:
        calls: so far, of every kind but `usage` and `close`.
        fail_rate: share of the calls that raise `StorageError`, at random; half of them, and of
            those of `fail_in`, when they are done, the others before anything happened.
        flip_rate: share of the records read in which one bit is wrong, of body or head.
        lie_rate: share of the records read in whose place comes another of the tier's.
        full: nothing new is kept.
        read_only: nothing is kept or deleted.
        dead: everything raises but `close`.
        hang: calls wait for this event to be set before they go on.
        hung: set when a call begins to wait.
    """

    def __init__(self, inner: Tier, *, seed: int = 0) -> None:
        super().__init__(inner)
        self._rng = random.Random(seed)
        self._fail_in: dict[Kind | None, int] = {}
        self.calls = 0
        self.fail_rate = self.flip_rate = self.lie_rate = 0.0
        self.full = self.read_only = self.dead = False
        self.hang: threading.Event | None = None
        self.hung = threading.Event()

    def fail_in(self, calls: int, kind: Kind | None = None) -> None:
        """The `calls`-th call from now, of a kind or of any, fails."""
        self._fail_in[kind] = calls

    def _fails(self, kind: Kind) -> bool:
        fails = self._rng.random() < self.fail_rate
        for of in (kind, None):
            if of in self._fail_in:
                self._fail_in[of] -= 1
                if not self._fail_in[of]:
                    del self._fail_in[of]
                    fails = True
        return fails

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        self.calls += 1
        hang = self.hang
        if hang is not None:
            self.hung.set()
            hang.wait()
        if self.dead:
            raise self._error(kind)
        fails = self._fails(kind)
        if fails and self._rng.random() < 0.5:
            raise self._error(kind)
        if kind == "put" and (self.full or self.read_only):
            done = cast("T", self._refuse(cast("Sequence[Record]", asked)))
        elif kind == "delete" and self.read_only:
            done = cast("T", None)
        else:
            done = call()
        if kind == "read":
            records = cast("list[Record | None]", done)
            records[:] = [one if one is None else self._spoilt(one) for one in records]
        if fails:
            raise self._error(kind)
        return done

    def _error(self, kind: Kind | str) -> StorageError:
        return StorageError(errno.EIO, f"tier {self.name}: {kind} fails on purpose")

    def _refuse(self, records: Sequence[Record]) -> list[bool]:
        if self.read_only:
            return [False] * len(records)
        there = {one.key for one in self.inner.scan()}
        return [one.key in there for one in records]

    def _spoilt(self, record: Record) -> Record:
        if self._rng.random() < self.lie_rate:
            return self._other(record)
        if self._rng.random() < self.flip_rate:
            return self._flipped(record)
        return record

    def _flipped(self, record: Record) -> Record:
        """A copy in which a bit is wrong; the tier's own bytes stay right."""
        body, head = record.body.clone(), bytearray(record.head)
        at = self._rng.randrange(max(1, len(head) + len(body)))
        bit = 1 << self._rng.randrange(8)
        if at < len(head):
            head[at] ^= bit
        elif len(body):
            body[at - len(head)] ^= bit
        return record._replace(body=body, head=bytes(head))

    def _other(self, record: Record) -> Record:
        others = [one for one in self.inner.scan() if one.key != record.key]
        if not others:
            return record
        other = self._rng.choice(others)
        room: list[Tensor] = [empty(other.body_bytes, dtype=uint8)]
        with self.inner.read([other.key], room) as (found,):
            if found is None:
                return record
            return found._replace(key=record.key, body=found.body.clone())

    def usage(self) -> Usage:
        """See `Tier.usage`."""
        if self.dead:
            raise self._error("usage")
        return self.inner.usage()
