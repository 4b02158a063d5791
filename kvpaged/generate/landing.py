"""What came of steps: tokens entered, replies ended, those who listen told."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvpaged.generate.drafts import accept_drafts
from kvpaged.generate.flight import Flight
from kvpaged.generate.params import FinishReason
from kvpaged.generate.replies import tell
from kvpaged.generate.requests import Reply
from kvpaged.generate.rows import Rows
from kvpaged.generate.sampling import StepSampler
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Ints

End = Callable[[Reply, FinishReason, Exception | None], None]
"""Ends a reply and empties its row."""


class Landing:
    """Where steps' tokens are read.

    Between the launch of a step and its landing its rows may have lost their replies (they were
    cancelled, or had ended with the step before): what it gives for them is dropped.

    Attributes:
        waited_s: seconds spent so far waiting for tokens to be there.
    """

    def __init__(
        self, batch: SlotBatch, rows: Rows, sampler: StepSampler, *, end: End,
        before_end: Callable[[], None], clock: Callable[[], float],
    ) -> None:  # fmt: skip
        """
        Args:
            batch, rows, sampler: the engine's.
            end: ends a reply.
            before_end: called before the replies that a step has ended are.
            clock: seconds.
        """
        self._batch, self._rows, self._sampler = batch, rows, sampler
        self._end, self._before_end, self._clock = end, before_end, clock
        self.waited_s = 0.0

    def land(self, flight: Flight) -> int:
        """Enter the tokens of a step; returns how many that were, at the most one a row."""
        rows, batch, choice = self._rows, self._batch, flight.choice
        slots, index, ends = choice.slots, choice.index, flight.ends
        if not len(slots):
            return 0
        start = self._clock()
        tokens = flight.arrival.read()
        self.waited_s += self._clock() - start
        alive = flight.alive(rows)
        if flight.logprobs:
            read = [arrival.read() for arrival in flight.logprobs]
            self._sampler.note_logprobs(slots, flight.picked.at, alive, read)
        if choice.drafts is not None:
            slots, tokens = accept_drafts(batch, rows, choice.drafts, slots, tokens)
            index, ends = slots, batch.known[slots] + 1
            batch.known[slots] = ends
        else:
            if alive is not None:
                slots, tokens, ends = slots[alive], tokens[alive], ends[alive]
                index = slots
            batch.coming[index] -= 1
        batch.tokens[slots, ends - 1] = tokens
        hits = rows.stops[index] == tokens[:, None]
        stop = hits[:, 0] if hits.shape[1] == 1 else hits.any(1)
        self._settle(slots, tokens, stop, ends >= rows.limit[index], flight)
        return len(slots)

    def _settle(
        self, slots: Ints, tokens: npt.NDArray, stop: npt.NDArray[np.bool_],
        over: npt.NDArray[np.bool_], flight: Flight,
    ) -> None:  # fmt: skip
        rows = self._rows
        for slot, error in flight.picked.errors:
            if (reply := rows.replies[slot]) is not None:
                self._batch.known[slot] -= 1  # the token stands for one that could not be chosen
                self._end(reply, "error", error)
        if rows.counted["first"]:
            self._note_first(slots[rows.first[slots]])
        talks = np.flatnonzero(rows.talks[slots]).tolist() if rows.counted["talks"] else ()
        for place in talks:
            reply = rows.replies[int(slots[place])]
            last = bool(stop[place] or over[place])
            try:
                if reply is not None and tell(reply, int(tokens[place]), last=last):
                    stop[place] = True
            except Exception as error:  # a tokenizer's: of this reply alone
                assert reply is not None
                self._end(reply, "error", error)
        ended = np.flatnonzero(stop | over).tolist()
        if ended:
            self._before_end()
        for place in ended:
            if (reply := rows.replies[int(slots[place])]) is not None:
                self._end(reply, "stop" if stop[place] else "length", None)

    def _note_first(self, slots: Ints) -> None:
        now = self._clock()
        for slot in slots.tolist():
            if (reply := self._rows.replies[slot]) is not None:
                reply.completion.first_token_s = now - reply.request.submitted
        self._rows.first[slots] = False
        self._rows.recount()
