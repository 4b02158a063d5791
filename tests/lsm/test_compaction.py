"""The planner by hand-made states, by a simulator, and in a store."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.errors import ConfigError
from kvpaged.lsm.batch import Put
from kvpaged.lsm.compaction import (
    FAN,
    LEVELS,
    Limits,
    SegmentState,
    Task,
    apply,
    output_bytes,
    plan,
    plan_all,
)
from kvpaged.lsm.eviction import Candidates, lru, lru_except
from kvpaged.lsm.order import Link, locality
from kvpaged.lsm.segment import prefix_of
from kvpaged.lsm.store import TensorStore
from kvpaged.testing.compaction import Simulator
from kvpaged.testing.faulty_files import FaultyFiles
from tests.lsm.small import KIB, Clock, number_of, open_store, options, value

MIB = 1 << 20
FULL = 64 * MIB
LIMITS = Limits(FULL, 1 << 40)


def segment(id: int, live: float = 1.0, **changes: int) -> SegmentState:
    made = SegmentState(id, 0, FULL, int(live * FULL * 0.99), 32 if live else 0)
    return made._replace(**changes)


# -- the planner -----------------------------------------------------------------------------------


def test_nothing_is_due():
    assert plan([], LIMITS) is None
    assert plan([segment(n) for n in range(100)], LIMITS) is None


def test_empty_segments_go_first_and_cost_nothing():
    assert plan([segment(1), segment(2, 0), segment(3, 0.1)], LIMITS) == ((2,), 0, "empty")
    assert plan([segment(1), segment(2, 0)], Limits(FULL, 0)) == ((2,), 0, "empty")


def test_the_most_dead_are_rewritten_as_many_as_give_a_full_one():
    states = [segment(1), segment(2, 0.5), segment(3, 0.3), segment(4, 0.9), segment(5, 0.4)]
    task = plan(states, LIMITS)
    assert task is not None
    assert (task.inputs, task.reason) == ((3, 5), "dead")
    few = [segment(n) for n in range(10)] + [segment(20, 0.5)]
    assert plan(few, LIMITS) is None
    assert plan(few, LIMITS._replace(short=True)) == ((20,), 0, "dead")


def test_a_task_never_writes_more_than_there_is_room():
    states = [segment(1, 0.3), segment(2, 0.3), segment(3, 0.8)]
    assert plan(states, Limits(FULL, FULL // 2)) == ((1,), 0, "dead")
    assert plan(states, Limits(FULL, FULL // 10)) is None


def test_small_ones_of_like_size_are_merged():
    small = [segment(n, file_bytes=MIB, live_bytes=MIB - 9000) for n in range(FAN)]
    task = plan(small, LIMITS)
    assert task is not None
    assert (len(task.inputs), task.reason) == (FAN, "small")
    assert plan(small[1:], LIMITS) is None
    unlike = [*small[1:], segment(99, file_bytes=9 * MIB, live_bytes=9 * MIB - 9000)]
    assert plan(unlike, LIMITS) is None


def test_chains_in_pieces_are_put_in_order_at_most_so_often():
    for level in range(LEVELS + 1):
        loose = [segment(n, level=level, linked=30, broken=20) for n in range(FAN)]
        task = plan(loose, LIMITS)
        if level == LEVELS:
            assert task is None
        else:
            assert task == (tuple(range(FAN)), level + 1, "order")
    assert plan([segment(n, linked=30, broken=3) for n in range(FAN)], LIMITS) is None


def test_everything_is_rewritten_once():
    states = [segment(n, 0.5) for n in range(6)]
    done: set[int] = set()
    tasks: list[Task] = []
    while task := plan_all(states, Limits(FULL, 2 * FULL), done):
        output = segment(100 + len(tasks))
        tasks.append(task)
        done.add(output.id)
        states = apply(states, task, [output])
    assert sorted(n for task in tasks for n in task.inputs) == list(range(6))
    assert [s.id for s in states] == sorted(done)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(0, 1)), max_size=40),
    st.integers(0, 300),
    st.booleans(),
)
def test_any_plan_keeps_to_its_limits(segments, room, short):
    states = [
        segment(n, live / 100, level=level, linked=10, broken=10 * broken)
        for n, (live, level, broken) in enumerate(segments)
    ]
    limits = Limits(FULL, room * MIB, short)
    task = plan(states, limits)
    if task is not None:
        chosen = [states[n] for n in task.inputs]
        written = output_bytes(chosen, FULL)
        assert written <= limits.room
        assert len(set(task.inputs)) == len(task.inputs)
        if task.reason in ("dead", "empty"):
            assert written < sum(one.file_bytes for one in chosen)


# -- the order of values ---------------------------------------------------------------------------


def test_a_prompt_lies_in_one_piece_and_its_siblings_behind_it():
    links = [
        Link(b"a2", b"a1"), Link(b"x", b""), Link(b"a1", b""), Link(b"b3", b"a2"),
        Link(b"a3", b"a2"), Link(b"a4", b"a3"), Link(b"c1", b"elsewhere"),
    ]  # fmt: skip
    ordered = [links[n].key for n in locality(links)]
    assert ordered == [b"a1", b"a2", b"a3", b"a4", b"b3", b"c1", b"x"]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), unique_by=lambda pair: pair[0]))
def test_every_value_has_one_place_whatever_its_parent(pairs):
    links = [Link(b"%02d" % key, b"%02d" % parent if parent else b"") for key, parent in pairs]
    order = locality(links)
    assert sorted(order) == list(range(len(links)))
    places = {links[n].key: at for at, n in enumerate(order)}
    only = {p for p in {link.parent for link in links} if sum(x.parent == p for x in links) == 1}
    keys = set(places)
    for link in links:  # an only child of a parent that is no descendant lies right behind it
        above, seen = link.parent, {link.key}
        while above in keys and above not in seen:
            seen.add(above)
            above = next(one.parent for one in links if one.key == above)
        if link.parent in keys and link.parent in only and above not in seen:
            assert places[link.key] == places[link.parent] + 1


def test_lru_takes_what_expired_then_the_oldest_then_the_tail():
    column = lambda *numbers: torch.tensor(numbers, dtype=torch.uint64).numpy()  # noqa: E731
    values = Candidates(
        column(5, 5, 1, 9), column(1, 2, 3, 4), column(10, 10, 10, 10), column(0, 0, 0, 7),
        column(*(prefix_of(key) for key in (b"pa", b"s", b"sun and moon", b"p"))),
    )  # fmt: skip
    assert lru(values, 1, now=8).tolist() == [3]
    assert lru(values, 25, now=8).tolist() == [3, 2, 1]
    assert lru(values, 25, now=6).tolist() == [2, 1, 0]
    assert lru(values, 10**9, now=6).tolist() == [2, 1, 0, 3]
    assert lru_except(b"s")(values, 10**9, now=6).tolist() == [0, 3]
    assert lru_except(b"s")(values, 5, now=8).tolist() == [3]
    assert lru_except(b"sun")(values, 10**9, now=6).tolist() == [1, 0, 3]
    with pytest.raises(ConfigError, match="1 to 8 bytes, not 9"):
        lru_except(b"sun and m")


# -- simulated -------------------------------------------------------------------------------------


def test_bounded_and_overwritten_at_random():
    rng = random.Random(1)
    simulator = Simulator(MIB, max_bytes=64 * MIB)
    for _ in range(6000):
        simulator.put(b"%d" % rng.randrange(2000), rng.randrange(20, 60) * KIB)
    assert simulator.peak <= 64 * MIB
    assert simulator.evicted > 0
    assert simulator.live_bytes() > 0.7 * 64 * MIB
    assert simulator.written_bytes / simulator.put_bytes < 4


def test_bounded_and_never_overwritten():
    simulator = Simulator(MIB, max_bytes=64 * MIB)
    for number in range(6000):
        simulator.put(b"%d" % number, 40 * KIB)
    assert simulator.peak <= 64 * MIB
    assert simulator.written_bytes / simulator.put_bytes < 1.2


def test_unbounded_and_overwritten_at_random():
    rng = random.Random(2)
    simulator = Simulator(MIB)
    for _ in range(6000):
        simulator.put(b"%d" % rng.randrange(1000), 40 * KIB)
    assert simulator.used_bytes() < 1.25 * simulator.live_bytes()
    assert simulator.written_bytes / simulator.put_bytes < 5


def test_interleaved_prompts_are_put_in_order_at_bounded_cost():
    simulator = Simulator(MIB)
    for page in range(40):
        for prompt in range(50):
            parent = b"%d-%d" % (prompt, page - 1) if page else b""
            simulator.put(b"%d-%d" % (prompt, page), 40 * KIB, parent)
    assert simulator.reasons.keys() == {"order"}
    assert simulator.written_bytes / simulator.put_bytes < 1.1 + LEVELS


# -- in a store ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_prompt_of_32_pages_comes_back_in_two_reads(tmp_path, codec):
    given = {"codec": codec, "segment_bytes": 2 * MIB}
    with TensorStore(tmp_path, options=options(**given)) as store:
        pages = torch.randn(6, 32, 10_000).bfloat16()
        for page in range(32):
            for prompt in range(6):
                parent = b"%d/%d" % (prompt, page - 1) if page else b""
                store.put(b"%d/%d" % (prompt, page), pages[prompt, page], parent=parent)
        keys = [[b"%d/%d" % (prompt, page) for page in range(32)] for prompt in range(6)]
        store.flush()
        before = runs(store, keys[3])
        store.compact()
        for prompt in range(6):
            assert runs(store, keys[prompt]) <= 2
        assert before > 2
        for prompt in range(6):
            found: Any = store.get_many(keys[prompt])
            assert all(torch.equal(a, b) for a, b in zip(found, pages[prompt], strict=True))
        assert store.verify() == []


def runs(store: TensorStore, keys: list[bytes]) -> int:
    before = store.stats().runs
    store.get_many(keys)
    return store.stats().runs - before


def test_compaction_keeps_to_its_pace(monkeypatch):
    waits: list[float] = []
    with open_store(FaultyFiles(), compact_bytes_per_s=100_000) as store:
        store.put_many({b"%d" % n: value(n, 5000) for n in range(20)})
        store.flush()
        monkeypatch.setattr(store._cond, "wait_for", lambda _, timeout=None: waits.append(timeout))
        store.compact()
        assert sum(waits) == pytest.approx(store.stats().live_bytes / 100_000, rel=0.1)


def test_files_are_sealed_while_everything_is_rewritten(monkeypatch):
    store = open_store(FaultyFiles(), segment_bytes=32 * KIB, memtable_bytes=64 * KIB)
    with store:
        store.put_many({b"%d" % n: value(n, 5000) for n in range(10)})
        assert store._keeper is not None
        merger, sealed = store._keeper.compactor.merger, []
        pace = merger.pace

        def puts_between(size: int) -> None:
            """A task is under way, and no thread but this one may seal anything."""
            monkeypatch.setattr(merger, "pace", pace)
            for n in range(20):
                store._writer.put([store._coming(Put(b"new %d" % n, value(n, 5000)))])  # type: ignore[union-attr]
                pace(size)
                sealed.append(len(store._tree.sealing))

        monkeypatch.setattr(merger, "pace", puts_between)
        monkeypatch.setattr(store._keeper, "help", lambda: False)  # as in other threads
        store.compact()
        assert len(sealed) == 20
        assert max(sealed) <= 1
        assert [number_of(store.get(b"new %d" % n)) for n in range(20)] == list(range(20))
        store.check_integrity()


def test_what_was_not_asked_for_is_recoded():
    clock = Clock()
    given = {"cold_codec": "zstd", "cold_after_s": 100.0, "clock": clock}
    with open_store(FaultyFiles(), **given) as store:
        store.put_many({b"%d" % n: torch.zeros(20_000) + n for n in range(4)})
        clock.now += 200_000
        store.get(b"2")
        store.compact()
        coded = {key: store.info(key).parts[0].codec for key in store.scan()}  # type: ignore[union-attr]
        assert coded == {b"0": 1, b"1": 1, b"2": 0, b"3": 1}
        assert store.stats().recoded == 3
        for n in range(4):
            found: Any = store.get(b"%d" % n)
            assert torch.equal(found, torch.zeros(20_000) + n)
        assert store.verify() == []


def test_compaction_goes_on_behind_puts(tmp_path):
    given = {"background": True, "segment_bytes": 256 * KIB, "max_bytes": 8 * MIB}
    with TensorStore(tmp_path, options=options(**given)) as store:
        for turn in range(1200):
            store.put(b"%d" % (turn % 100), value(turn, 6000))
        stats = store.stats()
        assert stats.compactions > 0
        assert stats.used_bytes <= 8 * MIB
        assert [number_of(store.get(b"%d" % n)) for n in range(100)] == list(range(1100, 1200))
        store.check_integrity()


def test_values_read_while_their_segment_is_rewritten(tmp_path):
    given = {"background": True, "segment_bytes": 256 * KIB, "codec": "raw", "read_threads": 4}
    with TensorStore(tmp_path, options=options(**given)) as store:
        store.put_many({b"%d" % n: value(n, 5000) for n in range(100)})
        views = store.view_many([b"%d" % n for n in range(100)])
        for _ in range(5):
            store.compact()
            found = store.get_many([b"%d" % n for n in range(100)])
            assert [number_of(one) for one in found] == list(range(100))
        assert [number_of(one) for one in views] == list(range(100))
        names = [path.name for path in sorted(tmp_path.iterdir())]
        assert len([name for name in names if name.endswith(".seg")]) == store.stats().segments


def test_levels_and_dead_bytes_are_told():
    with open_store(FaultyFiles()) as store:
        store.put_many({b"%d" % n: value(n, 5000) for n in range(30)})
        store.compact()
        stats = store.stats()
        assert sum(stats.levels.values()) == stats.segments
        assert 1 <= stats.space_amplification < 1.2
        assert 1 <= stats.write_amplification < 2.5
        sizes = [s.file_bytes for s in store._tree.segments.values()]
        assert all(abs(a - b) < 96 * KIB for a, b in pairwise(sizes))
