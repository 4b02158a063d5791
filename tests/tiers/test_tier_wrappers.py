import logging
import random
import threading
from collections.abc import Sequence

import pytest
import torch

from kvpaged.errors import ConfigError, KVPagedError, StorageError
from kvpaged.testing.faulty_files import FaultyFiles
from kvpaged.testing.tier_faults import Delayed, Faulty
from kvpaged.testing.tiers import record_of, same
from kvpaged.tiers.base import Record, Stored, Tier, TierDownError
from kvpaged.tiers.disk import DiskTier
from kvpaged.tiers.host import HostTier
from kvpaged.tiers.wrappers import Breaker, Checked, Logged, Timed, Wrapper
from tests.tiers.test_disk_tier import options, page, room


def host(bytes: int = 1 << 20) -> HostTier:
    return HostTier(bytes, pin=False)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def records(*numbers: int, size: int = 3000) -> list[Record]:
    return [record_of(b"p%d" % number, size) for number in numbers]


def get(tier: Tier, key: bytes, size: int = 3000) -> Record | None:
    with tier.read([key], room(size)) as (found,):
        return found and found._replace(body=found.body.clone())


def test_a_wrapper_is_the_tier_it_stands_around():
    inner = DiskTier("unused", None, files=FaultyFiles(), options=options())
    tier = Wrapper(Timed(inner))
    assert (tier.name, tier.policy, tier.persistent) == ("disk", "write-through", True)
    inner.gone.append(b"p")
    assert tier.gone is inner.gone
    tier.close()
    tier.close()


def test_an_error_within_a_read_is_the_callers():
    inner = host()
    breaker = Breaker(Timed(inner), failures=1)
    inner.put(records(1))

    def read() -> None:
        with breaker.read([b"p1"], room(1)):
            inner.delete([b"p1"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()
    inner.check_integrity()
    assert not inner._left, "the context has ended"
    assert not is_down(breaker)


def is_down(tier: Breaker) -> bool:
    return tier.down


# -- checked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["flip_rate", "lie_rate"])
def test_what_is_damaged_is_a_miss_and_is_gone(fault):
    faulty = Faulty(host(), seed=5)
    tier = Checked(faulty)
    tier.put(records(1, 2, 3))
    setattr(faulty, fault, 1.0)
    with tier.read([b"p1", b"p3", b"away"], room(3000, 3000, 1)) as found:
        assert found == [None, None, None]
    setattr(faulty, fault, 0.0)
    assert tier.damaged == 2
    assert sorted(tier.gone) == [b"p1", b"p3"]
    assert [one.key for one in tier.scan()] == [b"p2"]
    assert tier.put(records(1)) == [True]
    again = get(tier, b"p1")
    assert again is not None
    same(records(1)[0], again)


def test_every_bit_of_head_and_body_is_checked():
    inner = host()
    tier = Checked(inner)
    one = Record(b"p", b"head", torch.arange(5, dtype=torch.uint8))
    tier.put([one])
    with inner.read([b"p"], []) as (stored,):
        assert stored is not None
        head, body = stored.head, stored.body.clone()
    for at in range(8 * (len(head) + len(body))):
        raw = bytearray(head + body.numpy().tobytes())
        raw[at // 8] ^= 1 << at % 8
        inner.delete([b"p"])
        wrong = torch.frombuffer(raw[len(head) :], dtype=torch.uint8)
        inner.put([Record(b"p", bytes(raw[: len(head)]), wrong)])
        assert get(tier, b"p") is None, at
    assert tier.damaged == 8 * (len(head) + len(body))


def test_sums_live_as_long_as_the_records_do():
    files = FaultyFiles()
    tier = Checked(DiskTier("unused", None, files=files, options=options(), codec="lossless"))
    one = page(3)
    tier.put([one, Record(b"empty", b"", torch.empty(0, dtype=torch.uint8))])
    assert set(tier.scan()) == {
        Stored(one.key, len(one.head), one.body.numel()), Stored(b"empty", 0, 0)
    }  # fmt: skip
    tier.close()
    tier = Checked(DiskTier("unused", None, files=files.killed(), options=options()))
    found = get(tier, one.key, one.body.numel())
    assert found is not None
    same(one, found)
    tier.inner.put(records(8))
    assert get(tier, b"p8") is None, "it was put without a sum"
    assert tier.damaged == 1
    tier.close()


# -- timed -----------------------------------------------------------------------------------------


def test_times_count_calls_records_bytes_and_seconds():
    clock = Clock()

    def sleep(seconds: float) -> None:
        clock.now += seconds

    faulty = Faulty(host())
    tier = Timed(Delayed(faulty, latency_s=0.001, bytes_per_s=1e6, sleep=sleep), clock=clock)
    plain = [record._replace(head=b"") for record in records(1, 2)]
    tier.put([*plain, record_of(b"large", 2 << 20)])
    with tier.read([b"p1", b"away", b"p1"], room(1, 1, 1)):
        clock.now += 1000
    tier.delete([b"p1", b"p2"])
    assert not list(tier.scan())
    faulty.fail_in(1, "put")
    with pytest.raises(StorageError):
        tier.put(plain)
    put, read = tier.times["put"], tier.times["read"]
    large = len(record_of(b"large", 2 << 20).head)
    assert (put.calls, put.failures, put.records, put.bytes) == (1, 1, 2, 6000)
    assert put.seconds == pytest.approx(0.001 + (6000 + large + (2 << 20)) / 1e6)
    assert (read.calls, read.failures, read.records, read.bytes) == (1, 0, 2, 6000)
    assert read.seconds == pytest.approx(0.007)
    assert (tier.times["delete"].records, tier.times["scan"].records) == (2, 0)
    assert read.quantile(0.5) == pytest.approx(0.007, rel=1)
    assert read.quantile(0.5) > 0.007
    assert sum(put.histogram) == 2
    assert Timed(host()).times["put"].quantile(0.9) == 0


def test_delays_are_the_same_for_a_seed():
    def delays(seed: int) -> list[float]:
        slept: list[float] = []
        tier = Delayed(host(), latency_s=0.5, jitter=2.0, seed=seed, sleep=slept.append)
        for _ in range(20):
            tier.delete([])
        return slept

    def never(seconds: float) -> None:
        raise AssertionError(seconds)

    assert delays(1) == delays(1) != delays(2)
    assert all(0.5 <= one <= 1.5 for one in delays(3))
    assert not Delayed(host(), sleep=never).put([])


# -- logged ----------------------------------------------------------------------------------------


def test_the_first_failure_of_a_kind_is_logged_until_it_works_again(caplog):
    caplog.set_level(logging.INFO)
    faulty = Faulty(host())
    tier = Logged(faulty)
    faulty.dead = True
    for _ in range(3):
        for call in (lambda: tier.put(records(1)), lambda: tier.delete([b"p"]), tier.scan):
            with pytest.raises(StorageError):
                call()
    faulty.dead = False
    with pytest.raises(ConfigError):
        tier.put([Record(b"", b"", torch.empty(0, dtype=torch.uint8))])
    tier.put(records(1))
    tier.put(records(1))
    faulty.fail_in(1)
    with pytest.raises(StorageError):
        tier.put(records(2))
    said = [(record.levelname, record.message.split(":")[1][:12]) for record in caplog.records]
    assert said == [
        ("WARNING", " put failed"), ("WARNING", " delete fail"), ("WARNING", " scan failed"),
        ("WARNING", " put failed"), ("INFO", " put works a"), ("WARNING", " put failed"),
    ]  # fmt: skip
    assert "after 4 failures" in caplog.text


# -- broken ----------------------------------------------------------------------------------------


def test_failures_in_a_row_take_it_down_for_a_time_that_doubles():
    clock, faulty = Clock(), Faulty(host())
    tier = Breaker(faulty, failures=3, wait_s=1.0, most_wait_s=4.0, clock=clock)
    faulty.dead = True
    for _ in range(2):
        with pytest.raises(StorageError):
            get(tier, b"p1")
    faulty.dead = False
    get(tier, b"p1")
    faulty.dead = True
    for _ in range(3):
        assert not is_down(tier)
        with pytest.raises(StorageError):
            get(tier, b"p1")
    for wait in (1.0, 2.0, 4.0, 4.0):
        calls = faulty.calls
        clock.now += wait - 0.1
        assert is_down(tier)
        with pytest.raises(TierDownError, match=r"host is not asked for 0\.1 s more: read raised"):
            get(tier, b"p1")
        with pytest.raises(TierDownError):
            tier.put(records(1))
        assert faulty.calls == calls, "it is not asked"
        clock.now += 0.2
        assert not is_down(tier)
        with pytest.raises(StorageError):
            get(tier, b"p1")
    assert issubclass(TierDownError, KVPagedError)
    assert (tier.trips, tier.refused) == (5, 8)
    faulty.dead = False
    clock.now += 5
    tier.put(records(1))
    assert get(tier, b"p1") is not None
    assert get(tier, b"p1") is not None
    faulty.dead = True
    for _ in range(3):  # it begins anew
        assert not is_down(tier)
        with pytest.raises(StorageError):
            tier.delete([])
    clock.now += 1.1
    assert not is_down(tier)


def test_failing_writes_stop_writes_alone():
    """What a disk holds that has become read-only was not found any more."""
    clock, faulty = Clock(), Faulty(host())
    tier = Breaker(faulty, failures=2, wait_s=1.0, clock=clock)
    tier.put(records(1))
    for kind in ("put", "delete"):
        for _ in range(2):
            faulty.fail_in(1, kind)
            with pytest.raises(StorageError):
                tier.put(records(2)) if kind == "put" else tier.delete([b"p9"])
        assert is_down(tier)
        with pytest.raises(TierDownError):
            tier.put(records(2))
        assert get(tier, b"p1") is not None
        assert b"p1" in [one.key for one in tier.scan()]
        clock.now += 1.1
        assert get(tier, b"p1") is not None
        assert tier.put(records(1)) == [True], "it is asked whether it still fails"
        tier.delete([])
        assert not is_down(tier)


def test_a_call_that_takes_too_long_is_enough():
    clock = Clock()
    slow = [0.0]
    delayed = Delayed(
        host(), latency_s=1.0, sleep=lambda s: setattr(clock, "now", clock.now + slow[0])
    )
    tier = Breaker(delayed, slow_s=0.5, wait_s=2.0, clock=clock)
    tier.put(records(1))
    slow[0] = 0.6
    assert get(tier, b"p1") is not None, "its answer is good all the same"
    with pytest.raises(TierDownError, match=r"read took 0\.600 s of 0\.5"):
        get(tier, b"p1")
    clock.now += 2.1
    assert get(tier, b"p1") is not None
    assert is_down(tier)
    slow[0] = 0.0
    clock.now += 4.1
    assert get(tier, b"p1") is not None
    assert not is_down(tier)


def test_one_call_at_a_time_is_let_through_to_see():
    clock, faulty = Clock(), Faulty(host())
    tier = Breaker(faulty, wait_s=1.0, clock=clock)
    tier.trip("it hangs")
    with pytest.raises(TierDownError, match="it hangs"):
        tier.delete([])
    clock.now += 1.5
    faulty.hang = hang = threading.Event()
    thread = threading.Thread(target=tier.delete, args=([],))
    thread.start()
    faulty.hung.wait()
    assert is_down(tier)
    with pytest.raises(TierDownError):
        tier.delete([])
    with pytest.raises(TierDownError):
        get(tier, b"p1")
    tier.trip("nor does that return")
    clock.now += 5
    assert not is_down(tier), "it is waited for no more"
    hang.set()
    thread.join()
    assert not is_down(tier)
    tier.delete([])
    assert tier.usage().records == 0


@pytest.mark.parametrize("wrong", [{"failures": 0}, {"wait_s": 0}, {"wait_s": 99}, {"slow_s": 0}])
def test_a_breaker_that_cannot_be_is_refused(wrong):
    with pytest.raises(ConfigError, match="a breaker with"):
        Breaker(host(), **wrong)


# -- faulty ----------------------------------------------------------------------------------------


def outcome(tier: Tier, kinds: Sequence[int]) -> list[bool]:
    ends = []
    for kind in kinds:
        try:
            tier.put(records(kind)) if kind % 2 else tier.delete([b"p%d" % kind])
            ends.append(True)
        except StorageError:
            ends.append(False)
    return ends


def test_faults_are_the_same_for_a_seed():
    def run(seed: int) -> list[bool]:
        faulty = Faulty(host(), seed=seed)
        faulty.fail_rate = 0.3
        return outcome(faulty, range(60))

    assert run(1) == run(1) != run(2)
    assert 5 < run(1).count(False) < 35


def test_the_call_that_is_to_fail_does():
    faulty = Faulty(host())
    faulty.fail_in(2, "put")
    faulty.fail_in(5)
    assert outcome(faulty, [1, 2, 3, 4, 6, 5]) == [True, True, False, True, False, True]


def test_full_read_only_and_dead():
    faulty = Faulty(host())
    faulty.put(records(1))
    faulty.full = True
    assert faulty.put(records(1, 2)) == [True, False]
    faulty.full, faulty.read_only = False, True
    faulty.delete([b"p1"])
    assert faulty.put(records(1)) == [False]
    assert get(faulty, b"p1") is not None
    faulty.read_only, faulty.dead = False, True
    for call in (faulty.usage, faulty.scan, lambda: faulty.put([]), lambda: get(faulty, b"p1")):
        with pytest.raises(StorageError, match="on purpose"):
            call()
    faulty.close()


def test_bits_flip_in_what_is_read_only():
    faulty = Faulty(host(), seed=1)
    one = records(1)[0]
    faulty.put([one])
    faulty.flip_rate = 1.0
    for _ in range(20):
        found = get(faulty, b"p1")
        assert found is not None
        wrong = [a ^ b for a, b in zip(found.head, one.head, strict=True)]
        wrong += (found.body ^ one.body).tolist()
        assert sum(bits.bit_count() for bits in wrong) == 1
    faulty.flip_rate = 0.0
    found = get(faulty, b"p1")
    assert found is not None
    same(one, found)


def test_a_random_history_behind_checks_and_a_breaker_gives_no_wrong_byte():
    rng, clock = random.Random(4), Clock()
    faulty = Faulty(host(40_000), seed=4)
    tier = Breaker(Checked(faulty), failures=2, wait_s=3.0, clock=clock)
    faulty.fail_rate, faulty.flip_rate, faulty.lie_rate = 0.1, 0.05, 0.05
    hits = 0
    for _ in range(1500):
        clock.now += 1
        key = rng.randrange(20)
        try:
            if rng.random() < 0.4:
                tier.put(records(key))
            else:
                found = get(tier, b"p%d" % key)
                if found is not None:
                    same(records(key)[0], found)
                    hits += 1
        except (StorageError, TierDownError):
            pass
    assert hits > 200
    assert tier.inner.damaged > 10  # type: ignore[attr-defined]
    assert tier.trips > 2
