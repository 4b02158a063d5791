"""The thread of a tier: deadlines, order, undoing, and when a tier is asked again."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch

from kvpaged.errors import StorageError
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.stack import Stack
from kvpaged.offload.worker import TierWorker
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.base import Record, TierDownError
from kvpaged.tiers.health import FAILURES, LONGEST_REST_S, REST_S, Health
from kvpaged.tiers.host import HostTier
from tests.offload.tiered import until


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def is_resting(health: Health) -> bool:
    """Asked anew, which a type checker would not do."""
    return health.rests()


class Undone:
    """Counts."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def worker_of(clock: Clock | None = None) -> TierWorker:
    worker = TierWorker(HostTier(1 << 16, pin=False))
    if clock is not None:
        worker.health = Health(clock)
    return worker


def threads() -> int:
    return sum(thread.name == "kvpaged host" for thread in threading.enumerate())


def _note(order: list[str], name: str, _: object) -> None:
    order.append(name)


def fails(_):
    raise StorageError(5, "on purpose")


# -- health ----------------------------------------------------------------------------------------


def test_a_tier_rests_after_failures_in_a_row_and_twice_as_long_each_time():
    clock = Clock()
    health = Health(clock)
    for _ in range(FAILURES - 1):
        health.failed("no")
    health.succeeded()
    for _ in range(FAILURES - 1):
        health.failed("no")
        assert not health.rests()
    rest = REST_S
    for _ in range(10):
        health.failed("no")
        clock.now += rest * 0.99
        assert is_resting(health)
        clock.now += rest * 0.02
        assert not is_resting(health), "it is to be asked once more"
        rest = min(2 * rest, LONGEST_REST_S)
    health.succeeded()
    for _ in range(FAILURES):
        assert not health.rests()
        health.failed("no")
    clock.now += REST_S * 1.01
    assert not health.rests(), "the rest begins anew after a success"


def test_what_writes_well_and_does_not_read_rests_all_the_same():
    """Each write that went well began the count of failed reads anew."""
    worker = worker_of(Clock())
    for _ in range(FAILURES):
        assert worker.up
        worker.wait(worker.submit(lambda _: None, "put"), 30)
        with pytest.raises(StorageError):
            worker.wait(worker.submit(fails, "read"), 30)
    worker.succeeded("put")
    assert is_resting(worker.health)
    worker.succeeded("read")
    assert not is_resting(worker.health)
    assert worker.close(30)


def test_a_tier_that_refuses_what_it_is_given_is_still_read():
    """A disk that has become read-only was not read either, as long as it rested."""
    clock = Clock()
    worker = worker_of(clock)
    for _ in range(FAILURES):
        with pytest.raises(StorageError):
            worker.wait(worker.submit(fails, "put"), 30)
    assert (worker.takes, worker.up) == (False, True)
    with pytest.raises(TierDownError):
        worker.submit(lambda _: None, "put")
    assert worker.wait(worker.submit(lambda _: 7, "read"), 30) == 7
    assert not worker.takes, "that says nothing of writes"
    clock.now += REST_S * 1.01
    worker.wait(worker.submit(lambda _: None, "put"), 30)
    assert worker.close(30)


def test_a_worker_asks_nothing_of_a_tier_that_rests():
    clock = Clock()
    worker = worker_of(clock)
    called: list[object] = []
    for _ in range(FAILURES):
        with pytest.raises(StorageError):
            worker.wait(worker.submit(fails, "read"), 30)
    undo = Undone()
    with pytest.raises(TierDownError):
        worker.submit(called.append, "read", undo)
    assert (called, undo.times, worker.up) == ([], 0, False)
    clock.now += REST_S * 1.01
    assert worker.wait(worker.submit(lambda _: 7, "read", undo), 30) == 7
    assert undo.times == 1
    assert worker.health.failures == FAILURES
    assert worker.close(30)


# -- deadlines -------------------------------------------------------------------------------------


def test_a_call_that_does_not_return_costs_its_thread_until_it_does():
    worker, gate, undo = worker_of(), threading.Event(), Undone()
    before = threads()
    job = worker.submit(lambda _: gate.wait(), "read", undo)
    with pytest.raises(TimeoutError):
        worker.wait(job, 0.05)
    assert (worker.parked, worker.up, worker.timeouts) == (True, False, 1)
    for _ in range(50):
        with pytest.raises(TierDownError):
            worker.submit(lambda _: None, "read")
    assert threads() == before + 1, "one thread, however often it was asked"
    assert undo.times == 0, "the call may still use what it holds"
    gate.set()
    until(lambda: not worker.parked)
    assert undo.times == 1
    assert worker.up
    assert worker.wait(worker.submit(lambda _: 7, "read"), 30) == 7
    assert threads() == before + 1
    assert worker.close(30)
    until(lambda: threads() == before)


def test_a_job_that_has_not_begun_is_undone_when_nobody_waits_any_more():
    worker, gate = worker_of(), threading.Event()
    first = worker.submit(lambda _: gate.wait(), "read")
    called: list[object] = []
    undos = [Undone(), Undone()]
    late = worker.submit(called.append, "read", undos[0])
    dropped = worker.submit(called.append, "put", undos[1])
    with pytest.raises(TimeoutError):
        worker.wait(late, 0.02)
    worker.cancel(dropped)
    assert [undo.times for undo in undos] == [1, 1]
    assert not worker.parked, "the first one is still waited for"
    gate.set()
    assert worker.wait(first, 30)
    assert called == []
    assert worker.close(30)
    assert [undo.times for undo in undos] == [1, 1]


def test_urgent_jobs_go_first():
    worker, gate = worker_of(), threading.Event()
    order: list[str] = []
    worker.submit(lambda _: gate.wait(), "read")
    jobs = []
    for name in ("w1", "r1", "w2", "r2"):
        jobs.append(worker.submit(partial(_note, order, name), "read" if name[0] == "r" else "put"))
    gate.set()
    for job in jobs:
        worker.wait(job, 30)
    assert order == ["r1", "r2", "w1", "w2"]
    assert worker.close(30)


@pytest.mark.parametrize("end", ["well", "raises", "late", "waiting", "closed"])
def test_undo_is_called_exactly_once(end):
    worker, gate, undo = worker_of(), threading.Event(), Undone()
    if end in ("waiting", "closed"):
        first = worker.submit(lambda _: gate.wait(5), "read")
        until(lambda: first.started)
    work = {"raises": fails, "late": lambda _: gate.wait()}.get(end, lambda _: None)
    job = worker.submit(work, "put", undo)
    if end == "well":
        worker.wait(job, 30)
    elif end == "raises":
        with pytest.raises(StorageError):
            worker.wait(job, 30)
    elif end == "closed":
        assert not worker.close(0.02)
        with pytest.raises(TierDownError):
            worker.wait(job, 30)
    else:
        with pytest.raises(TimeoutError):
            worker.wait(job, 0.02)
    gate.set()
    worker.close(30)
    until(lambda: undo.times)
    assert undo.times == 1


def test_a_wait_that_ends_as_its_job_does_is_no_failure():
    """Whichever comes first: the job's result, or a timeout that is counted."""
    worker = worker_of()
    good = late = 0
    for _ in range(200):
        undo = Undone()
        try:
            worker.wait(worker.submit(lambda _: None, "read", undo), 0.0)
            good += 1
        except TimeoutError:
            late += 1
        except TierDownError:
            late += 1
        worker.health.succeeded()
        until(lambda: not worker.parked)
    assert good + late == 200
    assert worker.health.failures == worker.timeouts
    assert worker.close(30)


# -- its end ---------------------------------------------------------------------------------------


class Closing(HostTier):
    """Counts, and may hang."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        super().__init__(4096, pin=False)
        self.closed_by: list[str] = []
        self._gate = gate

    def close(self) -> None:
        self.closed_by.append(threading.current_thread().name)
        if self._gate is not None:
            self._gate.wait()
        super().close()


def test_a_tier_that_rests_is_closed_by_its_thread_all_the_same():
    """It was closed by the caller, without a deadline, beside a call that was under way."""
    tier = Closing()
    worker = TierWorker(tier)
    for _ in range(FAILURES):
        worker.health.failed("no")
    assert worker.health.rests()
    assert worker.close(30)
    assert worker.close(30)
    assert tier.closed_by == ["kvpaged host"]
    with pytest.raises(TierDownError):
        worker.submit(lambda _: None, "read")


@pytest.mark.parametrize("resting", [False, True])
def test_a_tier_that_hangs_in_close_is_left_to_itself(resting):
    gate = threading.Event()
    worker = TierWorker(Closing(gate))
    if resting:
        for _ in range(FAILURES):
            worker.health.failed("no")
    assert not worker.close(0.05)
    gate.set()


def test_a_parked_tier_is_not_closed():
    tier, gate = Closing(), threading.Event()
    worker = TierWorker(tier)
    with pytest.raises(TimeoutError):
        worker.wait(worker.submit(lambda _: gate.wait(), "read"), 0.02)
    assert not worker.close(0.02)
    assert tier.closed_by == []
    gate.set()


def test_a_worker_that_is_forgotten_takes_its_thread_with_it():
    before = threads()
    worker = worker_of()
    worker.wait(worker.submit(lambda _: None, "read"), 30)
    gone = weakref.ref(worker)
    del worker
    gc.collect()
    assert gone() is None
    until(lambda: threads() <= before)


# -- the stack -------------------------------------------------------------------------------------

OPTIONS = OffloadOptions(write_deadline_s=0.1, deadline_s=0.1, close_s=0.5)


def record(number: int) -> Record:
    return Record(bytes([1, number]), b"head", torch.full((256,), number, dtype=torch.uint8))


def test_a_stack_knows_what_was_kept_refused_and_given_up():
    tier = HostTier(4 * 512, pin=False)
    stack = Stack([tier], OPTIONS)
    undo = Undone()
    for number in range(12):
        assert stack.finish(0, stack.put(0, [record(number)], undo)) == 1
    assert undo.times == 12
    usage = tier.usage()
    assert usage.records < 12
    assert len(stack.directory.held[0]) == usage.records
    assert stack.directory.bytes[0] == usage.bytes
    assert stack.flows[0].demoted == 12
    stack.close()


def test_a_stack_takes_failures_for_nothing_kept():
    tier = Faulty(HostTier(1 << 16, pin=False))
    stack = Stack([tier], OPTIONS)
    undo = Undone()
    tier.fail_in(1, "put")
    assert stack.finish(0, stack.put(0, [record(1)], undo)) is None
    assert 0 in stack.incomplete
    tier.full = True
    assert stack.finish(0, stack.put(0, [record(2), record(3)], undo)) == 0
    assert stack.flows[0].refused == 2
    tier.full, hang = False, threading.Event()
    tier.hang = hang
    assert stack.finish(0, stack.put(0, [record(4)], undo)) is None
    assert stack.put(0, [record(5)], undo) is None, "it is parked"
    assert undo.times == 3, "all but the call that hangs"
    hang.set()
    tier.hang = None
    until(lambda: undo.times == 4)
    assert bytes([1, 4]) in stack.directory.held[0], "it was kept after all"
    stack.close()


def test_a_stack_reads_what_tiers_hold_when_it_begins():
    tier = HostTier(1 << 16, pin=False)
    tier.put([record(number) for number in range(5)])
    stack = Stack([tier], OPTIONS)
    assert len(stack.directory.held[0]) == 5
    assert stack.directory.bytes[0] == tier.usage().bytes
    assert stack.where(bytes([1, 3]), [True, True]) == (0, 260)
    assert stack.where(bytes([1, 3]), [False, True]) is None
    stack.close()
