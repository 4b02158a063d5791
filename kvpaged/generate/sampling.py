"""Which logits a step is to give, and the tokens chosen from them: for all its rows at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.generate.params import TokenLogprobs
from kvpaged.generate.requests import Reply
from kvpaged.generate.rows import Rows
from kvpaged.generate.sampler import draw, greedy, log_probabilities, penalise
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Index, Ints, Step, as_index


@dataclass(slots=True)
class Choice:
    """Which logits a step gives, and how tokens are chosen from them.

    Attributes:
        slots: int64 `[n]`, whose tokens they are: of a row with drafts one for each place, of a
            prompt with several replies one for each.
        index: the same, as a slice where rows lie side by side.
        take: int32 `[n]`, the step's tokens whose logits they come from.
        draws: what `Rows.sampling` made, or `None`.
        drafts: int64 `[rows]`, guessed tokens of each row; `None`: none has any.
        every: they are all of the step's tokens, in order.
    """

    slots: Ints
    index: Index
    take: npt.NDArray[np.int32]
    draws: npt.NDArray[np.int32] | None
    drafts: Ints | None
    every: bool

    def told(self) -> npt.NDArray[np.int32]:
        """What the device needs of it."""
        return self.take if self.draws is None else np.concatenate([self.take, self.draws])


class Picked(NamedTuple):
    """Tokens chosen for a step, on the device.

    Attributes:
        tokens: int64 `[n]`.
        logprobs: where some row wants them, see `log_probabilities`: of the places `at`.
        at: int64, on the host.
        errors: rows for which no token could be chosen, and why.
    """

    tokens: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None
    at: Ints
    errors: list[tuple[int, Exception]]


class StepSampler:
    """Chooses the tokens of steps."""

    def __init__(self, batch: SlotBatch, rows: Rows) -> None:
        self._batch, self._rows = batch, rows
        self._seen: Tensor | None = None
        self._errors: list[tuple[int, Exception]] = []
        self._penalised: dict[int, Ints] = {}

    def enter(self, slot: int, ids: Ints) -> None:
        """A row begins with these tokens."""
        self._penalised.pop(slot, None)
        if self._rows.penalty[slot] != 1:
            self._penalised[slot] = ids
        elif self._seen is not None:
            self._seen[slot] = False

    def choose(self, order: Ints, counts: Ints, drafts: Ints | None) -> Choice:
        """Decide which tokens a step gives."""
        batch, rows = self._batch, self._rows
        ends = np.cumsum(counts)
        reach = batch.lengths[order] + counts
        if drafts is not None:
            reach = reach - drafts[order]
        whole = reach == batch.known[order]
        slots, take = order[whole], ends[whole] - 1
        nth = batch.known[slots] - rows.prompt[slots]
        if drafts is not None:
            many = drafts[slots] + 1
            place = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
            take = np.repeat(take - drafts[slots], many) + place
            nth = np.repeat(nth, many) + place
            slots = np.repeat(slots, many)
        if rows.counted["prefilling"]:
            slots, take, nth = self._with_siblings(slots, take, nth)
        draws = rows.sampling(slots, nth)
        every = len(take) == int(ends[-1]) and bool((take == np.arange(len(take))).all())
        return Choice(slots, as_index(slots), take.astype(np.int32), draws, drafts, every)

    def again(self, choice: Choice) -> None:
        """Make `choice`, of one token a row, that of the next token of the same rows."""
        if choice.draws is not None:
            nth = self._batch.known[choice.slots] - self._rows.prompt[choice.slots]
            choice.draws = self._rows.sampling(choice.slots, nth)

    def _with_siblings(self, slots: Ints, take: Ints, nth: Ints) -> tuple[Ints, Ints, Ints]:
        more = [
            (kept, take[place], nth[place])
            for place, slot in enumerate(slots.tolist())
            if (reply := self._rows.replies[slot]) is not None
            for _, kept in reply.siblings
        ]
        if not more:
            return slots, take, nth
        added = np.array(more, np.int64).T
        return tuple(np.concatenate(pair) for pair in zip((slots, take, nth), added, strict=True))  # type: ignore[return-value]

    def pick(self, choice: Choice, step: Step, logits: Tensor) -> Picked:
        """The tokens of logits `[n, vocabulary]`."""
        rows, slots = self._rows, choice.slots
        self._errors = []
        scores = self._processed(slots, logits)
        count = len(slots)
        if choice.draws is None:
            tokens = greedy(scores)
        else:
            told = step.more[count:]
            floats = told[: 4 * count].view(torch.float32).view(4, count)
            filters = rows.filters[slots]
            top_k = rows.top_k[slots][filters]
            most = int(top_k.max(initial=0)) if (top_k > 0).all() else 0
            tokens = draw(
                scores.float(), uniform=floats[0], temperature=floats[1], top_p=floats[2],
                min_p=floats[3], top_k=told[4 * count : 5 * count], filters=bool(filters.any()),
                most=most,
            )  # fmt: skip
        if self._seen is not None:
            chosen = torch.from_numpy(slots).to(tokens.device)
            self._seen[chosen, tokens] = True
        if not rows.counted["logprobs"]:
            return Picked(tokens, None, slots[:0], self._errors)
        wanted = rows.logprobs[slots]
        at = np.flatnonzero(wanted >= 0)
        mine = torch.from_numpy(at).to(logits.device)
        most = int(wanted.max(initial=0))
        return Picked(tokens, log_probabilities(logits[mine], tokens[mine], most), at, self._errors)

    def _processed(self, slots: Ints, logits: Tensor) -> Tensor:
        """Scores after each row's processors and penalty."""
        rows = self._rows
        scores = logits
        if rows.counted["processors"]:
            scores = logits.float().clone()
            for place in np.flatnonzero(rows.processors[slots]).tolist():
                self._run_processors(place, int(slots[place]), scores)
        if self._penalised or self._seen is not None:
            scores = self._with_penalty(slots, scores.float())
        return scores

    def _run_processors(self, place: int, slot: int, scores: Tensor) -> None:
        reply = self._rows.replies[slot] or self._sibling(slot)
        source = slot if self._batch.known[slot] else self._parent(slot)
        ids = self._batch.ids(source)
        given = torch.from_numpy(ids).to(scores.device)[None]
        try:
            mine = scores[place : place + 1]
            for processor in reply.request.params.logits_processors:
                mine = processor(given, mine)
            scores[place] = mine[0]
        except Exception as error:  # a processor's: it ends its own request
            self._errors.append((slot, error))

    def _parent(self, slot: int) -> int:
        for parent, reply in enumerate(self._rows.replies):
            if reply is not None and any(kept == slot for _, kept in reply.siblings):
                return parent
        raise AssertionError(f"row {slot} is kept for nobody")

    def _sibling(self, slot: int) -> Reply:
        parent = self._rows.replies[self._parent(slot)]
        assert parent is not None
        return next(sibling for sibling, kept in parent.siblings if kept == slot)

    def _with_penalty(self, slots: Ints, scores: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(
                (self._batch.rows, scores.shape[1]), dtype=torch.bool, device=scores.device
            )
        for slot, ids in self._penalised.items():
            self._seen[slot] = False
            self._seen[slot, torch.from_numpy(ids).to(scores.device)] = True
        self._penalised.clear()
        chosen = torch.from_numpy(slots).to(scores.device)
        penalty = torch.from_numpy(self._rows.penalty[slots]).to(scores.device)
        return penalise(scores, self._seen[chosen], penalty)

    def note_logprobs(
        self, slots: Ints, at: Ints, alive: npt.NDArray[np.bool_] | None,
        read: Sequence[npt.NDArray],
    ) -> None:  # fmt: skip
        """Enter log-probabilities that a step has given.

        Args:
            slots, at: see `Choice` and `Picked`.
            alive: which of `slots` still have the reply they had; `None`: all.
            read: `Picked.logprobs`, on the host.
        """
        own, top_ids, top = (array.tolist() for array in read)
        for number, place in enumerate(at.tolist()):
            if alive is not None and not alive[place]:
                continue
            slot = int(slots[place])
            count = int(self._rows.logprobs[slot])
            pairs = tuple(zip(top_ids[number][:count], top[number][:count], strict=True))
            reply = self._rows.replies[slot] or self._sibling(slot)
            reply.logprobs.append(TokenLogprobs(own[number], pairs))
