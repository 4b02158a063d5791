"""Threads that generate through one cache: every token as alone, nothing waits for ever."""

import gc
import sys
import threading
import time
import traceback
from collections import Counter
from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvpaged import PagedKVCache
from kvpaged.errors import OutOfPagesError
from tests.hf.tiny import assert_same_tokens, generate, ids, tiny

THREADS, SESSIONS, NEW = 4, 200, 5
PAGES = 26
"""Of 16 tokens. A session takes 2 to 5, and up to 3 a thread are open: too many at times."""
LONGEST = 400
"""Seconds after which a thread that has not ended is stuck; all take some 20 together."""


def prompts() -> list[torch.Tensor]:
    """A small tree: trunks, each with branches that part within a page, each cut in three."""
    found = []
    for trunk in range(3):
        for branch in range(4):
            part = 21 + 9 * branch
            whole = torch.cat((ids(1, 70, trunk)[:, :part], ids(1, 70 - part, 50 + branch)), dim=1)
            found += [whole[:, :length] for length in (33, 48, 66)]
    return [*found, *(torch.cat((a, b)) for a, b in zip(found[::5], found[3::5], strict=False)
                      if a.shape == b.shape)]  # fmt: skip


class Worker(threading.Thread):
    """Opens, forks, closes and forgets sessions, and generates with each.

    Attributes:
        wrong: a prompt and what came of it, where that is not what was expected.
        error: what ended it, if not its own will.
        counts: what it did.
    """

    def __init__(
        self, seed: int, cache: PagedKVCache, model: Any, known: list[tuple[Any, Any]]
    ) -> None:
        super().__init__(name=f"worker {seed}", daemon=True)
        self.random = Random(seed)
        self.cache, self.model, self.known = cache, model, known
        self.open: list[Any] = []
        self.wrong: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.error: BaseException | None = None
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        try:
            for _ in range(SESSIONS):
                self.one()
        except BaseException as error:
            self.error = error
        finally:
            for session in self.open:
                session.close()
            self.open.clear()

    def one(self) -> None:
        """A session of a prompt, tried again when there was no room."""
        number = self.random.randrange(len(self.known))
        prompt = self.known[number][0]
        salt = self.random.choice([None, None, None, b"a", "b"])
        start = self.random.choice([0, 16, 40])
        while True:
            session = self.cache.session(prompt, salt=salt, salt_from=start)
            reused = session.reused
            try:
                out = generate(self.model, session, prompt, max_new_tokens=NEW)
                break
            except OutOfPagesError:
                self.counts["out of pages"] += 1
                session.close()
                while self.open:
                    self.open.pop().close()
                time.sleep(0.001)
        self.counts["sessions"] += 1
        self.counts["hits"] += reused > 0
        self.compare(number, out)
        self.leave(session, number, out)

    def compare(self, number: int, out: torch.Tensor) -> None:
        prompt, expected = self.known[number]
        if not torch.equal(out, expected[:, : out.shape[1]]):
            self.wrong.append((prompt, out))

    def leave(self, session: Any, number: int, out: torch.Tensor) -> None:
        """Close it, forget it, leave it open for a while, or fork it and go on with both."""
        way = self.random.choice(["close", "close", "forget", "fork", "stay", "stay"])
        self.counts[way] += 1
        if way == "fork":
            self.open.append(session.fork())
            for past in (session, self.open[-1]):
                try:
                    self.compare(number, generate(self.model, past, out, max_new_tokens=NEW))
                except OutOfPagesError:
                    self.counts["out of pages"] += 1
        if way == "stay":
            self.open.append(session)
        elif way != "forget":
            session.close()
        while len(self.open) > 2:
            self.open.pop(self.random.randrange(len(self.open))).close()


@pytest.fixture
def often_switched():
    """One thread a tensor operation, and the interpreter's lock handed on a hundred times as
    often.
    """
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(5e-5)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def join(workers: list[Worker]) -> None:
    """Wait for all; fail with the stacks of all threads if one does not end."""
    deadline = time.monotonic() + LONGEST
    for worker in workers:
        worker.join(max(deadline - time.monotonic(), 0))
    stuck = [worker.name for worker in workers if worker.is_alive()]
    if stuck:
        stacks = [
            "".join(traceback.format_stack(frame)) for frame in sys._current_frames().values()
        ]
        pytest.fail(f"{stuck} did not end:\n\n" + "\n".join(stacks))


@pytest.mark.usefixtures("often_switched")
def test_threads_generate_what_each_would_alone():
    model = tiny()
    known = [
        (prompt, generate(model, DynamicCache(config=model.config), prompt, max_new_tokens=2 * NEW))
        for prompt in prompts()
    ]
    page_bytes = 16 * 2 * 2 * 2 * 16 * 4
    with PagedKVCache.for_model(model, PAGES * page_bytes, page_size=16) as cache:
        assert cache.stats().groups[0].pages == PAGES
        workers = [Worker(seed, cache, model, known) for seed in range(THREADS)]
        for worker in workers:
            worker.start()
        join(workers)
        for worker in workers:
            if worker.error is not None:
                raise worker.error
        counts = sum((worker.counts for worker in workers), Counter())
        for prompt, out in (wrong for worker in workers for wrong in worker.wrong):
            expected = next(tokens for other, tokens in known if other is prompt)
            assert_same_tokens(model, out, expected[:, : out.shape[1]], None)
        gc.collect()
        cache.check_integrity()
        stats = cache.stats()
        print(f"{dict(counts)}, {stats.pages_evicted} pages evicted, {stats.reuse}")
        assert counts["sessions"] == THREADS * SESSIONS
        assert stats.used == 0
        assert cache.batches_alive() == 0
        assert stats.pages_evicted > 100
        assert counts["hits"] > 100
        assert counts["out of pages"] > 0
