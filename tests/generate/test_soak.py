"""Random requests through all doors at once, in a pool too small for them, for as long as told.

Each round opens a `Generator` on the one cache, lets threads ask, read, leave and cancel, and ends
by waiting for them or by closing the generator under them. `make soak` runs it for half an hour, or
for as long as `KVPAGED_SOAK_MINUTES` says; the suite for seconds.
"""

import asyncio
import ctypes
import faulthandler
import gc
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvpaged import Completion, Generator, PagedKVCache, TokenEvent
from kvpaged.errors import UsageError
from kvpaged.generate.submission import Submission
from kvpaged.integrations.native import NativeAttention
from tests.generate.asked import hybrid, windowed
from tests.generate.known import LETTERS, Ask, Known, prompts_of
from tests.hf.tiny import tiny

pytestmark = pytest.mark.usefixtures("lookahead", "one_thread")

MINUTES = float(os.environ.get("KVPAGED_SOAK_MINUTES", "30"))
HANG_S = 300
"""A thread that has not ended so long after it was told to: no limit on speed."""
GROWTH = 20 * 2**20
"""Resident bytes that may come after the warm-up: the allocator's, for nothing of a request is
kept.
"""
HAPPENED = (
    "asked by generate", "asked by stream", "asked by submit", "prefix hits", "forks", "stop",
    "tokens guessed right", "preemptions", "cancelled", "deadline", "streams left",
    "BrokenProcessorError", "OutOfPagesError", "UsageError", "closed under requests",
)  # fmt: skip


Told = dict[tuple[int, int], list[int]]
Shown = dict[tuple[int, int], str]
Ended = dict[tuple[int, int], Completion]
"""Tokens, text and ends of replies, by request and index."""


def plain() -> Any:
    return tiny()


def windows() -> Any:
    """Layers with a window beside full ones: two groups in one pool."""
    return hybrid()


def resident() -> int:
    """Bytes of this process in memory, without what malloc keeps for later (glibc gives it back if
    told to); 0 where /proc does not say.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


class Round:
    """One generator, and threads that ask it until they are told to stop.

    `counts` and `failures` are shared by the threads, under `lock`.
    """

    def __init__(
        self, generator: Generator, known: Known, pool_tokens: int | None, counts: Counter[str]
    ):
        self.generator = generator
        self.known, self.pool_tokens = known, pool_tokens
        self.counts = counts
        self.failures: list[BaseException] = []
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.closing = False

    def start(self, seed: int) -> list[threading.Thread]:
        works = [self.generates, self.generates, self.streams, self.streams, self.submits]
        bodies: list[Callable[[random.Random], None]] = [
            *works,
            lambda rng: asyncio.run(self.event_loop(rng)),
        ]
        threads = [
            threading.Thread(target=self.guarded, args=(body, random.Random(seed * 100 + number)))
            for number, body in enumerate(bodies)
        ]
        for thread in threads:
            thread.start()
        return threads

    def guarded(self, body: Callable[[random.Random], None], rng: random.Random) -> None:
        try:
            while not self.stopped.is_set():
                body(rng)
        except BaseException as error:
            with self.lock:
                self.failures.append(error)
            self.stopped.set()

    # -- what is asked, and what came --------------------------------------------------------------

    def ask(self, rng: random.Random, door: str) -> Ask:
        ask = self.known.ask(rng, self.pool_tokens)
        self.count({f"asked by {door}": 1, "requests": 1, "replies asked": ask.params.n})
        return ask

    @contextmanager
    def unless_closed(self, *asks: Ask) -> Iterator[None]:
        """A closed generator refuses requests: all that are asked together, or none."""
        try:
            yield
        except UsageError as error:
            self.refused(error, *asks)

    def refused(self, error: UsageError, *asks: Ask) -> None:
        if not self.closing or "closed" not in str(error):
            raise error
        self.count({"replies refused": sum(ask.params.n for ask in asks)})
        self.stopped.set()

    def submit(self, ask: Ask) -> Submission | None:
        try:
            return self.generator.submit(ask.prompt, ask.params, **ask.options)
        except UsageError as error:
            self.refused(error, ask)
            return None

    def count(self, more: dict[str, int]) -> None:
        with self.lock:
            self.counts.update(more)

    def check(self, ask: Ask, replies: Sequence[Completion], *, cancelled: bool = False) -> None:
        """All replies of a request have ended, each once and rightly."""
        assert [c.index for c in replies] == list(range(ask.params.n)), replies
        for c in replies:
            ask.check(c, cancelled=cancelled or self.closing)
            name = c.finish_reason if c.error is None else type(c.error).__name__
            self.count({
                name: 1, "replies": 1, "tokens": len(c.tokens), "prefix hits": c.cached_tokens > 0,
                "set back": c.preemptions, "tokens guessed right": c.accepted,
                "forks": c.index > 0 and bool(c.tokens),
            })  # fmt: skip

    # -- the doors ---------------------------------------------------------------------------------

    def generates(self, rng: random.Random) -> None:
        asks = [self.ask(rng, "generate") for _ in range(rng.randint(1, 6))]
        options = asks[0].options
        for ask in asks:
            ask.options = options
        prompts, params = [ask.prompt for ask in asks], [ask.params for ask in asks]
        with self.unless_closed(*asks):
            done = self.generator.generate(prompts, params, **options)
            for number, ask in enumerate(asks):
                self.check(ask, [c for c in done if c.request == number])
            assert len(done) == sum(ask.params.n for ask in asks)

    def streams(self, rng: random.Random) -> None:
        asks = [self.ask(rng, "stream") for _ in range(rng.randint(1, 3))]
        options = asks[0].options
        for ask in asks:
            ask.options = options
        prompts, params = [ask.prompt for ask in asks], [ask.params for ask in asks]
        told: Told = {}
        shown: Shown = {}
        ended: Ended = {}
        leave = rng.randint(1, 20) if rng.random() < 0.4 else None
        with (
            self.unless_closed(*asks),
            closing(
                self.generator.stream(prompts, params, **options)  # type: ignore[type-var]
            ) as events,
        ):
            for number, event in enumerate(events):
                self.hear(asks[event.request], event, told, shown, ended)
                if number == leave:
                    self.left(asks, ended)
                    return
            for number, ask in enumerate(asks):
                self.check(ask, [ended[number, index] for index in range(ask.params.n)])

    def left(self, asks: list[Ask], ended: Ended) -> None:
        """A stream is not read on: what had ended by then has to be right."""
        for (request, _), completion in ended.items():
            asks[request].check(completion, cancelled=self.closing)
        self.count({"streams left": 1, "replies left": sum(ask.params.n for ask in asks)})

    def hear(self, ask: Ask, event: TokenEvent, told: Told, shown: Shown, ended: Ended) -> None:
        """An event follows those before it, and is what the request may hear."""
        key = event.request, event.index
        assert key not in ended, f"{event} after its end"
        told.setdefault(key, []).extend(event.tokens)
        assert told[key] == ask.wanted[event.index][: len(told[key])], (ask, event, told[key])
        shown[key] = shown.get(key, "") + event.text
        if event.completion is not None:
            ended[key] = event.completion
            assert told[key] == event.completion.tokens, (event, told[key])
            assert shown[key] == event.completion.text, (event, shown[key])

    def submits(self, rng: random.Random) -> None:
        """Several at a time, some of them cancelled."""
        asks = [self.ask(rng, "submit") for _ in range(rng.randint(1, 8))]
        asked = [(ask, self.submit(ask)) for ask in asks]
        open_ = [(ask, submission) for ask, submission in asked if submission is not None]
        gone = {number for number in range(len(open_)) if rng.random() < 0.3}
        for number in gone:
            time.sleep(rng.random() * 0.004)
            open_[number][1].cancel()
        for number, (ask, submission) in enumerate(open_):
            self.check(ask, submission.result(HANG_S), cancelled=number in gone)

    async def event_loop(self, rng: random.Random) -> None:
        seeds = [rng.random() for _ in range(8)]
        await asyncio.gather(*(self.awaits(random.Random(seed)) for seed in seeds))

    async def awaits(self, rng: random.Random) -> None:
        """Read, leave, cancel or wait for one request."""
        ask = self.ask(rng, "submit")
        submission = self.submit(ask)
        if submission is None:
            return
        number = submission.of.number
        how = rng.choice(["read", "read", "leave", "cancel", "time out", "wait"])
        after = rng.randint(1, 12)
        told: Told = {}
        shown: Shown = {}
        ended: Ended = {}

        async def read() -> None:
            heard = 0
            async for event in submission:
                assert event.request == number
                self.hear(ask, event, told, shown, ended)
                heard += 1
                if heard == after and how == "leave":
                    break
                if heard == after and how == "cancel":
                    await asyncio.to_thread(submission.cancel)

        if how == "time out":
            try:
                await asyncio.wait_for(read(), rng.random() * 0.05)
            except TimeoutError:
                self.count({"timed out": 1})
        elif how != "wait":
            await read()
        replies = await submission
        early = how in ("leave", "cancel", "time out")
        if not early:
            assert how == "wait" or [ended[number, c.index] for c in replies] == replies
        self.check(ask, replies, cancelled=early)


def soak(model: Any, memory: str, seconds: float, *, prompts: int, new: int, round_s: float) -> str:
    """Rounds until the time is over; returns what came of them."""
    known = Known(model, prompts_of(prompts, 0, 80), new)
    counts: Counter[str] = Counter()
    rng = random.Random(0)
    began, warm = time.monotonic(), None
    with PagedKVCache.for_model(model, memory, page_size=16) as cache:
        groups = cache.stats().groups
        bounded = any(group.window is None for group in groups)
        pool_tokens = 16 * max(group.pages for group in groups) if bounded else None
        happened = [what for what in HAPPENED if bounded or what != "OutOfPagesError"]
        while True:
            spent, number = time.monotonic() - began, counts["rounds"]
            everything = all(counts[what] for what in happened) or number > 100
            if spent >= seconds and everything and warm is not None:
                break
            if warm is None and spent > seconds / 6 and number >= 4:
                warm = resident()
            generator = Generator(
                model, cache, max_running=rng.choice([3, 6, 12]),
                chunk=rng.choice([None, 1, 7, 32]), max_batch_tokens=rng.choice([20, 64, None]),
                tokenizer=LETTERS,
            )  # fmt: skip
            if rng.random() < 0.3 and shutil.which("g++"):
                generator._packed.past._native = NativeAttention(cache)
                counts["native rounds"] += 1
            one_round(Round(generator, known, pool_tokens, counts), number, rng, round_s)
            stats = cache.stats()
            assert stats.used == 0, stats
            assert stats.batches == 0, stats
            cache.check_integrity()
            counts["rounds"] += 1
        end = resident()
    return told(type(model).__name__, spent, counts, (warm, end), happened)


def told(
    name: str, spent: float, counts: Counter[str], sizes: tuple[int, int], happened: Sequence[str]
) -> str:
    """What came of a soak: no reply lost, all that is to happen did, and memory, in bytes after the
    warm-up and at the end, did not grow.
    """
    ended = counts["replies"] + counts["replies left"] + counts["replies refused"]
    figures = ", ".join(f"{what} {count:,}" for what, count in sorted(counts.items()))
    warm, end = sizes
    report = (
        f"{name}, {spent:.0f} s: {figures}; resident {warm / 2**20:.1f} MiB after the warm-up, "
        f"{end / 2**20:.1f} at the end"
    )
    assert counts["replies asked"] == ended, report
    assert all(counts[what] for what in happened), report
    assert end - warm < GROWTH, report
    return report


def one_round(this: Round, number: int, rng: random.Random, round_s: float) -> None:
    """Threads ask until the round is over; every second one ends by closing the generator."""
    generator, cache = this.generator, this.generator.cache
    threads = this.start(number)
    this.stopped.wait(round_s * rng.uniform(0.5, 1.5))
    if number % 2:
        this.closing = True
        generator.close()
        this.counts["closed under requests"] += 1
    this.stopped.set()
    for thread in threads:
        thread.join(HANG_S)
    if any(thread.is_alive() for thread in threads):
        faulthandler.dump_traceback()
        raise AssertionError(f"threads hang; {this.failures}")
    if this.failures:
        raise this.failures[0]
    this.counts["preemptions"] += generator.stats().preemptions
    this.counts["steps"] += generator.stats().steps
    if not number % 2:
        assert cache.stats().used == 0, cache.stats()
        cache.check_integrity()
        generator.close()


MODELS = {
    "one layer group": (plain, "128KiB"),
    "two layer groups": (windows, "176KiB"),
    "nothing but windows": (windowed, "80KiB"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_few_seconds_of_everything_at_once(name):
    make, memory = MODELS[name]
    print(soak(make(), memory, 2.5, prompts=12, new=24, round_s=0.4))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", MODELS)
def test_half_an_hour_of_everything_at_once(name):
    make, memory = MODELS[name]
    seconds = MINUTES * 60 / (2 * len(MODELS))  # each runs with and without looking ahead
    print("\n" + soak(make(), memory, seconds, prompts=64, new=48, round_s=8.0))
