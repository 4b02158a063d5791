"""Requests inside the generator: what is kept of each until it ends."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvpaged.generate.params import Completion, SamplingParams, TokenEvent, TokenLogprobs
from kvpaged.generate.scheduler import Waiting
from kvpaged.generate.text import TextTail
from kvpaged.keys import Salt

Ints = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Something asked for.

    Attributes:
        number: as submitted, from 0.
        prompt: int64 ids.
        params: how its replies are chosen.
        salt: see `PagedKVCache.batch`.
        rank: see `scheduler.rank_of`.
        submitted, deadline: seconds on the engine's clock; no deadline: infinite.
        seed: of its first reply.
        problem: why it can't be served; it ends at once.
        decode: text of a whole reply.
        on_event: told what happens, if somebody listens; called by whoever takes the step.
        on_end: told each reply that ends.
        replies: one for each of `params.n`.
        open: how many have not ended.
    """

    number: int
    prompt: Ints
    params: SamplingParams
    salt: Salt
    rank: int
    submitted: float
    deadline: float
    seed: int
    problem: Exception | None = None
    decode: Callable[[list[int]], str] | None = None
    on_event: Callable[[TokenEvent], None] | None = None
    on_end: Callable[[Completion], None] | None = None
    replies: "list[Reply]" = field(default_factory=list)
    open: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Reply:
    """One of a request's replies.

    Attributes:
        request, index: whose, and which.
        seed: of its random numbers.
        ids: int64, the prompt and what was generated when it was last set back.
        slot: its row, while it runs.
        siblings: replies that begin from this one's prompt, while it is computed, with the rows
            kept for them.
        completion: what its user gets.
        tail: its text, where somebody follows it.
        unsent, pending: tokens and text that go with its next event.
        chain: see `scheduler.Waiting`.
        logprobs: of its tokens, where asked for.
        ended: its user has been told so.
    """

    request: Request
    index: int
    seed: int
    ids: Ints
    completion: Completion
    slot: int | None = None
    siblings: "list[tuple[Reply, int]]" = field(default_factory=list)
    tail: TextTail | None = None
    unsent: list[int] = field(default_factory=list)
    pending: str = ""
    chain: tuple[int, ...] = ()
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ended: bool = False


@dataclass(slots=True)
class Line(Waiting):
    """A place in the line of those that wait: a reply, and those that begin from its prompt.

    `called`: what tiers have of it was asked to come up.
    """

    reply: Any = None
    others: "list[Reply]" = field(default_factory=list)
    called: bool = False
