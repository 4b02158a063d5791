"""Rows that begin with pages of tiers: who waits for them, and what becomes of them."""

from collections.abc import Sequence

import numpy as np

from kvpaged.generate.pages import PageNeeds
from kvpaged.generate.requests import Line
from kvpaged.generate.rows import Rows
from kvpaged.offload.promotion import LoadError
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Step

LOOK_S, FOREVER = 0.002, 1e6
"""How often one looks for which of several loads is ready; for one alone."""


class Loads:
    """The promotions of an engine's rows. One thread at a time."""

    def __init__(self, batch: SlotBatch, rows: Rows, needs: PageNeeds) -> None:
        self._batch, self._rows, self._needs = batch, rows, needs

    def call_ahead(self, lines: Sequence[Line]) -> None:
        """Have what lower tiers have of those that wait come up, once for each."""
        new = [line for line in lines if not line.called]
        if not new or not self._needs.has_tiers:
            return
        trails = self._needs.trails([line.reply for line in new])
        for line, trail in zip(new, trails, strict=True):
            line.called = True
            self._needs.ahead(line.reply, trail)

    def computing(self) -> set[int]:
        """What stands for the pages that running prompts have still to compute, or to load."""
        found: set[int] = set()
        for slot in np.flatnonzero(self._rows.prefilling).tolist():
            reply = self._rows.replies[slot]
            if reply is not None:
                found.update(reply.chain[self._batch.certain(slot) // self._needs.page_size :])
        return found

    def settle(self) -> list[int]:
        """Let rows whose promotion is over hold what has come; between steps.

        Returns:
            Rows that take no part in the next step: their pages have not begun to land.
        """
        held = []
        for slot, promotion in list(self._batch.loading.items()):
            ready = promotion.ready()
            if promotion.over:
                found = self._batch.settle_loading(slot)
                reply = self._rows.replies[slot]
                if reply is not None and not reply.completion.preemptions:
                    for each in (reply, *(sibling for sibling, _ in reply.siblings)):
                        each.completion.cached_tokens = found
            elif not ready:
                held.append(slot)
        return held

    def wait(self) -> None:
        """Nothing else is to be done: wait until some row's pages begin to land, or are late."""
        loading = list(self._batch.loading.values())
        while loading and not any(promotion.ready() for promotion in loading):
            loading[0].wait_ready(FOREVER if len(loading) == 1 else LOOK_S)

    def gate(self, step: Step) -> None:
        """Have a step's attention wait for the layers that its rows' pages land by."""
        step.gates = tuple(
            promotion for slot, promotion in self._batch.loading.items() if step.counts[slot]
        )

    def check(self, step: Step) -> None:
        """A pass has been made: see that all it read had come.

        Raises:
            LoadError: it had not; the step does not count.
        """
        for gate in step.gates:
            outcome = gate.wait()
            if outcome.error is not None:
                raise LoadError(f"pages were not loaded: {outcome.error}")

    def failed(self, step: Step) -> bool:
        """Whether a step's pages have not come."""
        outcomes = [gate.outcome for gate in step.gates]
        return any(outcome is not None and outcome.error is not None for outcome in outcomes)
