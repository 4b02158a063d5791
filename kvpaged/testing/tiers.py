"""What every tier must do, ours or yours: `check_tier` raises `AssertionError` where one does not.

    check_tier(lambda: MyTier(...), seed=1, steps=300)

It needs no test framework; `TierChecks` has the parts, each of which makes a tier of its own.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from kvpaged.tiers.base import KEPT, MOST_KEY, Record, Tier

UNBOUNDED = 4 << 20
"""Bytes that a tier without a bound is filled with."""


def check_tier(
    make: Callable[[], Tier], *, seed: int = 0, steps: int = 200,
    reopen: Callable[[Tier], Tier] | None = None,
) -> None:  # fmt: skip
    """Everything in this module.

    Args:
        make: a new, empty tier, which keeps what it is given: of a capacity of at least 128 KiB.
            Each is closed before the next is made.
        seed: of what is random.
        steps: of the random history.
        reopen: for a tier that is persistent: close it, and open what it left.

    Raises:
        AssertionError: the message says what it did.
    """
    checks = TierChecks(make, seed=seed, reopen=reopen)
    checks.values()
    checks.again()
    checks.memory()
    checks.deletion()
    checks.contexts()
    checks.capacity()
    checks.recency()
    checks.kept()
    checks.history(steps)
    if reopen is not None:
        checks.reopening()


def ensure(true: bool, message: str) -> None:
    """Raise `AssertionError` with this message unless it is so."""
    if not true:
        raise AssertionError(message)


def record_of(key: bytes, size: int) -> Record:
    """A record of `size` bytes whose head and body follow from its key."""
    seed = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
    rng = np.random.default_rng(seed)
    head = rng.bytes(int(rng.integers(0, 300)) if size else 0)
    return Record(key, head, torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)))


@dataclass(eq=False)
class _Held:
    """A tier beside what it should hold.

    Attributes:
        known: by key, what was kept and is neither deleted nor named in `gone`.
        away: keys that are not there: refused, deleted or gone.
        deleted: those of them that were deleted.
    """

    tier: Tier
    known: dict[bytes, Record]
    away: set[bytes]
    deleted: set[bytes]

    def drain(self) -> list[bytes]:
        """Take out what the tier says is gone."""
        gone = []
        while self.tier.gone:
            key = self.tier.gone.popleft()
            gone.append(key)
            self.known.pop(key, None)
            self.away.add(key)
            ensure(not key.startswith(KEPT), f"{key.hex()} is to be kept and is in `gone`")
        return gone

    def put(self, records: Sequence[Record]) -> list[bool]:
        """Put, and look at the answer and the tier's own count."""
        self.drain()
        kept = self.tier.put(records)
        ensure(len(kept) == len(records), f"put of {len(records)} gave {len(kept)} answers")
        for record, is_kept in zip(records, kept, strict=True):
            ensure(isinstance(is_kept, bool), f"put answers with bools, not {is_kept!r}")
            if is_kept:
                self.known[record.key] = record
                self.away.discard(record.key)
                self.deleted.discard(record.key)
            else:
                ensure(
                    record.key not in self.known, f"{record.key.hex()}, which it has, is refused"
                )
                self.away.add(record.key)
        self.count()
        return kept

    def delete(self, keys: Sequence[bytes]) -> None:
        """Delete."""
        self.drain()
        self.tier.delete(keys)
        for key in keys:
            self.known.pop(key, None)
            self.away.add(key)
            self.deleted.add(key)
        self.count()

    @contextmanager
    def read(self, keys: Sequence[bytes]) -> Iterator[list[Record | None]]:
        """Read, and compare when it begins and when it ends."""
        room = [self._room(key) for key in keys]
        wanted = [self.known.get(key) for key in keys]
        with self.tier.read(keys, room) as found:
            ensure(len(found) == len(keys), f"read of {len(keys)} gave {len(found)} records")
            self.drain()
            for key, want, got in zip(keys, wanted, found, strict=True):
                if got is None:
                    ensure(key not in self.known, f"{key.hex()} is lost, and not named in `gone`")
                elif want is not None:
                    same(want, got)
                else:
                    ensure(key not in self.away, f"{key.hex()} is there, and should be gone")
            yield found
            for want, got in zip(wanted, found, strict=True):
                if want is not None and got is not None:
                    same(want, got)

    def _room(self, key: bytes) -> Tensor:
        record = self.known.get(key)
        size = 1 << 16 if record is None else record.body.numel()
        return torch.from_numpy(np.full(size, 0xA5, np.uint8))

    def reopened(self) -> None:
        """What was gone may be back, if it was killed; what was deleted may not."""
        for key in {one.key for one in self.tier.scan()} - self.known.keys() - self.deleted:
            with self.tier.read([key], [self._room(key)]) as (found,):
                ensure(found is not None, f"scan names {key.hex()}, which is not there")
                if found is not None:
                    body = found.body.clone()
                    self.known[key] = record_of(key, body.numel())
                    same(self.known[key], found._replace(body=body))
                    self.away.discard(key)
        self.count()

    def count(self) -> None:
        """Compare the tier's count, and `gone`, with what should be there."""
        usage = self.tier.usage()
        settled = not self.drain()
        if usage.capacity is not None:
            ensure(usage.bytes <= usage.capacity, f"{usage}: more than its capacity")
        if settled:
            ensure(
                usage.records == len(self.known),
                f"{usage}: {len(self.known)} records should be there",
            )
        ensure((usage.records == 0) <= (usage.bytes == 0), f"{usage}: no record takes up bytes")

    def all(self) -> None:
        """Compare everything: what is there, what is not, and what `scan` says."""
        for key in list(self.known):
            with self.read([key]):
                pass
        away = sorted(self.away)
        with self.read(away):
            pass
        self.drain()
        listed = list(self.tier.scan())
        self.drain()
        sizes = {one.key: (one.head_bytes, one.body_bytes) for one in listed}
        ensure(len(sizes) == len(listed), "scan names a key twice")
        for key, record in self.known.items():
            size = (len(record.head), record.body.numel())
            ensure(sizes.get(key) == size, f"scan: {key.hex()} is {sizes.get(key)}, not {size}")
        for key in sizes:
            ensure(key not in self.away, f"scan names {key.hex()}, which is not there")


def same(want: Record, got: Record) -> None:
    """Raise `AssertionError` unless the records are the same, to the byte."""
    name = want.key.hex()
    ensure(got.key == want.key, f"{got.key.hex()} came for {name}")
    ensure(got.head == want.head, f"{name} has another head")
    ensure(
        got.body.dtype == torch.uint8 and got.body.dim() == 1 and got.body.is_contiguous(),
        f"{name}: a body is uint8 [bytes], contiguous, not {got.body.dtype} {got.body.shape}",
    )
    right = np.array_equal(got.body.numpy(), want.body.numpy())  # no threads: they cost more
    ensure(right, f"{name} has other bytes than were put")


class TierChecks:
    """The parts of `check_tier`, for the same arguments."""

    def __init__(
        self, make: Callable[[], Tier], *, seed: int = 0,
        reopen: Callable[[Tier], Tier] | None = None,
    ) -> None:  # fmt: skip
        self._make, self._reopen = make, reopen
        self._rng = random.Random(seed)

    @contextmanager
    def _tier(self) -> Iterator[_Held]:
        tier = self._make()
        held = _Held(tier, {}, set(), set())
        try:
            held.count()
            ensure(not list(tier.scan()), "a new tier is empty")
            yield held
            held.all()
        finally:
            held.tier.close()
            held.tier.close()

    def _bytes(self, held: _Held) -> int:
        capacity = held.tier.usage().capacity
        return UNBOUNDED if capacity is None else capacity

    def values(self) -> None:
        """What is put comes back: keys of all lengths, empty and large bodies, any order."""
        with self._tier() as held:
            large = self._bytes(held) // 16
            held.put([])
            held.delete([])
            with held.tier.read([], []) as none:
                ensure(list(none) == [], "a read of nothing gave something")
            keys = [b"p", b"\0", b"p" * MOST_KEY, b"\xff" * 17, b"pq", b"pqr"]
            sizes = [0, 1, 255, 4096, 5000, large]
            records = [record_of(key, size) for key, size in zip(keys, sizes, strict=True)]
            kept = held.put(records)
            ensure(all(kept), f"{kept}: there is room for all of them")
            held.put([Record(b"headless", b"", torch.arange(99, dtype=torch.uint8))])
            for _ in range(4):
                order = self._rng.sample([*keys, b"absent", b"headless"], len(keys))
                with held.read([*order, order[0], b"absent"]) as found:
                    ensure(found[-1] is None, "a key that was never put is there")

    def again(self) -> None:
        """A key that is there is kept, within a batch as well."""
        with self._tier() as held:
            one, two = record_of(b"p1", 3000), record_of(b"p2", 100)
            ensure(held.put([one, two, one]) == [True] * 3, "a key twice in a batch is kept")
            before = held.tier.usage()
            ensure(held.put([two, one]) == [True] * 2, "a key that is there is kept")
            ensure(held.tier.usage() == before, "a key that is there takes nothing")

    def memory(self) -> None:
        """Any memory will do, and it is the caller's again."""
        with self._tier() as held:
            wide = torch.arange(4000, dtype=torch.int64).to(torch.uint8)
            mine = torch.arange(3000, dtype=torch.int64).to(torch.uint8)
            fixed = np.arange(2000).astype(np.uint8)
            odd = torch.zeros(1001, dtype=torch.uint8)[1:]
            for number, body in enumerate((wide[::2], mine, torch.from_numpy(fixed), odd)):
                key = b"p%d" % number
                if number == 2:
                    fixed.setflags(write=False)
                kept = held.put([Record(key, b"h", body)])
                held.known[key] = Record(key, b"h", body.clone())
                ensure(kept == [True], f"the body of stride {body.stride()} was refused")
            wide.zero_()
            mine.zero_()

    def deletion(self) -> None:
        """What is deleted is not there, and can be put again."""
        with self._tier() as held:
            records = [record_of(b"p%d" % number, 700 * number) for number in range(9)]
            held.put(records)
            held.delete([b"p3", b"absent", b"p5", b"p3"])
            held.all()
            held.put(records[2:6])
            held.all()
            held.delete([record.key for record in records])
            ensure(not held.drain(), "what was deleted is not given up")

    def contexts(self) -> None:
        """What is being read stays, whatever else happens."""
        with self._tier() as held:
            size = self._bytes(held) // 40
            held.put([record_of(b"p%d" % number, size) for number in range(6)])
            with ExitStack() as stack:
                for keys in ([b"p0", b"p1"], [b"p1", b"p5"], [b"p0"]):
                    stack.enter_context(held.read(keys))
                for number in range(6, 60):
                    held.put([record_of(b"p%d" % number, size)])
                inner = stack.enter_context(held.read([b"p58", b"p59"]))
                ensure(any(inner), "what was put last is gone")
                held.delete([b"p1", b"p59"])
                for number in range(60, 90):
                    held.put([record_of(b"p%d" % number, size)])

    def capacity(self) -> None:
        """There is never more than fits, and what goes is named."""
        with self._tier() as held:
            bound = held.tier.usage().capacity
            if bound is not None:
                small, large = record_of(b"small", 100), record_of(b"large", bound + 1)
                kept = held.put([small, large, record_of(b"other", 100)])
                ensure(kept == [True, False, True], f"{kept} for small, larger than all, small")
            total = self._bytes(held)
            named = 0
            for number in range(48):
                held.put([record_of(b"p%d %d" % (number, n), total // 32) for n in range(2)])
                named += len(held.drain())
            held.all()
            ensure(len(held.known) >= 4, f"{len(held.known)} records of a thirty-second are there")

    def recency(self) -> None:
        """What is read all the time is not given up."""
        with self._tier() as held:
            size = self._bytes(held) // 32
            held.put([record_of(b"read", size)])
            for number in range(80):
                held.put([record_of(b"p%d" % number, size)])
                with held.read([b"read"]) as (found,):
                    ensure(found is not None, "what was read last was given up before others")

    def kept(self) -> None:
        """Saved sessions stay."""
        with self._tier() as held:
            size = self._bytes(held) // 64
            mine = [record_of(KEPT + b"%d" % number, size) for number in range(6)]
            ensure(all(held.put(mine)), "saved sessions were refused in an empty tier")
            for number in range(30):
                held.put([record_of(b"p%d %d" % (number, n), size) for n in range(6)])
            with held.read([record.key for record in mine]) as found:
                ensure(all(found), "a saved session is not there")
            held.delete([mine[0].key])

    def history(self, steps: int) -> None:
        """Anything, in any order, beside a dict."""
        rng = self._rng
        with self._tier() as held:
            most = self._bytes(held) // 24
            sizes = (0, 1, 700, 4096, most // 2, most)
            names = [b"p%d" % number for number in range(60)]
            names += [KEPT + b"%d" % number for number in range(4)]

            def some() -> list[bytes]:
                return [rng.choice(names) for _ in range(rng.randrange(7))]

            def record(key: bytes) -> Record:
                return record_of(key, sizes[blake2b(key, digest_size=1).digest()[0] % len(sizes)])

            for _ in range(steps):
                kind = rng.randrange(10)
                if kind < 5:
                    held.put([record(key) for key in some()])
                elif kind < 8:
                    with held.read(some()), held.read(some()):
                        if kind == 7:
                            held.put([record(key) for key in some()])
                elif kind == 8:
                    held.delete(some())
                else:
                    held.count()
                check = getattr(held.tier, "check_integrity", None)
                if check is not None:
                    check()

    def reopening(self) -> None:
        """What a persistent tier holds is there when it is opened again."""
        assert self._reopen is not None
        with self._tier() as held:
            ensure(held.tier.persistent, "a tier that can be reopened is persistent")
            size = self._bytes(held) // 64
            for turn in range(3):
                held.put([record_of(b"p%d %d" % (turn, n), size) for n in range(9)])
                held.put([record_of(KEPT + b"%d" % turn, size)])
                held.delete([b"p%d 3" % turn])
                held.drain()
                held.tier = self._reopen(held.tier)
                held.reopened()
                held.all()
