"""Tiers around tiers: each adds one thing, checks or times say, to whichever it stands around."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import xxhash
from torch import Tensor

from kvpaged.errors import ConfigError
from kvpaged.tiers.base import Record, Stored, Tier, TierDownError, Usage
from kvpaged.tiers.health import Health, stops

T = TypeVar("T")
Kind = Literal["put", "read", "delete", "scan"]
KINDS: tuple[Kind, ...] = ("put", "read", "delete", "scan")
Asked = Sequence[Record] | Sequence[bytes]

SUM_BYTES = 8
BUCKETS = 32

_log = logging.getLogger(__name__)


class Wrapper(Tier):
    """A tier that hands everything on to another; `gone`, name and policy are the other's own.

    What it does differently it says in `_call`, which every call but `usage` and `close` goes
    through, or by the methods themselves.
    """

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name, self.policy, self.persistent = inner.name, inner.policy, inner.persistent
        self.gone = inner.gone

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        """Do a call: of a put `asked` are the records, of a read or a deletion the keys. A read
        ends when its records are there, not with its context.
        """
        return call()

    def put(self, records: Sequence[Record]) -> list[bool]:
        """See `Tier.put`."""
        return self._call("put", records, lambda: self.inner.put(records))

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        """See `Tier.read`."""
        with ExitStack() as stack:
            yield self._call("read", keys, lambda: stack.enter_context(self.inner.read(keys, room)))

    def delete(self, keys: Sequence[bytes]) -> None:
        """See `Tier.delete`."""
        self._call("delete", keys, lambda: self.inner.delete(keys))

    def scan(self) -> Iterator[Stored]:
        """See `Tier.scan`; all of it at once."""
        return iter(self._call("scan", (), lambda: list(self.inner.scan())))

    def usage(self) -> Usage:
        """See `Tier.usage`."""
        return self.inner.usage()

    def close(self) -> None:
        """See `Tier.close`."""
        self.inner.close()


# -- checked ---------------------------------------------------------------------------------------


class Checked(Wrapper):
    """Keeps a checksum with each record, and takes one that does not match for one that is not
    there: it is deleted, and named in `gone`.

    The xxh3-64 of key, head and body, with the head's length between, stands behind the head in
    what the inner tier keeps, little-endian, so it lives as long as the record does. What was put
    there without this wrapper does not match.

    Attributes:
        damaged: records that did not match.
    """

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.damaged = 0

    def put(self, records: Sequence[Record]) -> list[bool]:
        """See `Tier.put`; a head may have 8 bytes less than elsewhere."""
        return self.inner.put([
            one._replace(head=one.head + _sum_of(one.key, one.head, one.body)) for one in records
        ])  # fmt: skip

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        """See `Tier.read`."""
        with self.inner.read(keys, room) as found:
            records = [_checked(key, one) for key, one in zip(keys, found, strict=True)]
            bad = [
                key for key, one, was in zip(keys, records, found, strict=True)
                if one is None and was is not None
            ]  # fmt: skip
            if bad:
                self.damaged += len(bad)
                self.inner.delete(bad)
                self.gone.extend(bad)
            yield records

    def scan(self) -> Iterator[Stored]:
        """See `Tier.scan`."""
        return (
            one._replace(head_bytes=max(0, one.head_bytes - SUM_BYTES)) for one in self.inner.scan()
        )


def _sum_of(key: bytes, head: bytes, body: Tensor) -> bytes:
    hasher = xxhash.xxh3_64(len(key).to_bytes(4, "little") + len(head).to_bytes(4, "little"))
    hasher.update(key)
    hasher.update(head)
    hasher.update(body.detach().contiguous().numpy().data)
    return hasher.intdigest().to_bytes(SUM_BYTES, "little")


def _checked(key: bytes, record: Record | None) -> Record | None:
    if record is None or len(record.head) < SUM_BYTES:
        return None
    head, stands = record.head[:-SUM_BYTES], record.head[-SUM_BYTES:]
    if _sum_of(key, head, record.body) != stands:
        return None
    return Record(key, head, record.body)


# -- timed -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Times:
    """Calls of one kind.

    Attributes:
        calls, failures: that returned, and that raised.
        records, bytes: that went in or came out; bytes of bodies.
        seconds: all calls together, those that failed included.
        histogram: calls that took less than 2^n microseconds and no less than half of that, by n.
    """

    calls: int = 0
    failures: int = 0
    records: int = 0
    bytes: int = 0
    seconds: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def quantile(self, share: float) -> float:
        """Seconds that so large a share of the calls stayed below, to a factor of two."""
        wanted, seen = share * sum(self.histogram), 0
        for number, count in enumerate(self.histogram):
            seen += count
            if count and seen >= wanted:
                return float(2**number / 1e6)
        return 0.0

    def add(self, seconds: float, *, failed: bool) -> None:
        """A call has ended."""
        self.calls += not failed
        self.failures += failed
        self.seconds += seconds
        self.histogram[min(BUCKETS - 1, int(seconds * 1e6).bit_length())] += 1


class Timed(Wrapper):
    """Counts and times calls. Any thread may call; counts are exact if one does at a time.

    Attributes:
        times: by kind of call, `"put"`, `"read"`, `"delete"`, `"scan"`.
    """

    def __init__(self, inner: Tier, *, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__(inner)
        self._clock = clock
        self.times: dict[Kind, Times] = {kind: Times() for kind in KINDS}

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        start, times = self._clock(), self.times[kind]
        try:
            done = call()
        except BaseException:
            times.add(self._clock() - start, failed=True)
            raise
        times.add(self._clock() - start, failed=False)
        if kind == "delete":
            times.records += len(asked)
            return done
        answers: Sequence[Any] = done  # type: ignore[assignment]
        came = [one for one, answer in zip(asked, answers, strict=False) if answer]
        if kind == "read":
            came = [answer for answer in answers if answer is not None]
        times.records += len(answers) if kind == "scan" else len(came)
        times.bytes += sum(one.body.numel() for one in came if isinstance(one, Record))
        return done


# -- logged ----------------------------------------------------------------------------------------


class Logged(Wrapper):
    """Logs failures: of each kind of call the first of each class of exception, at level warning,
    and at level info that such a call went well again, after which the next is a first one.
    """

    def __init__(self, inner: Tier, *, logger: logging.Logger = _log) -> None:
        super().__init__(inner)
        self._logger = logger
        self._failing: dict[Kind, Counter[type[Exception]]] = {kind: Counter() for kind in KINDS}

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        failing = self._failing[kind]
        try:
            done = call()
        except Exception as error:
            failing[type(error)] += 1
            if failing[type(error)] == 1:
                self._logger.warning("tier %s: %s failed: %r", self.name, kind, error)
            raise
        if failing:
            count = failing.total()
            failing.clear()
            self._logger.info("tier %s: %s works again, after %d failures", self.name, kind, count)
        return done


# -- broken ----------------------------------------------------------------------------------------


class Breaker(Wrapper):
    """Stops asking a tier that does not work: after some failures in a row of one kind of call, or
    one call that took too long, calls raise `TierDownError` at once, for a time that doubles
    whenever the next call, the only one that is let through then, does not go well either. Failing
    writes stop writes alone (see `Health`).

    Any thread may call. `usage` and `close` always go through. A call that never returns is its
    caller's to give up; `trip` tells of it.

    Args:
        inner: the tier.
        failures: in a row, after which it is down.
        slow_s: seconds from which a call counts as a failure that is enough; `None`: none does.
        wait_s: seconds until it is asked again, at first; they double up to `most_wait_s`.
        most_wait_s: see `wait_s`.
        clock: seconds.

    Attributes:
        refused: calls that were not let through.
        trips: how often it went down, or stayed down after it was asked again.
    """

    def __init__(
        self, inner: Tier, *, failures: int = 3, slow_s: float | None = None, wait_s: float = 1.0,
        most_wait_s: float = 60.0, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        super().__init__(inner)
        if failures < 1 or not 0 < wait_s <= most_wait_s or (slow_s is not None and slow_s <= 0):
            raise ConfigError(
                f"a breaker with failures={failures}, slow_s={slow_s}, wait_s={wait_s} and "
                f"most_wait_s={most_wait_s}: all are above 0, wait_s no more than most_wait_s"
            )
        self._health = Health(clock, failures=failures, rest_s=wait_s, longest_s=most_wait_s)
        self._slow, self._clock = slow_s, clock
        self._lock = threading.Lock()
        self._probing: set[str] = set()
        self.refused = self.trips = 0

    @property
    def down(self) -> bool:
        """Whether the next write is refused, and, unless only writes failed, whatever else comes;
        one that would be let through to see is not.
        """
        with self._lock:
            return self._refuses("put")

    def _refuses(self, kind: str) -> bool:
        return self._health.rests(kind) or any(stops(probe, kind) for probe in self._probing)

    def trip(self, why: str) -> None:
        """It does not work: do not ask it for a while. A call that was let through to see and has
        not returned is waited for no more.
        """
        with self._lock:
            self._probing.clear()
            self._failed("trip", why, enough=True)

    def _failed(self, kind: str, why: str, *, enough: bool) -> None:
        self.trips += self._health.failed(why, kind, enough=enough)

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], T]) -> T:
        with self._lock:
            if self._refuses(kind):
                self.refused += 1
                raise TierDownError(
                    f"tier {self.name} is not asked for {self._health.left_s(kind):.1f} s more: "
                    f"{self._health.why}"
                )
            start = self._clock()
            probe = self._health.failing(kind)
            self._probing.update(probe)
        try:
            done = call()
        except BaseException as error:
            with self._lock:
                self._probing.difference_update(probe)
                self._failed(kind, f"{kind} raised {error!r}", enough=bool(probe))
            raise
        took = self._clock() - start
        with self._lock:
            self._probing.difference_update(probe)
            if self._slow is not None and took > self._slow:
                self._failed(kind, f"{kind} took {took:.3f} s of {self._slow:g}", enough=True)
            elif probe or not self._health.ill(kind):
                self._health.succeeded("trip")
                self._health.succeeded(kind)
        return done
