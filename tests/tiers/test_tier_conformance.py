"""Our tiers pass the suite; tiers with one fault do not, for that very reason."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from torch import Tensor

from kvpaged.lsm.options import StoreOptions
from kvpaged.testing.faulty_files import FaultyFiles
from kvpaged.testing.tier_faults import Delayed, Faulty
from kvpaged.testing.tiers import TierChecks, check_tier
from kvpaged.tiers.base import KEPT, Record, Stored, Tier, Usage
from kvpaged.tiers.disk import DiskTier
from kvpaged.tiers.host import HostTier
from kvpaged.tiers.wrappers import Breaker, Checked, Logged, Timed, Wrapper


def host(bytes: int = 300_001) -> HostTier:
    return HostTier(bytes, pin=False)


def disk(files: FaultyFiles, bytes: str | None = "1MiB", codec: str = "raw") -> DiskTier:
    options = StoreOptions(background=False, read_threads=1, memtable_bytes=1 << 20)
    return DiskTier("unused", bytes, files=files, options=options, codec=codec)


@pytest.mark.parametrize("bytes", [128 << 10, 300_001, 2 << 20])
@pytest.mark.parametrize("seed", range(2))
def test_host_tiers_pass(bytes, seed):
    check_tier(lambda: host(bytes), seed=seed, steps=300)


@pytest.mark.parametrize("bytes", ["1MiB", None])
def test_disk_tiers_pass_and_are_reopened(bytes):
    disks: list[FaultyFiles] = []

    def make() -> Tier:
        disks.append(FaultyFiles())
        return disk(disks[-1], bytes)

    def closed(tier: Tier) -> Tier:
        tier.close()
        return disk(disks[-1], bytes)

    check_tier(make, steps=100, reopen=closed)

    def killed(tier: Tier) -> Tier:
        disks.append(disks[-1].killed())
        return disk(disks[-1], bytes)

    TierChecks(make, reopen=killed).reopening()


def test_disk_tiers_with_threads_on_a_real_disk_pass(tmp_path):
    numbers = itertools.count()
    checks = TierChecks(lambda: DiskTier(tmp_path / f"{next(numbers)}", "2MiB", codec="lossless"))
    checks.history(40)
    checks.kept()


def test_wrapped_tiers_pass():
    check_tier(lambda: Breaker(Logged(Timed(Checked(Faulty(Delayed(host())))))), seed=3, steps=100)


class Losing(Wrapper):
    """Loses the 20th record without a word."""

    puts = 0

    def put(self, records: Sequence[Record]) -> list[bool]:
        kept = self.inner.put(records)
        self.puts += len(records)
        if records and self.puts >= 20:
            self.puts = 0
            self.inner.delete([records[0].key])
        return kept


class Flipping(Wrapper):
    """One bit in a body that is read is wrong."""

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        with self.inner.read(keys, room) as found:
            yield [one and one._replace(body=one.body ^ (one.body == 77)) for one in found]


class Swapping(Wrapper):
    """Answers in the order of keys, not in that of the question."""

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        with self.inner.read(sorted(keys), room) as found:
            yield found


class Silent(Wrapper):
    """Does not say what it gave up."""

    def put(self, records: Sequence[Record]) -> list[bool]:
        kept = self.inner.put(records)
        self.gone.clear()
        return kept


class Boasting(Wrapper):
    """Says of one that it is gone, which is there."""

    def put(self, records: Sequence[Record]) -> list[bool]:
        kept = self.inner.put(records)
        if any(kept) and records[0].body.numel() == 700:
            self.gone.append(records[0].key)
        return kept


class Larger(Wrapper):
    """Takes more than it says it may."""

    def usage(self) -> Usage:
        usage = self.inner.usage()
        return usage._replace(capacity=(usage.capacity or 0) // 2)


class Miscounting(Wrapper):
    """Counts a record that was deleted."""

    deleted = 0

    def delete(self, keys: Sequence[bytes]) -> None:
        self.inner.delete(keys)
        self.deleted = 1

    def usage(self) -> Usage:
        usage = self.inner.usage()
        return usage._replace(records=usage.records + self.deleted)


class Forgetful(Wrapper):
    """Does not delete."""

    def delete(self, keys: Sequence[bytes]) -> None:
        pass


class Unsteady(Wrapper):
    """What was read is overwritten while its context is open."""

    open: list[Record | None]

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        with self.inner.read(keys, room) as found:
            self.open = [one and one._replace(body=one.body.clone()) for one in found]
            yield self.open

    def put(self, records: Sequence[Record]) -> list[bool]:
        for one in getattr(self, "open", []):
            if one is not None:
                one.body.zero_()
        return self.inner.put(records)


class Borrowing(Wrapper):
    """Keeps the caller's memory instead of the bytes."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.bodies: dict[bytes, Tensor] = {}

    def put(self, records: Sequence[Record]) -> list[bool]:
        self.bodies |= {one.key: one.body for one in records}
        return self.inner.put(records)

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        with self.inner.read(keys, room) as found:
            yield [one and one._replace(body=self.bodies[one.key].contiguous()) for one in found]


class Renaming(Wrapper):
    """Takes saved sessions for pages."""

    def put(self, records: Sequence[Record]) -> list[bool]:
        return self.inner.put([one._replace(key=self.of(one.key)) for one in records])

    def of(self, key: bytes) -> bytes:
        return b"x" + key if key.startswith(KEPT) else key

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        with self.inner.read([self.of(key) for key in keys], room) as found:
            yield [one and one._replace(key=key) for key, one in zip(keys, found, strict=True)]


class Fifo(Wrapper):
    """Gives up what came first, however often it is read."""

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        assert isinstance(self.inner, HostTier)
        order = list(self.inner._used)
        with self.inner.read(keys, room) as found:
            for key in order:
                self.inner._used.move_to_end(key)
            yield found


class Partial(Wrapper):
    """Scans all but one."""

    def scan(self) -> Iterator[Stored]:
        return iter(list(self.inner.scan())[1:])


class Headless(Wrapper):
    """Forgets heads."""

    def put(self, records: Sequence[Record]) -> list[bool]:
        return self.inner.put([one._replace(head=b"") for one in records])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Losing, "is lost, and not named|records should be there"),
        (Flipping, "has other bytes than were put"),
        (Swapping, "came for|is lost|is there, and should be gone"),
        (Silent, "records should be there|is lost, and not named"),
        (Boasting, "records should be there|is there, and should be gone"),
        (Larger, "more than its capacity|for small, larger than all, small"),
        (Miscounting, "records should be there"),
        (Forgetful, "records should be there"),
        (Unsteady, "has other bytes than were put"),
        (Borrowing, "has other bytes than were put"),
        (Renaming, "in `gone`|is not there|scan|is lost|should be there"),
        (Fifo, "was given up before others"),
        (Partial, "scan: .* is None, not"),
        (Headless, "has another head"),
    ],
)
def test_a_fault_is_found(fault: Callable[[Tier], Tier], message):
    with pytest.raises(AssertionError, match=message):
        check_tier(lambda: fault(host()), seed=1, steps=100)


def test_a_tier_that_forgets_when_it_is_closed_is_found():
    class Forgets(Wrapper):
        def __init__(self, inner: Tier) -> None:
            super().__init__(inner)
            self.persistent = True

    with pytest.raises(AssertionError, match="records should be there"):
        check_tier(lambda: Forgets(host()), steps=1, reopen=lambda tier: Forgets(host()))
    with pytest.raises(AssertionError, match="can be reopened is persistent"):
        check_tier(host, steps=1, reopen=lambda tier: tier)
