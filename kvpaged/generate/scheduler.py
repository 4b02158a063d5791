"""Which requests run, and what each step computes: pure decisions over plain numbers.

    waiting --admit--> prefilling --its prompt is computed--> decoding --ends--> gone
       ^                   |                                     |
       +-----preempted-----+-------------------------------------+

Order. A request's *rank* is its place in the line: the number it was submitted as, less `PATIENCE`
for each unit of priority. Lower ranks first, everywhere: in admission, in the tokens of a step;
preemption takes the highest.

Fairness. A request is admitted after at most the requests of lower rank (those submitted before it,
and those of a priority higher by p submitted at most p * PATIENCE after it) and `OVERTAKES` others:
those that fit where it does not, or share a prefix with one admitted before it. Once that many have
passed it, nobody does.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

PATIENCE = 256
"""Places in the line that a unit of priority is worth."""

OVERTAKES = 32
"""Requests of higher rank that may be admitted before one that waits."""

WINDOW = 64
"""Waiting requests that are looked at for admission, from the front of the line."""


def rank_of(number: int, priority: int) -> int:
    """The place in the line of the `number`-th request."""
    return number - PATIENCE * priority


# -- a step ----------------------------------------------------------------------------------------


class StepPlan(NamedTuple):
    """What a step computes.

    Attributes:
        order: int64 `[n]`, rows that take part: those of one token first, then those with drafts,
            then prompts.
        counts: int64 `[n]`, tokens of each.
    """

    order: Ints
    counts: Ints


def plan_step(
    *, done: Ints, known: Ints, drafts: Ints, prefilling: npt.NDArray[np.bool_], rank: Ints,
    budget: int, chunk: int,
) -> StepPlan:  # fmt: skip
    """Divide a step's tokens among running rows: every reply gets its next token, prompts share
    what is left in the order of their ranks.

    Args:
        done, known: int64 `[rows]`, tokens computed and tokens there; equal: the row is empty or
            has nothing to do.
        drafts: int64 `[rows]`, guessed tokens to check beside.
        prefilling: rows whose prompt is not all computed.
        rank: int64 `[rows]`.
        budget: tokens of the step; prompts get at least one token of it.
        chunk: the most tokens of one prompt.
    """
    rest = known - done
    replies = np.flatnonzero((rest > 0) & ~prefilling)
    if drafts.any():
        replies = replies[np.argsort(drafts[replies], kind="stable")]
    counts = rest[replies] + drafts[replies]
    prompts = np.flatnonzero((rest > 0) & prefilling)
    if not len(prompts):
        return StepPlan(replies, counts)
    prompts = prompts[np.argsort(rank[prompts], kind="stable")]
    wanted = np.minimum(rest[prompts], chunk)
    before = np.cumsum(wanted) - wanted
    left = max(budget - int(counts.sum()), 1)
    given = np.clip(left - before, 0, wanted)
    some = given > 0
    prompts, given = prompts[some], given[some]
    one = counts == 1
    single = given == 1  # they go with the replies: attention serves rows of one token together
    order = [replies[one], prompts[single], replies[~one], prompts[~single]]
    many = [counts[one], given[single], counts[~one], given[~single]]
    return StepPlan(np.concatenate(order), np.concatenate(many))


def choose_victim(rows: Ints, rank: Ints) -> int:
    """Which of the running `rows` is set back when pages run out: the last in the line."""
    return int(rows[np.argmax(rank[rows])])


# -- admission -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Waiting:
    """A request in the line.

    Attributes:
        rank: see `rank_of`.
        slots: rows it takes, one for each of its replies.
        chain: numbers that stand for its first page, its first two pages, ...: equal ones for
            equal tokens. Empty where nothing is shared.
        overtaken: how many of higher rank were admitted before it.
    """

    rank: int
    slots: int
    chain: Sequence[int]
    overtaken: int = 0


class Prospect(NamedTuple):
    """What admitting a request would take now.

    Attributes:
        found: full pages of its prompt that are in the cache.
        need: pages of each layer group it would take from what is available.
    """

    found: int
    need: tuple[int, ...]


def line_up(waiting: Sequence[Waiting]) -> list[int]:
    """The order in which requests are looked at: by rank, those with the same first page together
    with the first of them; only the first `WINDOW`.

    Args:
        waiting: sorted by rank.
    """
    firsts: dict[int, int] = {}
    order = []
    for place, request in enumerate(waiting[:WINDOW]):
        group = firsts.setdefault(request.chain[0], place) if request.chain else place
        order.append((group, place))
    return [place for _, place in sorted(order)]


def admit(
    waiting: Sequence[Waiting],
    *,
    slots: int,
    room: Sequence[int],
    computing: Iterable[int],
    prospect: Callable[[int], Prospect],
) -> list[int]:
    """Choose requests to begin now; counts who is overtaken.

    A request is not admitted while a running one computes more of its prefix than is in the cache:
    it will find it there.

    Args:
        waiting: sorted by rank; `overtaken` is updated.
        slots: free rows.
        room: pages of each layer group that are available and not yet promised.
        computing: chain numbers of pages that running prompts have still to compute.
        prospect: for a place in `waiting`, what it would take.

    Returns:
        Places in `waiting`, in the order of admission.
    """
    chosen: list[int] = []
    left = list(room)
    begun = set(computing)
    for place in line_up(waiting):
        request = waiting[place]
        passed = [waiting[other] for other in range(place) if other not in chosen]
        if not slots or any(other.overtaken >= OVERTAKES for other in passed):
            break
        if request.slots > slots:
            continue
        look = prospect(place)
        if _computed_elsewhere(request.chain, begun, look.found):
            continue
        if any(need > have for need, have in zip(look.need, left, strict=True)):
            continue
        slots -= request.slots
        left = [have - need for have, need in zip(left, look.need, strict=True)]
        begun.update(request.chain[look.found :])
        chosen.append(place)
        for other in passed:
            other.overtaken += 1
    return chosen


def _computed_elsewhere(chain: Sequence[int], computing: set[int], found: int) -> bool:
    """Whether somebody computes a page of this chain that is not found yet."""
    return found < len(chain) and chain[found] in computing
