"""The loop: one step at a time over the running rows, by the scheduler's decisions."""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import OutOfPagesError
from kvpaged.generate import scheduler
from kvpaged.generate.flight import Flight
from kvpaged.generate.landing import Landing
from kvpaged.generate.loads import Loads
from kvpaged.generate.pages import PageNeeds
from kvpaged.generate.params import FinishReason
from kvpaged.generate.publisher import Publisher
from kvpaged.generate.replies import end_reply
from kvpaged.generate.requests import Line, Reply, Request
from kvpaged.generate.rows import Rows
from kvpaged.generate.sampling import Choice, Picked, StepSampler
from kvpaged.generate.stepping import Made, StepMaker
from kvpaged.generate.totals import EngineStats, now
from kvpaged.offload.clock import PassClock
from kvpaged.offload.promotion import LoadError
from kvpaged.pages.extents import Ids
from kvpaged.pages.trail import Trail
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Step

log = logging.getLogger("kvpaged.generate")

Forward = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""Ids and positions, int64 `[tokens]`, the tokens whose logits are wanted, int64 `[n]`, and whether
those are all, in order; to logits `[n, vocabulary]`.
"""


class Engine:
    """Requests in, replies out, a step at a time. One thread at a time.

    Invariants, between steps:
      1. A row is taken exactly if a reply has it or it is kept for one (`Reply.siblings`).
      2. A running row's tokens before `batch.lengths` are in pages, those up to `batch.known` wait
         to be computed: one of a reply, more of a prompt. Of a reply the last may be on its way.
      3. Every request not ended is in the line, or in rows, whole.

    Looking ahead, a step is launched before the tokens of the one before have been read: they go
    into it on the device. A row whose reply turns out to have ended has taken part for nothing.
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
        lookahead: bool = False,
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
            lookahead: launch a step before the tokens of the one before have been read, where
                nothing on the host needs them.
            clock: seconds.
        """
        self.batch = batch
        self.forward = forward
        self.needs = needs
        self.budget, self.chunk = budget, chunk
        self.eos = tuple(eos)
        self.lookahead = lookahead
        self.clock = clock
        self.rows = Rows(batch.rows)
        self.sampler = StepSampler(batch, self.rows)
        self.line: list[Line] = []
        self.stats = EngineStats()
        self._rewound: tuple[Reply, int] | None = None
        self._look = True  # something has changed for those who wait
        self._deadline = np.inf  # no request ends before it
        self._loads = Loads(batch, self.rows, needs)
        self._clock = PassClock(batch.device, needs.note_pass)
        self._maker = StepMaker(batch, self.rows, self.sampler, budget, chunk)
        self._flight: Flight | None = None
        self._publisher = Publisher(batch)
        self._landing = Landing(
            batch, self.rows, self.sampler,
            end=self._end, before_end=self._publisher.publish, clock=clock,
        )  # fmt: skip

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
        if (lack := self.needs.excess(replies[0], self.chunk)) is not None:
            for reply in replies:
                self._end(reply, "error", lack)
            return
        most = min(self.batch.rows, self.needs.most_replies(replies[0], self.chunk))
        for first in range(0, len(replies), most):
            group = replies[first : first + most]
            self._queue(group[0], group[1:])

    def refuse(self, request: Request, error: Exception) -> None:
        """End what is left of a request that could not be put in the line, wholly or in part."""
        request.open = sum(not reply.ended for reply in request.replies)
        self._refuse(request.replies, error)

    def _refuse(self, replies: Sequence[Reply], error: Exception) -> None:
        self._end_all(replies[0].request, "error", error)
        for reply in replies:
            if not reply.ended:
                self._end(reply, "error", error)

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
            ids = self.batch.ids(slot)
            self._vacate(slot)
        reply.slot = None
        for sibling, kept in siblings:
            self.rows.leave(kept)
            self._maker.change()
            end_reply(sibling, sibling.ids, reason, error, self.clock())
        end_reply(reply, ids, reason, error, self.clock())

    def _vacate(self, slot: int) -> None:
        self._maker.change()
        self._publisher.forget(slot)
        self.batch.vacate(slot)
        self.rows.leave(slot)
        self._look = True

    def reset(self, error: Exception | None = None) -> None:
        """Forget the running step, end everything that runs or waits: because of `error`, if there
        is one.
        """
        self.batch.drop_step()
        self._flight = None
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
            self._loads.call_ahead(self.line[: scheduler.WINDOW])
            return
        self._look = False
        running = self.rows.running()
        front = self.line[: scheduler.WINDOW]
        trails = self.needs.trails([line.reply for line in front])
        chosen = scheduler.admit(
            front,
            slots=len(free),
            room=self.needs.room(self.batch, running, self.rows.prefilling),
            computing=self._loads.computing(),
            prospect=lambda place: self.needs.prospect(
                front[place].reply, trails[place], front[place].slots, self.chunk
            ),
        )
        self._loads.call_ahead([line for n, line in enumerate(front) if n not in chosen])
        for place in sorted(chosen, reverse=True):
            del self.line[place]
        for place in chosen:
            line = front[place]
            mine, free = free[: line.slots], free[line.slots :]
            try:
                self._begin(line, mine, trails[place])
            except Exception as error:  # of this request alone: the others go on
                self._refuse((line.reply, *line.others), error)
        if not chosen and not len(running):
            line = self.line.pop(0)
            self._look = True
            lack = self.needs.shortage(line.reply)
            for reply in (line.reply, *line.others):
                self._end(reply, "error", lack)

    def _begin(self, line: Line, slots: list[int], trail: Trail | None) -> None:
        """Let a reply run in the first of `slots`; the others are kept for its siblings."""
        reply: Reply = line.reply
        slot = slots[0]
        self._maker.change()
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
        """Admit, launch one step, hand out what came of it, or of the one before; false if there
        was nothing to do.
        """
        start, waited = self.clock(), self._landing.waited_s
        self._expire()
        self._admit()
        if self._flight is not None and not self._may_look_ahead():
            self._land()
        held = self._loads.settle()
        made = self._make_step(held)
        if made is None and held and self._flight is None:
            self._loads.wait()
            return True
        if made is None:
            self._land()
            self.stats.device_s += self._landing.waited_s - waited
            return not self.idle
        step, choice, ids = made
        middle = self.clock()
        try:
            picked = self._compute(step, choice, ids)
        except Exception as error:  # the model's or a hook's: it ends those of this step
            if isinstance(error, LoadError) or self._loads.failed(step):
                self._again()
            else:
                self._fail(step, error)
            return True
        end = self.clock()
        self.stats.steps += 1
        self.stats.tokens += step.total
        self.batch.commit()
        before, self._flight = self._flight, self._launched(choice, picked)
        if before is not None:
            self._land(before)
        if not self._may_look_ahead():
            self._land()
        self._publisher.after_step()
        waited = self._landing.waited_s - waited
        self.stats.device_s += end - middle + waited
        self.stats.host_s += self.clock() - end + middle - start - waited
        return True

    def _may_look_ahead(self) -> bool:
        """Whether nothing on the host needs the tokens of the step before."""
        counted = self.rows.counted
        return self.lookahead and not (counted["lookup"] or counted["processors"])

    def _again(self) -> None:
        """Pages of a step have not come: it does not count, and they are computed."""
        self.batch.drop_step()
        self._maker.change()
        self._loads.settle()

    def _make_step(self, held: Sequence[int]) -> Made | None:
        """The next step, without rows `held`; rows are set back until its pages are there."""
        given_back = False
        while True:
            try:
                made = self._maker.make(self._flight, held)
                if made is not None:
                    self._loads.gate(made.step)
                return made
            except OutOfPagesError as error:
                if self._flight is not None:
                    self._land()  # who has ended gives pages back
                elif not given_back:
                    self._publisher.publish()  # what has left a window goes back
                    given_back = True
                else:
                    self._set_back(error)

    def _set_back(self, error: OutOfPagesError) -> None:
        """Make room: the last in the line of those that run goes back to the line, to be computed
        again from what is still in the cache; the only one that runs can't go on.
        """
        running = np.flatnonzero(self.batch.known > 0)
        slot = scheduler.choose_victim(running, self.rows.rank)
        reply = self.rows.replies[slot]
        assert reply is not None
        if (
            slot in self.batch.loading
        ):  # its pages are wanted for something else: what has come stays
            self.batch.loading[slot].cancel("")
            self.batch.settle_loading(slot)
            self._maker.change()
            return
        length, size = int(self.batch.lengths[slot]), self.needs.page_size
        if len(running) == 1 and length % size and self._rewound != (reply, length):
            # Its last page may be one that others wrote: it takes another instead of a copy. Once:
            # where a compressed page lacks room, it would come to the same place again.
            self._rewound = reply, length
            self.batch.rewind(slot, length - length % size)
            self._maker.change()
            return
        if len(running) == 1:
            self._end(reply, "error", error)
            return
        self._publisher.publish()
        self.stats.preemptions += 1
        reply.completion.preemptions += 1
        reply.ids = self.batch.ids(slot)
        others = [sibling for sibling, _ in reply.siblings]
        for _, kept in reply.siblings:
            self.rows.leave(kept)
        for each in (reply, *others):
            each.slot = None
        reply.siblings = []
        self.batch.demote(slot)
        self._vacate(slot)
        self._queue(reply, others)
        self._look = False  # until somebody ends or a prompt is done: else it comes and goes

    def _compute(self, step: Step, choice: Choice, ids: Tensor) -> Picked:
        """One forward pass, and the tokens chosen from it."""
        as_before = self.batch.watch()
        if not as_before:
            self.batch.keep_private("the model has changed since it began")
        count = len(choice.take)
        self._clock.begin(0 if step.gates else step.total)
        logits = self.forward(
            ids, step.positions.long(), step.more[:count],
            choice.every and as_before and not step.gates,
        )  # fmt: skip
        self._clock.end()
        self._loads.check(step)
        if not count:
            return Picked(logits.new_empty(0, dtype=torch.int64), None, choice.slots, [])
        return self.sampler.pick(choice, step, logits)

    def _fail(self, step: Step, error: Exception) -> None:
        """A pass failed: what took part in it ends, the rest goes on."""
        log.warning("a step of %d tokens failed: %s", step.total, error)
        self.batch.drop_step()
        self._maker.change()
        self._land()
        slots = np.flatnonzero(step.counts) if step.order is None else step.order
        for slot in slots.tolist():
            if (reply := self.rows.replies[slot]) is not None:
                self._end_all(reply.request, "error", error)

    # -- what came of it ---------------------------------------------------------------------------

    def _launched(self, choice: Choice, picked: Picked) -> Flight:
        """A step has been launched and committed: prompts that end with it, tokens that come."""
        rows, batch = self.rows, self.batch
        if rows.counted["prefilling"]:
            done = rows.prefilling & (batch.lengths == batch.known)
            if done.any():
                rows.prefilling[done] = False
                rows.recount()
                for slot in np.flatnonzero(done).tolist():
                    self._branch(slot)
                self._publisher.publish()
                self._look = True
        flight = Flight.launched(choice, picked, rows)
        if choice.drafts is None and len(choice.slots):
            flight.ends = batch.known[choice.index] + 1
            batch.known[choice.index] = flight.ends
            batch.coming[choice.index] += 1
        self._maker.launched(picked.tokens)
        return flight

    def _land(self, flight: Flight | None = None) -> None:
        """Read the tokens of a step: of the one under way, if no other."""
        if flight is None:
            flight, self._flight = self._flight, None
        if flight is not None:
            self.stats.generated += self._landing.land(flight)
            if not self.rows.taken.any():
                self._flight = None  # all that it could give is for nobody

    def _branch(self, slot: int) -> None:
        """A prompt is computed: its other replies begin from it."""
        reply = self.rows.replies[slot]
        assert reply is not None
        for sibling, kept in reply.siblings:
            self.batch.fork(slot, kept)
            self.rows.replies[kept] = sibling
            self._maker.change()
        reply.siblings = []

    def totals(self) -> EngineStats:
        """Its figures now."""
        return now(self.stats, self.rows, self.line)

    def page_map(self, group: int) -> dict[tuple[int, int], Ids]:
        """See `Generator.page_map`."""
        return self.rows.by_reply(self.batch.page_map(group))

    def check(self) -> None:
        """Raise `UsageError` unless it can take requests."""
        self.batch.check_open()
