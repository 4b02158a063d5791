"""Any history of batches that share prefixes, beside dense arrays (`kvpaged.testing.histories`)."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from kvpaged.cache import PagedKVCache
from kvpaged.errors import OutOfPagesError
from kvpaged.testing.dense import DIM, LAYERS, PAGE
from kvpaged.testing.histories import RULES, Histories, drive
from kvpaged.testing.shapes import COMPRESSED, SHAPES, Shape
from kvpaged.testing.witness import DEEP
from kvpaged.token_batch import TokenBatch

STEPS = 10_000
"""Over all shapes, in each run of the suite."""
LENGTH = 60
SOAK, SOAK_LENGTH = 1_000_000, 2_500


pytestmark = pytest.mark.usefixtures("one_thread")


def machine(shape: Shape, counts: Counter[str]) -> type[RuleBasedStateMachine]:
    """A state machine of hypothesis with a rule for each of `RULES`."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.histories = Histories(shape, counts)

        def teardown(self) -> None:
            self.histories.cache.check_integrity()

    def rule_of(name: str) -> Callable[..., None]:
        def step(self: Any, **arguments: int) -> None:
            self.histories.run(name, **arguments)

        step.__name__ = name
        return step

    for name, (_, arguments) in RULES.items():
        ranges: dict[str, Any] = {
            argument: st.integers(0, most) for argument, most in arguments.items()
        }
        setattr(Machine, name, rule(**ranges)(rule_of(name)))
    return Machine


def run_any(shape: Shape, share: int) -> Counter[str]:
    """So many steps in histories of `LENGTH`, and what came of them."""
    counts: Counter[str] = Counter()
    run_state_machine_as_test(
        machine(shape, counts),
        settings=settings(
            max_examples=share // LENGTH + 8,
            stateful_step_count=LENGTH,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert counts["steps"] >= share
    return counts


@pytest.mark.parametrize("name", SHAPES)
def test_any_history(name):
    """Bytes, references, states, evictions and what is found, after each of 10,000 steps in all."""
    counts = run_any(SHAPES[name], STEPS // len(SHAPES) + 1)
    for what in (*RULES, "hits", "hits within a page"):
        assert counts[what], f"no {what} in {counts['steps']} steps"


@pytest.mark.parametrize("name", list(COMPRESSED)[::3])
def test_any_history_of_compressed_pages(name):
    """The same, but bytes of compressed pages are as near as their receipts say."""
    assert run_any(COMPRESSED[name], 1)["hits"]


@pytest.mark.parametrize("name", SHAPES)
def test_a_long_history(name):
    """Long enough for pages to be evicted, and for memory to run out, again and again."""
    counts: Counter[str] = Counter()
    drive(SHAPES[name], 30 * DEEP, list(SHAPES).index(name), counts)
    assert counts["evicted pages"] > 100
    assert counts["out of pages"] > 10
    assert counts["hits"] > 50


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_long_history_of_compressed_pages(name):
    """Pages of both classes are evicted, frames go from one to the other, rows rewind into pages
    that are compressed.
    """
    counts: Counter[str] = Counter()
    drive(COMPRESSED[name], 6 * DEEP, list(COMPRESSED).index(name), counts)
    assert counts["evicted pages"] > 20
    assert counts["out of pages"] > 3
    assert counts["hits"] > 5
    assert counts["attended steps"] > 5
    if "window" not in name and "fp8" not in name:
        assert counts["rewinds into compressed pages"] > 3


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("shapes", [SHAPES, COMPRESSED], ids=["exact", "compressed"])
def test_a_million_steps(shapes):
    counts: Counter[str] = Counter()
    began = time.monotonic()
    for seed in range(SOAK // SOAK_LENGTH):
        drive(list(shapes.values())[seed % len(shapes)], SOAK_LENGTH, seed, counts)
    rules = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    print(f"\n{counts['steps']:,} steps in {time.monotonic() - began:.0f} s: {rules}")
    assert counts["steps"] == SOAK


# -- histories that were once wrong ---------------------------------------------------------------


def compute(cache: PagedKVCache, batch: TokenBatch) -> None:
    zeros = torch.zeros(len(batch.tokens), 1, DIM)
    for layer in range(LAYERS):
        cache.attend(layer, zeros, zeros, zeros, batch)


def test_rows_that_change_places_keep_what_was_computed():
    """`select` dropped a step whose every layer had attended; `fork` and `rewind` counted it."""
    cache = SHAPES["full, layer-major"].make()
    batch = cache.batch([[1, 2, 3], [4]])
    compute(cache, batch)
    batch.select([1, 0])
    assert batch.lengths.tolist() == [1, 3]
    batch.extend([5, 6])
    batch.select([0])
    assert batch.lengths.tolist() == [1]


def test_a_namespace_that_was_left_and_taken_up_again_is_another():
    """A page begun before, filled meanwhile and published after held bytes of both."""
    cache = SHAPES["full, layer-major"].make()
    name, prompt = cache.namespace, list(range(PAGE - 2))
    batch = cache.batch([prompt])
    compute(cache, batch)
    batch.commit_computed()
    cache.refresh(b"another")
    batch.extend([90])
    compute(cache, batch)
    cache.refresh(name)
    batch.extend([91])
    compute(cache, batch)
    batch.commit_computed()
    assert batch.private is not None
    batch.close()
    assert cache.batch([[*prompt, 90, 91, 92]]).reused.tolist() == [0]


def test_a_batch_that_found_no_room_counts_as_none():
    """What it asked for was counted, and once more when it was tried again."""
    cache = SHAPES["full, layer-major"].make()
    with pytest.raises(OutOfPagesError):
        cache.batch([range(1_000_000)])
    assert cache.stats().reuse.asked == 0
    cache.batch([range(10)])
    assert cache.stats().reuse.asked == 10
