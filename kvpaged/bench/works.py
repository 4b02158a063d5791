"""What is served: requests that come at once, made of English text, and the goals for each kind."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

BATCH = 8
"""Rows of a padded batch of `generate()` where requests are unlike."""

GOALS: Mapping[str, Mapping[str, float]] = {
    "batch": {"generate": 1.4, "vllm": 1.0},
    "spread": {"generate": 3.0, "vllm": 1.0},
    "shared": {"generate": 10.0, "vllm": 1.0},
}
"""By kind of work. Tiny works have none."""


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that come at once.

    Attributes:
        name: what it is called; its first word is its kind, a key of `GOALS`.
        prompts: token ids of each.
        new: tokens to generate after each.
        batch: rows of a padded batch.
        rounds: how often it is measured.
        goals: tokens/s of kvpaged over those of others, at least.
    """

    name: str
    prompts: list[list[int]]
    new: list[int]
    batch: int
    rounds: int
    goals: Mapping[str, float]

    @property
    def kind(self) -> str:
        """A key of `GOALS`."""
        return self.name.split()[0]

    @property
    def generated(self) -> int:
        """Tokens of all replies."""
        return sum(self.new)


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds for all, the median until a request's first token, and the tokens."""

    total_s: float
    first_s: float
    tokens: list[list[int]]


Run = Callable[[Work], Served]


def works(ids: Sequence[int], *, quick: bool, rounds: int) -> list[Work]:
    """All works: those of equal rows `rounds` times, the long ones a third of it, at least once.

    Args:
        ids: tokens of a text, longer than the longest prompt (2,000 tokens; quick: 40).
        quick: tiny ones, to see that everything runs.
        rounds: how often each is measured.
    """
    rng = random.Random(0)

    def some(length: int) -> list[int]:
        start = rng.randrange(len(ids) - length)
        return list(ids[start : start + length])

    def made(name: str, prompts: list[list[int]], new: list[int], batch: int, times: int) -> Work:
        goals = {} if quick else GOALS[name.split(maxsplit=1)[0]]
        return Work(name, prompts, new, batch, times, goals)

    short, new = (8, 4) if quick else (32, 128)
    every = [
        made(f"batch {rows}", [some(short) for _ in range(rows)], [new] * rows, rows, rounds)
        for rows in ((1, 3) if quick else (1, 8, 32))
    ]
    few, longest, most = (4, 40, 6) if quick else (64, 1500, 256)
    lengths = [int(10 * (longest / 10) ** rng.random()) for _ in range(few)]
    news = [rng.randint(min(16, most), most) for _ in range(few)]
    slow = max(rounds // 3, 1)
    every.append(made("spread", [some(n) for n in lengths], news, BATCH, slow))
    prefix = some(40 if quick else 2000)
    rows = 3 if quick else 32
    own = [prefix + some(short) for _ in range(rows)]
    every.append(made("shared", own, [4 if quick else 32] * rows, BATCH, slow))
    return every
