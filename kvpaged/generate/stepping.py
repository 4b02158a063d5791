"""Steps, made of the scheduler's plans: whose tokens are computed, and where their ids are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvpaged.generate import scheduler
from kvpaged.generate.drafts import write_drafts
from kvpaged.generate.flight import Flight
from kvpaged.generate.rows import Rows
from kvpaged.generate.sampling import Choice, StepSampler
from kvpaged.generate.scheduler import StepPlan
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Ints, Step


class Made(NamedTuple):
    """A step that has begun, what is chosen from it, and its ids, int64 on the device."""

    step: Step
    choice: Choice
    ids: Tensor


@dataclass(slots=True)
class Steady:
    """The plan of steps of one token for each of the same rows.

    Attributes:
        plan: whose.
        counts: int64 `[rows]` of the batch.
        choice: of their tokens.
        left: steps until a row reaches its limit.
        tokens: int64 `[n]` on the device: what the step before gave for just these rows.
    """

    plan: StepPlan
    counts: Ints
    choice: Choice
    left: int
    tokens: Tensor | None = None


class StepMaker:
    """Makes the steps of an engine's rows; those of the same rows one after another from what the
    first of them was.
    """

    def __init__(
        self, batch: SlotBatch, rows: Rows, sampler: StepSampler, budget: int, chunk: int
    ) -> None:
        self._batch, self._rows, self._sampler = batch, rows, sampler
        self._budget, self._chunk = budget, chunk
        self._nothing: Ints = np.zeros(batch.rows, np.int64)
        self._steady: Steady | None = None

    def change(self) -> None:
        """Rows have come or gone."""
        self._steady = None

    def launched(self, tokens: Tensor) -> None:
        """The step made last gives these tokens, int64 `[n]` on the device."""
        if self._steady is not None:
            self._steady.tokens = tokens

    def make(self, flight: Flight | None, held: Sequence[int] = ()) -> Made | None:
        """The next step, or `None`: nothing is to be computed.

        Args:
            flight: the step whose tokens have not been read.
            held: rows that take no part, as their pages have not come.

        Raises:
            OutOfPagesError: see `Batch.begin`.
        """
        if (steady := self._steady) is not None and steady.left > 0:
            return self._next(steady, flight)
        return self._begin(flight, held)

    def _next(self, steady: Steady, flight: Flight | None) -> Made:
        """A step of the rows of the one before, one token each."""
        batch, choice, step = self._batch, steady.choice, None
        self._sampler.again(choice)
        if steady.tokens is not None:
            step = batch.again(None if choice.draws is None else choice.told())
        if step is not None and steady.tokens is not None:
            ids = steady.tokens
        else:
            step, ids = self._begin_plan(steady.plan, steady.counts, choice, flight)
        steady.left -= 1
        return Made(step, choice, ids)

    def _begin(self, flight: Flight | None, held: Sequence[int]) -> Made | None:
        """A step of whoever has something to compute."""
        batch, rows = self._batch, self._rows
        self._steady = None
        drafts = write_drafts(batch, rows) if rows.counted["lookup"] else self._nothing
        known = np.minimum(batch.known, rows.limit - 1)
        if held:
            known[list(held)] = batch.lengths[list(held)]
        plan = scheduler.plan_step(
            done=batch.lengths, known=known, drafts=drafts,
            prefilling=rows.prefilling, rank=rows.rank, budget=self._budget, chunk=self._chunk,
        )  # fmt: skip
        if not len(plan.order):
            return None
        counts = np.zeros(batch.rows, np.int64)
        counts[plan.order] = plan.counts
        drafted = rows.counted["lookup"] and bool(drafts.any())
        choice = self._sampler.choose(plan.order, plan.counts, drafts if drafted else None)
        step, ids = self._begin_plan(plan, counts, choice, flight)
        quiet = not (rows.counted["prefilling"] or rows.counted["lookup"])
        if quiet and bool((plan.counts == 1).all()):
            left = int((rows.limit - batch.known)[plan.order].min()) - 1
            self._steady = Steady(plan, counts, choice, left)
        return Made(step, choice, ids)

    def _begin_plan(
        self, plan: StepPlan, counts: Ints, choice: Choice, flight: Flight | None
    ) -> tuple[Step, Tensor]:
        """Begin a planned step: ids that are here are sent, those on their way are taken from the
        flight, on the device.
        """
        batch, order = self._batch, plan.order
        ends = np.cumsum(plan.counts)
        base = np.repeat(batch.lengths[order] - ends + plan.counts, plan.counts)
        ids = batch.tokens[np.repeat(order, plan.counts), base + np.arange(ends[-1])]
        told = choice.told()
        coming = np.flatnonzero(batch.coming[order]) if flight is not None else ()
        if flight is None or not len(coming):
            step = batch.begin(counts, ids, order=order, more=told)
            return step, step.tokens.long()
        where = np.zeros(batch.rows, np.int64)
        where[flight.choice.slots] = np.arange(len(flight.choice.slots))
        links = np.concatenate([ends[coming] - 1, where[order[coming]]]).astype(np.int32)
        step = batch.begin(counts, ids, order=order, more=np.concatenate([told, links]))
        places, sources = step.more[len(told) :].long().view(2, -1)
        device_ids = step.tokens.long()
        device_ids[places] = flight.tokens[sources]
        return step, device_ids
