"""Any history of puts, faults, kills and losses of power, against a dict."""

import errno
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvpaged.errors import StorageError
from kvpaged.testing.faulty_files import Died, FaultyFiles
from tests.lsm.small import Clock, number_of, open_store, value

KEYS = [b"a", b"a/1", b"b", b"page-0001", b"page-0002", b"z" * 300]
SIZES = st.sampled_from([0, 1, 15, 1024, 5000, 12_000])
keys = st.sampled_from(KEYS)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""No shrinking: it takes longer than any test may, and histories are read as well as they are."""
CAP = 512 << 10
"""Some values must go: what may live is about 200 KiB."""


class Crashes(RuleBasedStateMachine):
    """What each key may be found to have.

    `now` is what it has (`None`: nothing). `older` is what it had since it was last safe from a
    loss of power, and `ghosts` what a refused write may have left: after a kill a key has `now` or
    a ghost, after a loss of power one of all three.
    """

    def __init__(self, durability: Any, bounded: bool):
        super().__init__()
        self.durability, self.bounded = durability, bounded
        self.clock = Clock()
        self.now: dict[bytes, int | None] = dict.fromkeys(KEYS)
        self.older: dict[bytes, set[int | None]] = {key: set() for key in KEYS}
        self.ghosts: dict[bytes, set[int | None]] = {key: set() for key in KEYS}
        self.together: dict[bytes, int | None] = {}
        self.next = 1
        self.holes = False

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.files = FaultyFiles(seed)
        self.open()

    def open(self) -> None:
        changes: dict[str, Any] = {"max_bytes": CAP} if self.bounded else {}
        self.store = open_store(self.files, durability=self.durability, clock=self.clock, **changes)

    # -- what happens ------------------------------------------------------------------------------

    def take_number(self, size: int) -> int:
        self.next += 20_000
        return self.next

    def does(self, act: Callable[[], Any], wanted: dict[bytes, int | None]) -> None:
        """Do it, with what each key has afterwards."""
        try:
            act()
        except StorageError:
            for key, number in wanted.items():
                self.ghosts[key].add(number)
            return
        except Died:
            self.crash(self.dies_of_power, wanted)
            return
        for key, number in wanted.items():
            self.older[key].add(self.now[key])
            self.now[key] = number
            self.ghosts[key].clear()

    dies_of_power = False

    @rule(key=keys, size=SIZES)
    def put(self, key: bytes, size: int) -> None:
        number = self.take_number(size)
        tensor = value(number, size or 1)
        self.does(lambda: self.store.put(key, tensor), {key: number})

    @rule(key=keys, size=SIZES, present=st.booleans())
    def put_if(self, key: bytes, size: int, present: bool) -> None:
        number = self.take_number(size)
        tensor = value(number, size or 1)
        done = []

        def act() -> None:
            done.append((self.store.replace if present else self.store.add)(key, tensor))

        changed = self.store.contains(key) == present
        if self.bounded and changed == present:
            return  # it may be evicted to make room for this very put
        self.does(act, {key: number} if changed else {})
        assert done in ([], [changed])

    @rule(key=keys)
    def delete(self, key: bytes) -> None:
        self.does(lambda: self.store.delete(key), {key: None})

    @rule(chosen=st.lists(st.tuples(keys, SIZES), min_size=2, max_size=4))
    def batch(self, chosen: list[tuple[bytes, int]]) -> None:
        wanted: dict[bytes, int | None] = {}
        batch = self.store.batch()
        for key, size in chosen:
            if size == 0:
                batch.delete(key)
                wanted[key] = None
            else:
                number = self.take_number(size)
                batch.put(key, value(number, size))
                wanted[key] = number
        self.together = wanted
        self.does(batch.commit, wanted)
        self.together = {}

    @rule()
    def flush(self) -> None:
        try:
            self.store.flush()
        except StorageError:
            return
        except Died:
            self.crash(self.dies_of_power, {})
            return
        for key in KEYS:
            self.older[key].clear()

    @rule()
    def compact(self) -> None:
        try:
            self.store.compact()
        except StorageError:
            return
        except Died:
            self.crash(self.dies_of_power, {})

    @rule()
    def close_and_open(self) -> None:
        try:
            self.store.close()
        except StorageError:
            return self.crash(False, {})
        except Died:
            return self.crash(self.dies_of_power, {})
        self.forget_older()
        self.crash(False, {})

    @rule(key=keys, calls=st.integers(1, 2), power=st.booleans())
    def die_in_put(self, key: bytes, calls: int, power: bool) -> None:
        self.die_soon(calls, power)
        self.put(key, 12_000)

    @rule(calls=st.integers(1, 20), power=st.booleans())
    def die_in_flush(self, calls: int, power: bool) -> None:
        self.die_soon(calls, power)
        self.flush()

    @rule(calls=st.integers(1, 50), power=st.booleans())
    def die_in_compaction(self, calls: int, power: bool) -> None:
        self.die_soon(calls, power)
        self.compact()

    # -- faults ------------------------------------------------------------------------------------

    @rule(calls=st.integers(1, 12), power=st.booleans())
    def die_soon(self, calls: int, power: bool) -> None:
        self.dies_of_power = power
        self.files.die_in(calls)

    @rule(calls=st.integers(1, 8), number=st.sampled_from([errno.EIO, errno.ENOSPC]))
    def refuse_soon(self, calls: int, number: int) -> None:
        self.files.refuse_in(calls, number)

    @rule(power=st.booleans())
    def die_now(self, power: bool) -> None:
        self.crash(power, {})

    def crash(self, power: bool, wanted: dict[bytes, int | None]) -> None:
        """The process ends while `wanted` was being done."""
        self.files = self.files.powerless() if power else self.files.killed()
        self.reopen(power=power, wanted=wanted)

    def forget_older(self) -> None:
        for key in KEYS:
            self.older[key].clear()

    def reopen(self, *, power: bool = False, wanted: dict[bytes, int | None] | None = None) -> None:
        wanted = wanted or {}
        while True:
            try:
                self.open()
                break
            except Died:
                power |= self.dies_of_power
                self.files = self.files.powerless() if power else self.files.killed()
            except StorageError:
                self.files = self.files.killed()
        self.store.check_integrity()
        found = {key: number_of(self.store.get(key)) for key in KEYS}
        lossy = power if self.durability != "power" else False
        self.holes |= lossy  # what was not synced may be there though what came before is not
        assert self.holes or self.store.verify() == []
        lossy = lossy or self.durability == "none"
        for key in KEYS:
            allowed = {self.now[key], *self.ghosts[key]}
            allowed |= {wanted[key]} if key in wanted else set()
            allowed |= {*self.older[key], None} if lossy else set()
            allowed |= {None} if self.bounded else set()
            assert found[key] in allowed, (key, found[key], allowed, self.store.stats().damage)
        if self.together and not self.bounded and not lossy:
            done = {found[key] == number for key, number in self.together.items()}
            changing = {k for k, n in self.together.items() if n != self.now[k]}
            done = {found[key] == self.together[key] for key in changing}
            assert len(done) <= 1, "half a batch"
        self.now = found
        self.ghosts = {key: set() for key in KEYS}
        # What was found is in sealed files now, unless the disk refused.
        self.older = {key: set() if self.store.stats().error is None else {None} for key in KEYS}

    # -- what holds --------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        there = dict.fromkeys(KEYS)
        there.update((key, number_of(found)) for key, found in self.store.items())
        for key in KEYS:
            if there[key] is None and self.now[key] is not None:
                assert self.bounded or self.durability == "none", key
                self.older[key].add(self.now[key])
                self.ghosts[key].add(self.now[key])
                self.now[key] = None
            assert there[key] == self.now[key], key
            assert self.store.contains(key) == (there[key] is not None)
        if self.bounded:
            assert self.files.peak <= CAP

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.files.die_in(None)


@pytest.mark.parametrize("bounded", [False, True], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("durability", ["process", "power", "none"])
def test_what_was_acknowledged_is_there_or_absent_never_wrong(
    durability: str, bounded: bool, one_thread: None
) -> None:
    run(durability, bounded, examples=50, steps=30)


@pytest.mark.soak
@pytest.mark.parametrize("bounded", [False, True], ids=["unbounded", "bounded"])
@pytest.mark.parametrize("durability", ["process", "power", "none"])
def test_long_histories(durability: str, bounded: bool, one_thread: None) -> None:
    run(durability, bounded, examples=1000, steps=60)


def run(durability: str, bounded: bool, *, examples: int, steps: int) -> None:
    def machine() -> Crashes:
        return Crashes(durability, bounded)

    run_state_machine_as_test(
        machine,  # type: ignore[arg-type] # a factory will do
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None,
            phases=PHASES, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
