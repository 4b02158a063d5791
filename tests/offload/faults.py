"""Every fault a tier may have, against a real model: what is asked of whoever generates."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from kvpaged import DiskTier, Generator, HostTier, OffloadOptions, PagedKVCache
from kvpaged.offload.promotion import Outcome, Promotion
from kvpaged.testing.tier_faults import Faulty
from kvpaged.tiers.base import Record, Tier
from kvpaged.tiers.health import Health
from kvpaged.tiers.wrappers import Asked, Kind
from tests.offload.tiered import until

DEADLINE_S = 0.2
OPTIONS = OffloadOptions(
    staging_bytes=32 << 20, call_bytes=1 << 20, deadline_s=DEADLINE_S, write_deadline_s=DEADLINE_S,
    close_s=2.0, linger_s=0.001,
)  # fmt: skip
NEW = 2
"""Tokens generated after each prompt."""
PAGE_SIZE = 16
MEMORY = "6MiB"
"""Of the pool: eight pages of SmolLM2, for prompts that take three each and what follows."""

POSITIONS: dict[str, Callable[[Path], list[Tier]]] = {
    "host": lambda _: [HostTier("64MiB", policy="write-through", pin=False)],
    "disk": lambda path: [DiskTier(path / "tier", "256MiB")],
    "disk under host": lambda path: [
        HostTier("4MiB", pin=False), DiskTier(path / "tier", "256MiB")
    ],
}  # fmt: skip
"""Stacks whose last tier is to fail."""


class Drive(Protocol):
    """Generates `NEW` tokens greedily after each of some prompts, one after another."""

    def __call__(
        self, model: Any, cache: PagedKVCache, prompts: Sequence[list[int]]
    ) -> list[list[int]]: ...


def by_session(model: Any, cache: PagedKVCache, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Under the unmodified `generate()`."""
    replies = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with cache.session(ids) as past:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=past, do_sample=False,
                max_new_tokens=NEW, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
        replies.append(out[0, len(prompt) :].tolist())
    return replies


def by_generator(model: Any, cache: PagedKVCache, prompts: Sequence[list[int]]) -> list[list[int]]:
    """By a `Generator`, which loads layer by layer."""
    with Generator(model, cache) as generator:
        replies = []
        for prompt in prompts:
            (done,) = generator.generate([prompt], max_new_tokens=NEW, ignore_eos=True)
            done.raise_for_error()
            replies.append(done.tokens)
    return replies


class Dying(Faulty):
    """Is dead from the `dies_in`-th read on, and for reads that are under way then."""

    dies_in = 0

    def _call(self, kind: Kind, asked: Asked, call: Callable[[], Any]) -> Any:
        if kind == "read" and self.dies_in:
            self.dies_in -= 1
            if not self.dies_in:
                done: list[Record | None] = super()._call(kind, asked, call)
                self.dead = True
                return [*done[:-1], None]
        return super()._call(kind, asked, call)


def _hang(tier: Dying) -> None:
    tier.hang = threading.Event()


FAULTS: dict[str, Callable[[Dying], Any]] = {
    "full": lambda tier: setattr(tier, "full", True),
    "slow": _hang,
    "failing": lambda tier: setattr(tier, "fail_rate", 0.5),
    "gone": lambda tier: setattr(tier, "dead", True),
    "gone in the middle": lambda tier: setattr(tier, "dies_in", 2),
    "corrupt": lambda tier: setattr(tier, "flip_rate", 0.5),
    "another's": lambda tier: setattr(tier, "lie_rate", 0.5),
    "read-only": lambda tier: setattr(tier, "read_only", True),
}


def mend(tier: Dying) -> None:
    """The fault ends."""
    tier.full = tier.read_only = tier.dead = False
    tier.fail_rate = tier.flip_rate = tier.lie_rate = 0.0
    tier.dies_in = 0
    hang, tier.hang = tier.hang, None
    if hang is not None:
        hang.set()


class Matrix:
    """A cache whose last tier is to fail, and what came of its promotions. The first tier of two
    is too small for what the second has, or empties when the pool does.

    Attributes:
        tier: the one that fails.
        outcomes: of promotions, as they ended.
    """

    def __init__(self, model: Any, tiers: list[Tier]) -> None:
        self.tier = Dying(tiers[-1], seed=1)
        self.cache = PagedKVCache.for_model(
            model, MEMORY, page_size=PAGE_SIZE, tiers=[*tiers[:-1], self.tier], offload=OPTIONS
        )
        self.outcomes: list[Outcome] = []
        mover = self.cache.mover
        assert mover is not None
        self.mover = mover
        self.now = 0.0
        self.number = len(tiers) - 1
        self.worker = mover.stack.workers[self.number]
        self.worker.health = Health(lambda: self.now)
        ended = mover._ended

        def note(promotion: Promotion) -> None:
            assert promotion.outcome is not None
            self.outcomes.append(promotion.outcome)
            ended(promotion)

        mover._ended = note  # type: ignore[method-assign]

    def settle(self) -> None:
        """What can go down has gone, and the pool is empty."""
        self.mover.flush(5.0, down=False)
        self.cache.clear()
        self.check()

    def check(self) -> None:
        """Bytes, books, and where pages have gone."""
        self.cache.check_integrity()

    def promoted(self) -> int:
        """Pages that the failing tier has given so far."""
        return self.mover.stack.flows[self.number].promoted

    def close(self) -> None:
        mend(self.tier)
        self.cache.close()


def run_matrix(
    drive: Drive, model: Any, prompts: list[list[int]], wanted: list[list[int]], fault: str,
    tiers: list[Tier],
) -> None:  # fmt: skip
    """Generate before, during and after a fault: the tokens are those of a cache without tiers,
    nothing raises, a call that does not return is waited for once, and the tier is of use again
    when the fault has ended.
    """
    of = Matrix(model, tiers)
    try:
        assert drive(model, of.cache, prompts) == wanted
        of.settle()
        FAULTS[fault](of.tier)
        assert drive(model, of.cache, prompts) == wanted
        of.settle()
        late = [one for one in of.outcomes if one.error is not None and "progress" in one.error]
        assert len(late) <= (fault == "slow"), "it was waited for again"
        if fault == "slow":
            assert of.worker.parked
            assert len(late) == 1
        if fault in ("slow", "gone"):
            assert of.promoted() == 0
        mend(of.tier)
        until(lambda: not of.worker.parked, "the call has returned, and it is not asked")
        before = of.promoted()
        for _ in range(3):
            of.now += 3600.0
            assert drive(model, of.cache, prompts) == wanted
            assert of.mover.flush(30.0), "it does not get what it lacks"
            of.cache.clear()
            of.check()
            if of.promoted() > before:
                break
        else:
            raise AssertionError("the fault has ended, and nothing is promoted")
    finally:
        of.close()
