"""Streams, submissions, threads: who asks, who hears of it, and what ends a request early."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from benchmarks import common
from kvpaged import Completion, Generator, PagedKVCache, SamplingParams
from kvpaged.generate.flight import Arrival
from tests.generate.asked import alone, mixed, params_of

pytestmark = pytest.mark.usefixtures("lookahead")


def test_streams_say_everything_once_and_cancel_when_left(model):
    prompts, news = mixed(5)
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        told: dict[int, list[int]] = {}
        last = {}
        for event in generator.stream(prompts, params_of(news)):
            assert event.request not in last
            told.setdefault(event.request, []).extend(event.tokens)
            if event.completion is not None:
                last[event.request] = event.completion
        assert [told[i] for i in range(5)] == [last[i].tokens for i in range(5)]
        assert [told[i] for i in range(5)] == [
            alone(model, p, n) for p, n in zip(prompts, news, strict=True)
        ]
        for event in generator.stream([[5, 6]], max_new_tokens=300):
            assert event.completion is None
            break
        assert cache.stats().used == 0


def test_priorities_deadlines_and_cancelling(model):
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, max_running=1) as generator,
    ):
        order: list[int] = []
        first = generator.submit([5] * 20, max_new_tokens=30)
        others = [generator.submit([6, i], max_new_tokens=1, priority=i) for i in (2, 3, 4)]
        for number, submission in enumerate(others):
            submission.of.on_end = lambda _, number=number: order.append(number)
        late = generator.submit([7], max_new_tokens=400, deadline_s=0.0)
        gone = generator.submit([8], max_new_tokens=400)
        gone.cancel()
        assert late.result(60)[0].finish_reason == "deadline"
        assert gone.result(60)[0].finish_reason == "cancelled"
        assert len(first.result(60)[0].tokens) == 30
        assert all(len(submission.result(60)[0].tokens) == 1 for submission in others)
        assert order == sorted(order, reverse=True)
        cache.check_integrity()


def test_asyncio_and_threads_share_one_loop(model):
    prompts, news = mixed(8, seed=2)
    wanted = [alone(model, p, n) for p, n in zip(prompts, news, strict=True)]
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, max_running=4) as generator,
    ):

        async def one(prompt, new):
            tokens: list[int] = []
            submission = generator.submit(prompt, max_new_tokens=new)
            async for event in submission:
                tokens.extend(event.tokens)
            (completion,) = await submission
            assert completion.tokens == tokens
            return tokens

        async def all_of_them():
            return await asyncio.gather(*(one(p, n) for p, n in zip(prompts, news, strict=True)))

        from_thread: list[Completion] = []
        thread = threading.Thread(
            target=lambda: from_thread.extend(generator.generate(prompts, params_of(news)))
        )
        thread.start()
        assert asyncio.run(all_of_them()) == wanted
        thread.join()
        assert [c.tokens for c in from_thread] == wanted
        cache.check_integrity()
        assert cache.stats().used == 0


@pytest.mark.parametrize("door", ["generate", "stream"])
def test_threads_are_told_of_their_own_requests(model, door):
    """Numbers were drawn one by one, so that those of two calls could alternate."""
    wrong: list[Any] = []

    def ask(token):
        for _ in range(30):
            prompts = [[token, i] for i in range(2, 12)]
            if door == "generate":
                said = [c.request for c in generator.generate(prompts, max_new_tokens=1)]
            else:
                said = sorted(e.request for e in generator.stream(prompts, max_new_tokens=1))
            if said != list(range(10)):
                wrong.append(said)

    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=ask, args=(token,)) for token in range(2, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_loop_of_steps_keeps_nobody_out(model):
    """The lock went back to the thread that had just let go of it, until its replies had ended."""
    passes: list[int] = []

    def slow(module, args):
        passes.append(1)
        time.sleep(0.01)

    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        handle = model.model.layers[0].register_forward_pre_hook(slow)
        thread = threading.Thread(target=lambda: generator.generate([[5, 6]], max_new_tokens=60))
        thread.start()
        while len(passes) < 3:
            time.sleep(0.001)
        (reply,) = generator.submit([7, 8], max_new_tokens=2).result(60)
        gone = generator.submit([7, 9], max_new_tokens=60)
        gone.cancel()
        (short,) = generator.generate([[9, 8]], max_new_tokens=2)
        so_far = len(passes)
        thread.join()
        handle.remove()
    assert so_far < 30  # of 60
    assert len(reply.tokens) == len(short.tokens) == 2
    assert gone.result(60)[0].finish_reason == "cancelled"


def test_more_may_wait_than_an_event_loop_has_threads(model):
    order: list[int] = []

    async def wait(number, new):
        await generator.submit([5, 6, number], max_new_tokens=new)
        order.append(number)

    async def several():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        await asyncio.gather(wait(2, 300), wait(3, 5), wait(4, 100))

    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        asyncio.run(several())
    assert order == [3, 4, 2]


def test_an_event_loop_that_is_gone_harms_nobody(model):
    async def wait(submission):
        await submission

    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        loop = asyncio.new_event_loop()
        submission = generator.submit([5, 6], max_new_tokens=200)
        events = aiter(submission)
        loop.run_until_complete(anext(events))
        waits = loop.create_task(wait(submission))
        loop.run_until_complete(asyncio.sleep(0))
        waits.cancel()
        loop.run_until_complete(asyncio.gather(waits, return_exceptions=True))
        loop.close()
        assert len(generator.generate([[7, 8]], max_new_tokens=250)[0].tokens) == 250
        assert len(submission.result(60)[0].tokens) == 200


LEFT_OPEN = """
from kvpaged import Generator, PagedKVCache
from tests.hf.tiny import tiny

model = tiny(hidden_size=1024, intermediate_size=4096)
generator = Generator(model, PagedKVCache.for_model(model, "100MiB", page_size=16))
submissions = [generator.submit([5, 6, i], max_new_tokens=2000) for i in range(16)]
next(iter(generator.stream([[7]], max_new_tokens=5)))
"""


def test_a_program_may_end_while_something_is_open():
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN], check=False, capture_output=True, text=True,
        cwd=common.ROOT, env=common.tree_env(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def default_interrupts():
    """What Python does by itself, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupts")
def test_ctrl_c_leaves_the_cache_whole(model):
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        steps = []

        def interrupt(ids, scores):
            steps.append(1)
            if len(steps) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return scores

        with pytest.raises(KeyboardInterrupt):
            generator.generate(
                [[5] * 40, [6] * 30], max_new_tokens=100, logits_processors=(interrupt,)
            )
        assert len(steps) < 12
        assert cache.stats().used == 0
        cache.check_integrity()
        assert generator.generate([[5, 6, 7]], max_new_tokens=4)[0].tokens == alone(
            model, [5, 6, 7], 4
        )


def test_a_failing_pass_ends_what_took_part_in_it(model):
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, max_running=2) as generator,
    ):
        handle = model.model.layers[1].register_forward_pre_hook(_fail_once())
        done = generator.generate([[5, 6]] * 2 + [[7, 8]], max_new_tokens=3)
        handle.remove()
        assert [c.finish_reason for c in done] == ["error", "error", "length"]
        assert str(done[0].error) == "a failing layer"
        cache.check_integrity()


def _fail_once():
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a failing layer")

    return hook


def test_submissions_hear_of_a_failing_loop(model, monkeypatch):
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):

        def broken(*_):
            raise RuntimeError("a failing loop")

        monkeypatch.setattr(generator._engine, "_land", broken)
        (completion,) = generator.submit([5, 6, 7], max_new_tokens=5).result(60)
        assert str(completion.error) == "a failing loop"
        monkeypatch.undo()
        (completion,) = generator.submit([5, 6, 7], max_new_tokens=5).result(60)
        assert completion.tokens == alone(model, [5, 6, 7], 5)
        cache.check_integrity()


def test_random_requests_cancels_and_set_backs_lose_nothing(model):
    """A few hundred steps of everything at once, books checked after each."""
    rng = random.Random(0)
    with PagedKVCache.for_model(model, "200KiB", page_size=16) as cache:
        generator = Generator(model, cache, max_running=6, max_batch_tokens=40)
        engine = generator._engine
        asked: list[Completion] = []
        ended: list[Completion] = []
        for _ in range(300):
            if rng.random() < 0.3 and len(asked) - len(ended) < 20:
                prompts, (new,) = mixed(1, seed=rng.random(), longest=120)
                requests = generator._requests(
                    prompts,
                    SamplingParams(
                        max_new_tokens=new, n=rng.choice([1, 1, 3]),
                        temperature=rng.choice([0, 1.0]), prompt_lookup=rng.choice([0, 4]),
                    ),
                    {}, salt=rng.choice([None, "a"]), priority=rng.choice([0, 0, 1]),
                    deadline_s=None,
                )  # fmt: skip
                for request in requests:
                    request.on_end = ended.append
                    engine.add(request)
                    asked += [reply.completion for reply in request.replies]
            if rng.random() < 0.05 and engine.line:
                engine.cancel(rng.choice(engine.line).reply.request)
            engine.step()
            cache.check_integrity()
            assert (engine.batch.lengths <= engine.batch.known).all()
        while not engine.idle:
            engine.step()
        assert sorted(map(id, ended)) == sorted(map(id, asked))
        assert engine.stats.preemptions > 0
        assert cache.stats().used == 0
        assert np.array_equal(engine.batch.known, np.zeros(6))
        generator.close()


def test_submitting_waits_for_no_step(model):
    entered, leave = threading.Event(), threading.Event()

    def slow(ids, scores):
        entered.set()
        assert leave.wait(60)
        return scores

    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        first = generator.submit([5, 6, 7], max_new_tokens=1, logits_processors=(slow,))
        assert entered.wait(60)
        second = generator.submit([8, 9], max_new_tokens=2)  # the step above has not ended
        assert not first._ended.is_set()
        leave.set()
        assert second.result(60)[0].tokens == alone(model, [8, 9], 2)
        assert first.result(60)[0].finish_reason == "length"
        third = generator.submit([8, 9], max_new_tokens=10**3)
        third.cancel()  # it may be in the line, or not even there yet
        assert third.result(60)[0].finish_reason == "cancelled"
        cache.check_integrity()


def test_what_runs_and_waits_and_holds_which_pages(model):
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, max_running=2) as generator,
    ):
        stream = generator.stream([[5] * 40, [6] * 10, [7] * 10], max_new_tokens=4)
        next(stream)
        stats = generator.stats()
        assert (stats.running, stats.waiting) == (2, 1)
        held = generator.page_map()
        assert {key: len(pages) for key, pages in held.items()} == {(0, 0): 3, (1, 0): 1}
        assert len(set(np.concatenate(list(held.values())).tolist())) == 4
        assert len(list(stream)) > 3
        stats = generator.stats()
        assert (stats.running, stats.waiting, generator.page_map()) == (0, 0, {})


def test_waiting_for_tokens_is_time_of_the_device(model, monkeypatch):
    read = Arrival.read

    def late(self):
        time.sleep(0.05)
        return read(self)

    monkeypatch.setattr(Arrival, "read", late)
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        generator.generate([[5, 6, 7]], max_new_tokens=10, ignore_eos=True)
        stats = generator.stats()
    assert stats.device_s >= 10 * 0.05
    assert stats.host_s < stats.device_s
