"""The loop: one step at a time over the running rows, by the scheduler's decisions."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import OutOfPagesError
from kvpaged.generate import scheduler
from kvpaged.generate.drafts import accept_drafts, write_drafts
from kvpaged.generate.pages import PageNeeds
from kvpaged.generate.params import FinishReason
from kvpaged.generate.replies import end_reply, tell
from kvpaged.generate.requests import Line, Reply, Request
from kvpaged.generate.rows import Rows
from kvpaged.generate.sampling import StepSampler
from kvpaged.generate.scheduler import StepPlan
from kvpaged.pages.prefix import Trail
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Ints, Step

log = logging.getLogger("kvpaged.generate")

PUBLISH_EVERY = 16
"""Steps after which full pages of replies go into the prefix index; prompts go at once."""

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Ids and positions, int64 `[tokens]`, and the tokens whose logits are wanted, int64 `[n]`, to
logits `[n, vocabulary]`.
"""


@dataclass(slots=True)
class EngineStats:
    """Running totals.

    Attributes:
        steps: forward passes.
        tokens: computed in them, prompts' too.
        generated: tokens of replies.
        preemptions: rows set back because pages ran out.
        host_s: seconds of steps that were not the forward pass and the choice of tokens.
        device_s: seconds of those.
    """

    steps: int = 0
    tokens: int = 0
    generated: int = 0
    preemptions: int = 0
    host_s: float = 0.0
    device_s: float = 0.0


class Engine:
    """Requests in, replies out, a step at a time. One thread at a time.

    Invariants, between steps:
      1. A row is taken exactly if a reply has it or it is kept for one (`Reply.siblings`).
      2. A running row's tokens before `batch.lengths` are in pages, those up to `batch.known` wait
         to be computed: one of a reply, more of a prompt.
      3. Every request not ended is in the line, or in rows, whole.
    """

    def __init__(
        self,
        batch: SlotBatch,
        forward: Forward,
        needs: PageNeeds,
        *,
        budget: int,
        chunk: int,
        eos: Sequence[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            batch: rows for the running requests.
            forward: the model, over the batch's running step.
            needs: pages of requests, and what there is of them.
            budget: tokens of a step.
            chunk: the most tokens of one prompt in a step.
            eos: the model's end-of-sequence tokens.
            clock: seconds.
        """
        self.batch = batch
        self.forward = forward
        self.needs = needs
        self.budget, self.chunk = budget, chunk
        self.eos = tuple(eos)
        self.clock = clock
        self.rows = Rows(batch.rows)
        self.sampler = StepSampler(batch, self.rows)
        self.line: list[Line] = []
        self.stats = EngineStats()
        self._look = True  # something has changed for those who wait
        self._since_publish = 0
        self._deadline = np.inf  # no request ends before it
        self._nothing: Ints = np.zeros(batch.rows, np.int64)
        self._steady: tuple[StepPlan, Ints] | None = None  # the plan of steps of replies alone

    # -- coming and going --------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Put a request's replies in the line; those beyond the rows there are come in turns."""
        replies = request.replies
        request.open = len(replies)
        self._deadline = min(self._deadline, request.deadline)
        if request.problem is not None:
            for reply in replies:
                self._end(reply, "error", request.problem)
            return
        for first in range(0, len(replies), self.batch.rows):
            group = replies[first : first + self.batch.rows]
            self._queue(group[0], group[1:])

    def _queue(self, reply: Reply, others: list[Reply]) -> None:
        reply.chain = self.needs.chain(reply.ids, reply.request.salt)
        self.line.append(Line(reply.request.rank, 1 + len(others), reply.chain, 0, reply, others))
        self.line.sort(key=lambda line: line.rank)
        self._look = True

    @property
    def idle(self) -> bool:
        """Nothing runs and nobody waits."""
        return not self.line and not self.rows.taken.any()

    def cancel(self, request: Request, reason: FinishReason = "cancelled") -> None:
        """End a request's replies now."""
        self._end_all(request, reason, None)

    def _end_all(self, request: Request, reason: FinishReason, error: Exception | None) -> None:
        waiting = [line for line in self.line if line.reply.request is request]
        self.line = [line for line in self.line if line.reply.request is not request]
        for line in waiting:
            for reply in (line.reply, *line.others):
                self._end(reply, reason, error)
        for slot in self.rows.running().tolist():
            reply = self.rows.replies[slot]
            if reply is not None and reply.request is request:
                self._end(reply, reason, error)

    def _end(self, reply: Reply, reason: FinishReason, error: Exception | None = None) -> None:
        siblings, reply.siblings = reply.siblings, []
        ids = reply.ids
        if (slot := reply.slot) is not None:
            ids = self.batch.tokens[slot, : self.batch.known[slot]].astype(np.int64)
            self._vacate(slot)
        reply.slot = None
        for sibling, kept in siblings:
            self.rows.leave(kept)
            self._steady = None
            end_reply(sibling, sibling.ids, reason, error, self.clock())
        end_reply(reply, ids, reason, error, self.clock())

    def _vacate(self, slot: int) -> None:
        self._steady = None
        self.batch.vacate(slot)
        self.rows.leave(slot)
        self._look = True

    def reset(self, error: Exception | None = None) -> None:
        """Forget the running step, end everything that runs or waits: because of `error`, if there
        is one.
        """
        self.batch.drop_step()
        for request in {line.reply.request for line in self.line} | {
            reply.request for reply in self.rows.replies if reply is not None
        }:
            self._end_all(request, "cancelled" if error is None else "error", error)

    def _expire(self) -> None:
        now = self.clock()
        if now <= self._deadline:
            return
        late = {
            reply.request
            for slot in np.flatnonzero(self.rows.deadline < now).tolist()
            if (reply := self.rows.replies[slot]) is not None
        }
        late |= {line.reply.request for line in self.line if line.reply.request.deadline < now}
        for request in late:
            self.cancel(request, "deadline")
        waiting = min((line.reply.request.deadline for line in self.line), default=np.inf)
        self._deadline = min(float(self.rows.deadline.min()), waiting)

    # -- admission ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        if not self.line or not self._look:
            return
        free = self.rows.free()
        if not free:
            return
        self._look = False
        running = self.rows.running()
        front = self.line[: scheduler.WINDOW]
        trails = self.needs.trails([line.reply for line in front])
        chosen = scheduler.admit(
            front,
            slots=len(free),
            room=self.needs.room(self.batch, running, self.rows.prefilling),
            computing=self._computing(),
            prospect=lambda place: self.needs.prospect(
                front[place].reply, trails[place], front[place].slots, self.chunk
            ),
        )
        for place in sorted(chosen, reverse=True):
            del self.line[place]
        for place in chosen:
            line = front[place]
            mine, free = free[: line.slots], free[line.slots :]
            try:
                self._begin(line, mine, trails[place])
            except Exception as error:
                self._end_all(line.reply.request, "error", error)
        if not chosen and not len(running):
            line = self.line.pop(0)
            self._look = True
            lack = self.needs.shortage(line.reply)
            for reply in (line.reply, *line.others):
                self._end(reply, "error", lack)

    def _computing(self) -> set[int]:
        """What stands for the pages that running prompts have still to compute."""
        found: set[int] = set()
        for slot in np.flatnonzero(self.rows.prefilling).tolist():
            reply = self.rows.replies[slot]
            if reply is not None:
                found.update(reply.chain[int(self.batch.lengths[slot]) // self.needs.page_size :])
        return found

    def _begin(self, line: Line, slots: list[int], trail: Trail | None) -> None:
        """Let a reply run in the first of `slots`; the others are kept for its siblings."""
        reply: Reply = line.reply
        slot = slots[0]
        self._steady = None
        found = self.batch.admit(slot, reply.ids, trail, salt=reply.request.salt)
        self._enter(reply, slot)
        self.rows.prefilling[slot] = True
        self.rows.recount()
        if not reply.completion.preemptions:
            for each in (reply, *line.others):
                each.completion.cached_tokens = found
        reply.siblings = list(zip(line.others, slots[1:], strict=True))
        for sibling, kept in reply.siblings:
            self._enter(sibling, kept)
            self.rows.replies[kept] = None
        self.batch.widen(int(self.rows.limit[slot]) + 16)

    def _enter(self, reply: Reply, slot: int) -> None:
        params = reply.request.params
        reply.slot = slot
        stops = params.stop_token_ids + (() if params.ignore_eos else self.eos)
        self.rows.enter(slot, reply, stops)
        self.sampler.enter(slot, reply.ids)

    # -- a step ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Admit, compute one step, hand out what came of it; false if there was nothing to do."""
        start = self.clock()
        self._expire()
        self._admit()
        step = self._make_step()
        if step is None:
            return not self.idle
        middle = self.clock()
        try:
            picked = self._compute(step)
        except Exception as error:
            self._fail(step, error)
            return True
        end = self.clock()
        self.stats.steps += 1
        self.stats.tokens += step.total
        self.batch.commit()
        self._take(step, picked)
        self._publish()
        self.stats.device_s += end - middle
        self.stats.host_s += self.clock() - end + middle - start
        return True

    def _make_step(self) -> Step | None:
        """The next step, begun; rows are set back until its pages are there."""
        batch, rows = self.batch, self.rows
        while True:
            drafts = write_drafts(batch, rows) if rows.counted["lookup"] else self._nothing
            steady = not (rows.counted["prefilling"] or rows.counted["lookup"])
            if not steady or self._steady is None:
                plan = scheduler.plan_step(
                    done=batch.lengths, known=batch.known, drafts=drafts,
                    prefilling=rows.prefilling, rank=rows.rank, budget=self.budget,
                    chunk=self.chunk,
                )  # fmt: skip
                if not len(plan.order):
                    return None
                counts = np.zeros(batch.rows, np.int64)
                counts[plan.order] = plan.counts
                singles = int(plan.counts.max()) == 1
                self._steady = (plan, counts) if steady and singles else None
            else:
                (plan, counts), singles = self._steady, True
            if singles:
                ids = batch.tokens[plan.order, batch.lengths[plan.order]]
            else:
                ends = np.cumsum(plan.counts)
                base = np.repeat(batch.lengths[plan.order] - ends + plan.counts, plan.counts)
                ids = batch.tokens[np.repeat(plan.order, plan.counts), base + np.arange(ends[-1])]
            picks = self.sampler.choose(plan.order, plan.counts, drafts)
            try:
                return batch.begin(counts, ids, order=plan.order, more=picks)
            except OutOfPagesError as error:
                self._set_back(error)

    def _set_back(self, error: OutOfPagesError) -> None:
        """Make room: the last in the line of those that run goes back to the line, to be computed
        again from what is still in the cache; the only one that runs can't go on.
        """
        running = np.flatnonzero(self.batch.known > 0)
        slot = scheduler.choose_victim(running, self.rows.rank)
        reply = self.rows.replies[slot]
        assert reply is not None
        length, size = int(self.batch.lengths[slot]), self.needs.page_size
        if len(running) == 1 and length % size:
            # Its last page may be one that others wrote: it takes another instead of a copy.
            self.batch.rewind(slot, length - length % size)
            self._steady = None
            return
        if len(running) == 1:
            self._end(reply, "error", error)
            return
        self.batch.publish()
        self.stats.preemptions += 1
        reply.completion.preemptions += 1
        reply.ids = self.batch.tokens[slot, : self.batch.known[slot]].astype(np.int64)
        others = [sibling for sibling, _ in reply.siblings]
        for _, kept in reply.siblings:
            self.rows.leave(kept)
        for each in (reply, *others):
            each.slot = None
        reply.siblings = []
        self._vacate(slot)
        self._queue(reply, others)
        self._look = False  # until somebody ends or a prompt is done: else it comes and goes

    def _compute(self, step: Step) -> Tensor:
        """One forward pass, and the tokens chosen from it."""
        if not self.batch.watch():
            self.batch.keep_private("the model has changed since it began")
        take = self.sampler.take
        logits = self.forward(step.tokens.long(), step.positions.long(), step.more[: len(take)])
        if not len(take):
            return logits.new_empty(0, dtype=torch.int64)
        return self.sampler.pick(step, logits)

    def _fail(self, step: Step, error: Exception) -> None:
        """A pass failed: what took part in it ends, the rest goes on."""
        log.warning("a step of %d tokens failed: %s", step.total, error)
        self.batch.drop_step()
        slots = np.flatnonzero(step.counts) if step.order is None else step.order
        for slot in slots.tolist():
            if (reply := self.rows.replies[slot]) is not None:
                self._end_all(reply.request, "error", error)

    # -- what came of it ---------------------------------------------------------------------------

    def _take(self, step: Step, picked: Tensor) -> None:
        """Enter the chosen tokens, find out who has ended, tell those who listen."""
        rows, batch, sampler = self.rows, self.batch, self.sampler
        done = self._nothing
        if rows.counted["prefilling"]:
            done = rows.prefilling & (batch.lengths == batch.known)
        if done.any():
            rows.prefilling[done] = False
            rows.recount()
            self._look = True
            self._since_publish = PUBLISH_EVERY
            for slot in np.flatnonzero(done).tolist():
                self._branch(slot)
        if not len(sampler.take):
            return
        tokens = picked.numpy() if picked.device.type == "cpu" else picked.cpu().numpy()
        slots = sampler.slots
        if sampler.drafted:
            slots, tokens = accept_drafts(batch, rows, sampler.drafts, slots, tokens)
        known = batch.known[slots]
        batch.tokens[slots, known] = tokens
        known += 1
        batch.known[slots] = known
        self.stats.generated += len(slots)
        stop = (rows.stops[slots] == tokens[:, None]).any(1)
        over = known >= rows.limit[slots]
        for slot, error in sampler.errors:
            if (reply := rows.replies[slot]) is not None:
                batch.known[slot] -= 1  # the token stands for one that could not be chosen
                self._end(reply, "error", error)
        if rows.counted["first"]:
            self._note_first(slots[rows.first[slots]])
        talks = np.flatnonzero(rows.talks[slots]).tolist() if rows.counted["talks"] else ()
        for place in talks:
            reply = rows.replies[int(slots[place])]
            last = bool(stop[place] or over[place])
            if reply is not None and tell(reply, int(tokens[place]), last=last):
                stop[place] = True
        ended = np.flatnonzero(stop | over).tolist()
        if ended:
            self.batch.publish()
        for place in ended:
            if (reply := rows.replies[int(slots[place])]) is not None:
                self._end(reply, "stop" if stop[place] else "length")

    def _note_first(self, slots: Ints) -> None:
        now = self.clock()
        for slot in slots.tolist():
            if (reply := self.rows.replies[slot]) is not None:
                reply.completion.first_token_s = now - reply.request.submitted
        self.rows.first[slots] = False
        self.rows.recount()

    def _branch(self, slot: int) -> None:
        """A prompt is computed: its other replies begin from it."""
        reply = self.rows.replies[slot]
        assert reply is not None
        for sibling, kept in reply.siblings:
            self.batch.fork(slot, kept)
            self.rows.replies[kept] = sibling
            self._steady = None
            self.sampler.copy(slot, kept)
        reply.siblings = []

    def _publish(self) -> None:
        """Others may have what is full by now: prompts at once, replies now and then."""
        self._since_publish += 1
        if self._since_publish >= PUBLISH_EVERY:
            self._since_publish = 0
            self.batch.publish()

    def check(self) -> None:
        """Raise `UsageError` unless it can take requests."""
        self.batch.check_open()
