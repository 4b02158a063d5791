"""Which logits a step is to give, and the tokens chosen from them: for all its rows at once."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.generate.params import TokenLogprobs
from kvpaged.generate.requests import Reply
from kvpaged.generate.rows import Rows
from kvpaged.generate.sampler import draw, log_probabilities, penalise
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Ints, Step


class StepSampler:
    """Chooses the tokens of a step.

    Attributes:
        slots: int64 `[n]`, whose tokens the step gives: of a row with drafts one for each place,
            of a prompt with several replies one for each.
        take: int32 `[n]`, the step's tokens whose logits they come from.
        drafts: int64 `[rows]`, guessed tokens of each row; `drafted`: some row has any.
        errors: rows for which no token could be chosen, and why.
    """

    def __init__(self, batch: SlotBatch, rows: Rows) -> None:
        self._batch, self._rows = batch, rows
        self._seen: Tensor | None = None
        self._draws: npt.NDArray[np.int32] | None = None
        self.slots: Ints = np.empty(0, np.int64)
        self.take: npt.NDArray[np.int32] = np.empty(0, np.int32)
        self.drafts: Ints = np.zeros(batch.rows, np.int64)
        self.drafted = False
        self.errors: list[tuple[int, Exception]] = []
        self._penalised: dict[int, Ints] = {}

    def enter(self, slot: int, ids: Ints) -> None:
        """A row begins with these tokens."""
        self._penalised.pop(slot, None)
        if self._rows.penalty[slot] != 1:
            self._penalised[slot] = ids
        elif self._seen is not None:
            self._seen[slot] = False

    def copy(self, source: int, target: int) -> None:
        """A row begins as another is."""
        if self._seen is not None:
            self._seen[target] = self._seen[source]

    def choose(self, order: Ints, counts: Ints, drafts: Ints) -> npt.NDArray[np.int32]:
        """Decide which tokens a step gives; returns what the device is told for it."""
        batch, rows = self._batch, self._rows
        self.errors = []
        if not (rows.counted["prefilling"] or rows.counted["lookup"]):
            self.drafted = False
            self.slots, self.take = order, np.arange(len(order), dtype=np.int32)
            nth = batch.known[order] - rows.prompt[order] if rows.counted["temperature"] else order
            self._draws = rows.sampling(order, nth)
            return self.take if self._draws is None else np.concatenate([self.take, self._draws])
        ends = np.cumsum(counts)
        whole = batch.lengths[order] + counts == batch.known[order] + drafts[order]
        self.drafted = bool(drafts.any())
        self.drafts = drafts
        slots, take = order[whole], ends[whole] - 1
        nth = batch.known[slots] - rows.prompt[slots]
        if self.drafted:
            many = drafts[slots] + 1
            place = np.arange(int(many.sum())) - np.repeat(np.cumsum(many) - many, many)
            take = np.repeat(take - drafts[slots], many) + place
            nth = np.repeat(nth, many) + place
            slots = np.repeat(slots, many)
        if rows.counted["prefilling"]:
            slots, take, nth = self._with_siblings(slots, take, nth)
        self.slots, self.take = slots, take.astype(np.int32)
        self._draws = rows.sampling(slots, nth)
        return self.take if self._draws is None else np.concatenate([self.take, self._draws])

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

    def pick(self, step: Step, logits: Tensor) -> Tensor:
        """The tokens, int64 `[n]`, of logits `[n, vocabulary]`; log-probabilities are noted."""
        rows, slots = self._rows, self.slots
        scores = self._processed(logits)
        count = len(slots)
        if self._draws is None:
            tokens = scores.argmax(-1)
        else:
            told = step.more[count:]
            floats = told[: 4 * count].view(torch.float32).view(4, count)
            filters = rows.filters[slots]
            top_k = rows.top_k[slots][filters]
            most = int(top_k.max(initial=0)) if (top_k > 0).all() else 0
            tokens = draw(
                scores.float(), uniform=floats[0], temperature=floats[1], top_p=floats[2],
                min_p=floats[3], top_k=told[4 * count :], filters=bool(filters.any()), most=most,
            )  # fmt: skip
        if self._seen is not None:
            chosen = torch.from_numpy(slots).to(tokens.device)
            self._seen[chosen, tokens] = True
        if rows.counted["logprobs"]:
            wanted = rows.logprobs[slots]
            self._note_logprobs(logits, tokens, wanted)
        return tokens

    def _processed(self, logits: Tensor) -> Tensor:
        """Scores after each row's processors and penalty."""
        rows, slots = self._rows, self.slots
        scores = logits
        if rows.counted["processors"]:
            scores = logits.float().clone()
            for place in np.flatnonzero(rows.processors[slots]).tolist():
                self._run_processors(place, int(slots[place]), scores)
        if self._penalised or self._seen is not None:
            scores = self._with_penalty(scores.float())
        return scores

    def _run_processors(self, place: int, slot: int, scores: Tensor) -> None:
        reply = self._rows.replies[slot] or self._sibling(slot)
        source = slot if self._batch.known[slot] else self._parent(slot)
        ids = self._batch.tokens[source, : self._batch.known[source]].astype(np.int64)
        given = torch.from_numpy(ids).to(scores.device)[None]
        try:
            mine = scores[place : place + 1]
            for processor in reply.request.params.logits_processors:
                mine = processor(given, mine)
            scores[place] = mine[0]
        except Exception as error:
            self.errors.append((slot, error))

    def _parent(self, slot: int) -> int:
        for parent, reply in enumerate(self._rows.replies):
            if reply is not None and any(kept == slot for _, kept in reply.siblings):
                return parent
        raise AssertionError(f"row {slot} is kept for nobody")

    def _sibling(self, slot: int) -> Reply:
        parent = self._rows.replies[self._parent(slot)]
        assert parent is not None
        return next(sibling for sibling, kept in parent.siblings if kept == slot)

    def _with_penalty(self, scores: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(
                (self._batch.rows, scores.shape[1]), dtype=torch.bool, device=scores.device
            )
        for slot, ids in self._penalised.items():
            self._seen[slot] = False
            self._seen[slot, torch.from_numpy(ids).to(scores.device)] = True
        self._penalised.clear()
        chosen = torch.from_numpy(self.slots).to(scores.device)
        penalty = torch.from_numpy(self._rows.penalty[self.slots]).to(scores.device)
        return penalise(scores, self._seen[chosen], penalty)

    def _note_logprobs(self, logits: Tensor, tokens: Tensor, wanted: Ints) -> None:
        places = np.flatnonzero(wanted >= 0)
        chosen = torch.from_numpy(places).to(logits.device)
        mine, ids, best = log_probabilities(
            logits[chosen], tokens[chosen], int(wanted.max(initial=0))
        )
        own, top_ids, top = mine.tolist(), ids.tolist(), best.tolist()
        for number, place in enumerate(places.tolist()):
            count = int(wanted[place])
            pairs = tuple(zip(top_ids[number][:count], top[number][:count], strict=True))
            slot = int(self.slots[place])
            reply = self._rows.replies[slot] or self._sibling(slot)
            reply.logprobs.append(TokenLogprobs(own[number], pairs))
