"""Any history of batches against dense tensors: a random machine, and short ones that matter."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpaged.errors import OutOfPagesError
from tests.dense import DIM, KV_HEADS, LAYERS, Q_HEADS, Oracle, geometry, make


def decoded(rows: int, tokens: int) -> tuple[Any, Oracle]:
    """Equal rows that have decoded a few tokens: the next step takes the plan of the last."""
    cache = make()
    batch = cache.batch([range(tokens)] * rows)
    oracle = Oracle(cache, batch)
    oracle.compute()
    for _ in range(3):
        batch.extend([1] * rows)
        oracle.compute()
    batch.commit_computed()
    return batch, oracle


def test_a_rewind_between_decode_steps():
    batch, oracle = decoded(1, 5)
    oracle.rewind(0, 6)
    batch.extend([1])
    oracle.compute()


def test_a_fork_between_decode_steps():
    batch, oracle = decoded(1, 5)
    oracle.fork(0)
    batch.extend([1, 1])
    oracle.compute()


def test_rows_swapped_between_decode_steps():
    batch, oracle = decoded(2, 5)
    batch.select([1, 0])
    oracle.rows.reverse()
    batch.extend([1, 1])
    oracle.compute()


def test_a_ragged_step_between_decode_steps():
    batch, oracle = decoded(2, 14)
    for tokens in ([[1], []], [[1], [1, 1]], [[1], [1]], [[1], [1]]):
        batch.extend(tokens)
        oracle.compute()


@pytest.mark.parametrize("forked", [False, True])
def test_nan_that_a_rewind_leaves_behind_is_never_seen(forked):
    """Slots past the end of a row are masked by adding -inf, which NaN would survive."""
    batch, oracle = decoded(2, 5)
    batch.extend([[1] * 5, [1] * 2])
    for layer in range(LAYERS):
        nan = torch.full((7, KV_HEADS, DIM), torch.nan)
        oracle.cache.attend(layer, torch.zeros(7, Q_HEADS, DIM), nan, nan, batch)
    batch.commit_computed()
    for row in range(2):
        oracle.rewind(row, 8)
    if forked:
        oracle.fork(0)
    batch.extend([[1], [1, 1], [1]][: batch.rows])
    oracle.compute()
    batch.extend([1] * batch.rows)
    oracle.compute()


def test_nan_of_a_step_that_did_not_count_is_never_seen():
    batch, oracle = decoded(2, 5)
    batch.extend([[1] * 40, [1]])
    nan = torch.full((41, KV_HEADS, DIM), torch.nan)
    oracle.cache.attend(0, torch.zeros(41, Q_HEADS, DIM), nan, nan, batch)
    batch.drop_step()
    batch.extend([[1] * 20, [1]])
    oracle.compute()
    assert len(batch.page_map()[0]) == 2
    batch.extend([1, 1])
    oracle.compute()


class Histories(RuleBasedStateMachine):
    """Any order of steps, forks, rewinds and closes, against dense tensors; books after each."""

    @initialize(layout=st.sampled_from(["page-major", "layer-major"]))
    def start(self, layout: str) -> None:
        self.cache = make("cpu", layout, memory=geometry().page_bytes * 24)
        self.oracles: list[Oracle] = []

    @rule(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3))
    def open_batch(self, lengths: list[int]) -> None:
        try:
            batch = self.cache.batch([range(n) for n in lengths])
        except OutOfPagesError:
            return
        oracle = Oracle(self.cache, batch, len(self.oracles))
        oracle.compute()
        batch.commit_computed()
        self.oracles.append(oracle)

    @precondition(lambda self: self.oracles)
    @rule(pick=st.integers(0, 9), counts=st.lists(st.integers(0, 20), min_size=4, max_size=4))
    def step(self, pick: int, counts: list[int]) -> None:
        oracle = self.oracles[pick % len(self.oracles)]
        rows = [[1] * counts[row % 4] for row in range(oracle.batch.rows)]
        before = [m.tolist() for m in oracle.batch.page_map()]
        try:
            oracle.batch.extend(rows)
        except OutOfPagesError:
            assert [m.tolist() for m in oracle.batch.page_map()] == before
            return
        oracle.compute()
        oracle.batch.commit_computed()

    @precondition(lambda self: self.oracles)
    @rule(pick=st.integers(0, 9), steps=st.integers(1, 4))
    def decode(self, pick: int, steps: int) -> None:
        oracle = self.oracles[pick % len(self.oracles)]
        for _ in range(steps):
            try:
                oracle.batch.extend([1] * oracle.batch.rows)
            except OutOfPagesError:
                return
            oracle.compute()
            oracle.batch.commit_computed()

    @precondition(lambda self: self.oracles)
    @rule(pick=st.integers(0, 9), row=st.integers(0, 9))
    def fork(self, pick: int, row: int) -> None:
        oracle = self.oracles[pick % len(self.oracles)]
        if oracle.batch.rows < 5:
            oracle.fork(row % oracle.batch.rows)

    @precondition(lambda self: self.oracles)
    @rule(pick=st.integers(0, 9), row=st.integers(0, 9), share=st.floats(0, 1))
    def rewind(self, pick: int, row: int, share: float) -> None:
        oracle = self.oracles[pick % len(self.oracles)]
        row %= oracle.batch.rows
        oracle.rewind(row, int(oracle.batch.lengths[row] * share))

    @precondition(lambda self: self.oracles)
    @rule(pick=st.integers(0, 9))
    def close(self, pick: int) -> None:
        self.oracles.pop(pick % len(self.oracles)).batch.close()

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        rows = sum(oracle.batch.rows for oracle in self.oracles)
        held = [m for oracle in self.oracles for m in oracle.batch.page_map()]
        used = {int(page) for pages in held for page in pages}
        assert len(held) == rows
        assert self.cache.stats().used == len(used) * geometry().page_bytes

    def teardown(self) -> None:
        for oracle in getattr(self, "oracles", []):
            for row, layers in enumerate(oracle.rows):
                ids = np.asarray(oracle.batch.page_map()[row])
                for layer, (k, v) in enumerate(layers):
                    pages = self.cache.classes[0].layers[layer]
                    entries = self.cache.classes[0].exact.entry_tensor(ids)
                    for stored, expected in ((pages.k_pages, k), (pages.v_pages, v)):
                        assert stored is not None
                        flat = stored[entries].permute(0, 2, 1, 3).flatten(0, 1)
                        assert torch.equal(flat[: len(expected)], expected)


Histories.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestHistories = Histories.TestCase
