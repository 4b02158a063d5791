"""What the engine knows of each running row, as arrays: a step touches no object of a request."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvpaged.generate.requests import Reply
from kvpaged.generate.sampler import uniforms

Ints = npt.NDArray[np.int64]
T = TypeVar("T")
NONE = -1

COUNTED = ("prefilling", "lookup", "temperature", "talks", "first", "processors", "logprobs")
"""What most steps have none of."""


class Rows:
    """The running rows.

    Attributes:
        replies: whose each row is, or `None`.
        taken: rows that run, or are kept for one that will.
        prefilling: rows whose prompt is not all computed.
        rank: int64, see `scheduler.rank_of`.
        prompt, limit: int64, tokens of the prompt, and at most of it and the reply.
        stops: int64 `[rows, n]`, tokens that end it, -1 where there are fewer.
        deadline: float64 seconds.
        lookup: int64, how many tokens to guess.
        temperature, top_k, top_p, min_p, penalty, seed: see `SamplingParams`.
        filters, processors, logprobs: rows that draw from some tokens only; that have processors;
            -1 or the log-probabilities wanted.
        talks, first: rows about whose tokens an object has to be told; that have none yet.
        epoch: int64, grows when a reply enters or leaves; `changes`: how often any has.
    """

    def __init__(self, rows: int) -> None:
        self.replies: list[Reply | None] = [None] * rows
        self.taken = np.zeros(rows, bool)
        self.prefilling = np.zeros(rows, bool)
        self.rank = np.zeros(rows, np.int64)
        self.prompt = np.zeros(rows, np.int64)
        self.limit = np.zeros(rows, np.int64)
        self.stops: Ints = np.full((rows, 1), NONE, np.int64)
        self.deadline = np.full(rows, np.inf)
        self.lookup = np.zeros(rows, np.int64)
        self.temperature = np.zeros(rows, np.float32)
        self.top_k = np.zeros(rows, np.int32)
        self.top_p = np.ones(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.penalty = np.ones(rows, np.float32)
        self.seed = np.zeros(rows, np.uint64)
        self.filters = np.zeros(rows, bool)
        self.processors = np.zeros(rows, bool)
        self.logprobs = np.full(rows, NONE, np.int64)
        self.talks = np.zeros(rows, bool)
        self.first = np.zeros(rows, bool)
        self.epoch = np.zeros(rows, np.int64)
        self.changes = 0
        self._counted = dict.fromkeys(COUNTED, 0)
        self._stale = False

    def free(self) -> list[int]:
        """Rows nobody has."""
        free: list[int] = np.flatnonzero(~self.taken).tolist()
        return free

    def running(self) -> Ints:
        """Rows with a reply in them."""
        return np.flatnonzero(self.taken)

    def by_reply(self, of_rows: Sequence[T]) -> dict[tuple[int, int], T]:
        """What there is of each row, by the request's number and the reply's index."""
        return {
            (reply.request.number, reply.index): of_rows[slot]
            for slot, reply in enumerate(self.replies)
            if reply is not None
        }

    def enter(self, slot: int, reply: Reply, stops: tuple[int, ...]) -> None:
        """Write down what a reply wants, for its row."""
        request, params = reply.request, reply.request.params
        self.replies[slot] = reply
        self._change(slot)
        self.taken[slot] = True
        self.rank[slot] = request.rank
        self.prompt[slot] = len(request.prompt)
        self.limit[slot] = len(request.prompt) + params.max_new_tokens
        if len(stops) > self.stops.shape[1]:
            wider = np.full((len(self.stops), len(stops)), NONE, np.int64)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        self.stops[slot] = NONE
        self.stops[slot, : len(stops)] = stops
        self.deadline[slot] = request.deadline
        self.lookup[slot] = params.prompt_lookup
        self.temperature[slot] = params.temperature
        self.top_k[slot], self.top_p[slot] = params.top_k, params.top_p
        self.min_p[slot], self.penalty[slot] = params.min_p, params.repetition_penalty
        self.seed[slot] = reply.seed
        drawn = params.temperature > 0
        self.filters[slot] = drawn and bool(params.top_k or params.top_p < 1 or params.min_p > 0)
        self.processors[slot] = bool(params.logits_processors)
        self.logprobs[slot] = NONE if params.logprobs is None else params.logprobs
        self.talks[slot] = reply.tail is not None or request.on_event is not None
        self.first[slot] = reply.completion.first_token_s is None
        self.recount()

    def leave(self, slot: int) -> None:
        """Nobody has the row any more."""
        self.replies[slot] = None
        self._change(slot)
        self.taken[slot] = self.prefilling[slot] = self.talks[slot] = False
        self.deadline[slot] = np.inf
        self.lookup[slot] = self.temperature[slot] = 0
        self.first[slot] = self.processors[slot] = False
        self.logprobs[slot] = NONE
        self.recount()

    def _change(self, slot: int) -> None:
        self.epoch[slot] += 1
        self.changes += 1

    def recount(self) -> None:
        """Rows have come, gone, or changed their kind."""
        self._stale = True

    @property
    def counted(self) -> dict[str, int]:
        """How many rows there are of each kind that a step has to look for (`COUNTED`)."""
        if self._stale:
            self._stale = False
            self._counted = {
                name: int((getattr(self, name) > 0).sum()) for name in COUNTED if name != "logprobs"
            }
            self._counted["logprobs"] = int((self.logprobs >= 0).sum())
        return self._counted

    def sampling(self, slots: Ints, nth: Ints) -> npt.NDArray[np.int32] | None:
        """What the device needs to draw the tokens of some rows, as int32 `[5 * rows]`: bits of
        uniform, temperature, top_p, min_p, and top_k; `None`: all take the highest score.

        Args:
            slots: the rows.
            nth: the place in its reply of each token.
        """
        if not self.counted["temperature"]:
            return None
        temperature = self.temperature[slots]
        floats = np.stack(
            [uniforms(self.seed[slots], nth), temperature, self.top_p[slots], self.min_p[slots]]
        )
        bits: npt.NDArray[np.int32] = floats.astype(np.float32).view(np.int32).reshape(-1)
        return np.concatenate([bits, self.top_k[slots]])
