"""The mover: pages go down and come up, behind whoever computes."""

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvpaged.config import format_bytes
from kvpaged.errors import ConfigError
from kvpaged.offload.arrivals import Wanted
from kvpaged.offload.demoter import Demoter
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.policy import Line
from kvpaged.offload.pool import PoolView
from kvpaged.offload.promotion import Promotion
from kvpaged.offload.search import Search
from kvpaged.offload.stack import Stack
from kvpaged.offload.staging import Staging
from kvpaged.tiers.base import Tier

log = logging.getLogger("kvpaged.offload")

IDLE_S = 0.25
"""How often the mover looks for something to do when nobody says so."""
YIELD_S = 0.25
"""How long what goes down waits for what comes up, at most: they share memory and processors, and
somebody waits for the latter.
"""
LEAST_TOKENS = 32
"""Of a pass from which the time it took says something of prompts."""
ERRORS = (0.5, 0.75, 1.0, 1.25, 2.0)
"""Bounds of the histogram of what happened over what was predicted."""


class Predictions(NamedTuple):
    """How good predictions were: how many had a ratio of what happened to what was predicted up
    to each bound of `ERRORS`, and beyond the last.
    """

    counts: tuple[int, ...]

    @property
    def within(self) -> float | None:
        """The share that was within 25 %."""
        total = sum(self.counts)
        return (self.counts[2] + self.counts[3]) / total if total else None


class _Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(ERRORS) + 1)

    def add(self, predicted: float, happened: float) -> None:
        ratio = happened / max(predicted, 1e-9)
        self.counts[sum(ratio > bound for bound in ERRORS)] += 1


class Mover:
    """Everything between a pool and its tiers. Any thread may call.

    Lock order: the cache's lock, then the stack's. A thread of its own demotes; tiers are called
    by a thread each.
    """

    def __init__(self, pool: PoolView, tiers: Sequence[Tier], options: OffloadOptions) -> None:
        """
        Raises:
            ConfigError: staging has no room for two pages of a group, or a tier is none.
        """
        largest = pool.most_body_bytes()
        if options.staging_bytes < 2 * largest:
            raise ConfigError(
                f"staging of {format_bytes(options.staging_bytes)} has no room for two pages of "
                f"{format_bytes(largest)}"
            )
        self.pool, self.options = pool, options
        cuda = any(not immediate for immediate in pool.immediate) and torch.cuda.is_available()
        self.staging = Staging(options.staging_bytes, pin=cuda)
        self.stack = Stack(tiers, options)
        self._woken = threading.Event()
        self.demoter = Demoter(pool, self.stack, self.staging, options, self._woken.set)
        self.compute = Line()
        self.search = Search(pool, self.stack, self.compute)
        self.load_errors, self.compute_errors = _Histogram(), _Histogram()
        self.begun = self.load_failures = 0
        """Pages that were to come, and promotions that ended early."""
        self._figures = threading.Lock()
        self._coming = 0  # promotions that are not over
        self._none_coming = threading.Event()
        self._none_coming.set()
        self._stop = threading.Event()
        pool.index.on_enter = self.demoter.note_entered
        pool.index.on_leave = self.demoter.note_leaving
        self._thread = threading.Thread(
            target=_serve, args=(weakref.ref(self), self._woken, self._stop, options.linger_s),
            daemon=True, name="kvpaged mover",
        )  # fmt: skip
        self._thread.start()

    # -- loading -----------------------------------------------------------------------------------

    def promote(self, wanted: Sequence[Wanted], load_s: float | None) -> Promotion:
        """A promotion of pages that a row holds, to be started; the cache's lock is held."""
        self.begun += len(wanted)
        promotion = Promotion(
            self.pool, self.stack, self.staging, self.options, wanted,
            predicted_s=load_s, compute=self._compute_s, on_end=self._ended,
        )  # fmt: skip
        with self._figures:
            self._coming += 1
            self._none_coming.clear()
        return promotion

    def _compute_s(self, pages: int) -> float | None:
        return self.compute.at(pages * self.pool.index.page_size)

    def _ended(self, promotion: Promotion) -> None:
        outcome = promotion.outcome
        assert outcome is not None
        with self._figures:
            self._coming -= 1
            if not self._coming:
                self._none_coming.set()
            self.load_failures += bool(outcome.error)
            predicted = outcome.predicted_s
            if predicted is not None and (outcome.error is None or outcome.seconds > predicted):
                self.load_errors.add(predicted, outcome.seconds)

    def note_pass(self, tokens: int, seconds: float) -> None:
        """A forward pass has computed so many tokens."""
        if tokens < LEAST_TOKENS:
            return
        with self._figures:
            predicted = self.compute.at(tokens)
            if predicted is not None:
                self.compute_errors.add(predicted, seconds)
            self.compute.add(tokens, seconds)

    # -- demoting ----------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None, *, down: bool = True) -> bool:
        """Wait until what is to go down has gone, to tiers that are not asked now too unless `down`
        is false; false if it has not in time.
        """
        end = time.monotonic() + (self.options.close_s if timeout is None else timeout)
        while self.demoter.waiting or self._working or self.demoter.behind(down=down):
            if time.monotonic() > end:
                return False
            self._woken.set()
            time.sleep(0.005)
        return True

    _working = False

    def give_way(self) -> None:
        """For its thread, once before it begins: let what comes up go first."""
        if 2 * self.staging.used <= self.staging.size:  # else what leaves would be dropped
            self._none_coming.wait(YIELD_S)

    def turn(self) -> bool:
        """For its thread: move some; whether there was anything."""
        self._working = True
        try:
            return self.demoter.run()
        except Exception:  # a fault of ours or a device's: the cache goes on without
            log.exception("demotion failed")
            return False
        finally:
            self._working = False

    def save_all(self) -> None:
        """Have every page of the pool go to the persistent tiers that lack it."""
        persistent = [n for n, tier in enumerate(self.stack.tiers) if tier.persistent]
        if persistent:
            self.demoter.sweep(persistent, time.monotonic())

    def close(self) -> None:
        """Write what is to be written, as far as there is time, and close the tiers."""
        if self._stop.is_set():
            return
        self.save_all()
        if not self.flush(down=False):
            log.warning("%d pages were not written in time", self.demoter.waiting)
        self._stop.set()
        self._woken.set()
        self._thread.join(self.options.close_s)
        self.pool.index.on_enter = self.pool.index.on_leave = None
        self.stack.close()
        self.staging.close()


def _serve(
    of: "weakref.ref[Mover]", woken: threading.Event, stop: threading.Event, linger_s: float
) -> None:
    while not stop.is_set():
        if woken.wait(IDLE_S):
            stop.wait(linger_s)  # full pages come one by one
        woken.clear()
        first = True
        while not stop.is_set():
            mover = of()
            if mover is None:
                return
            if first:
                mover.give_way()
            moved, first = mover.turn(), False
            del mover
            if not moved:
                break
