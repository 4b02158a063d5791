"""The generation loop on a tiny model: whatever a request rides with, its tokens are its own."""

import asyncio
import os
import random
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from kvpaged import Completion, Generator, OutOfPagesError, PagedKVCache, SamplingParams
from kvpaged.errors import UnsupportedModelError, UsageError
from tests.hf.tiny import assert_same_tokens, tiny


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny()


def alone(model, prompt, new, **options):
    """What `generate()` gives for a prompt by itself."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def mixed(count, seed=0, longest=90, new=20):
    """Prompts of mixed lengths, some of them beginning as others do."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    news: list[int] = []
    for _ in range(count):
        ids = [rng.randrange(2, 128) for _ in range(rng.randint(1, longest))]
        if prompts and rng.random() < 0.4:
            ids = rng.choice(prompts)[: rng.randint(1, longest)] + ids[: rng.randint(1, 20)]
        prompts.append(ids)
        news.append(rng.randint(1, new))
    return prompts, news


def params_of(news, **options):
    return [SamplingParams(max_new_tokens=new, **options) for new in news]


def assert_greedy(model, done, prompts, wanted):
    for completion, prompt, tokens in zip(done, prompts, wanted, strict=True):
        assert completion.error is None
        assert len(completion.tokens) == len(tokens)
        whole = torch.tensor([prompt + completion.tokens]), torch.tensor([prompt + tokens])
        assert_same_tokens(model, *whole, None)


@pytest.fixture(scope="module")
def work(model):
    prompts, news = mixed(40)
    return prompts, news, [alone(model, p, n) for p, n in zip(prompts, news, strict=True)]


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        ("4MiB", {}),
        ("4MiB", {"chunk": 1, "max_batch_tokens": 20, "max_running": 8}),
        ("4MiB", {"chunk": 7, "max_running": 16}),
        ("4MiB", {"chunk": 33, "max_batch_tokens": 64}),
        ("4MiB", {"max_running": 1}),
        ("4MiB", {"max_running": 3, "pack_weights": True}),
        ("300KiB", {"max_running": 16}),
        ("150KiB", {"max_running": 16, "chunk": 5}),
    ],
)
def test_greedy_tokens_are_those_of_generate_alone(model, work, memory, options):
    prompts, news, wanted = work
    with (
        PagedKVCache.for_model(model, memory, page_size=16) as cache,
        Generator(model, cache, **options) as generator,
    ):
        done = generator.generate(prompts, params_of(news))
        assert_greedy(model, done, prompts, wanted)
        assert [c.request for c in done] == list(range(len(prompts)))
        assert cache.stats().used == 0
        cache.check_integrity()
        assert sum(c.cached_tokens for c in done) > 0
        if memory == "150KiB":
            assert generator.stats().preemptions > 0
        again = generator.generate(prompts, params_of(news))  # now from the cache
        assert [c.tokens for c in again] == [c.tokens for c in done]


def test_on_the_reference_kernels_and_page_major_pages(model, work):
    prompts, news, wanted = (x[:12] for x in work)
    with (
        PagedKVCache.for_model(
            model, "4MiB", page_size=16, backend="reference", layout="page-major"
        ) as cache,
        Generator(model, cache, chunk=24, max_running=5) as generator,
    ):
        assert_greedy(model, generator.generate(prompts, params_of(news)), prompts, wanted)


def test_windows_and_full_attention_side_by_side():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.3, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    prompts, news = mixed(16, seed=3)
    wanted = [alone(model, p, n) for p, n in zip(prompts, news, strict=True)]
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, chunk=19, max_running=6) as generator,
    ):
        for _ in range(2):
            assert_greedy(model, generator.generate(prompts, params_of(news)), prompts, wanted)
        cache.check_integrity()


def test_several_replies_are_forks_and_each_has_its_own_numbers(model):
    prompt = mixed(1, seed=5)[0][0] + [7] * 30
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        with Generator(model, cache) as generator:
            many = generator.generate([prompt], max_new_tokens=9, n=5, temperature=1.5, seed=11)
            assert generator.stats().tokens == len(prompt) + 5 * 8  # the prompt once
        assert [c.index for c in many] == list(range(5))
        assert len({tuple(c.tokens) for c in many}) == 5
        cache.clear()
        with Generator(model, cache, max_running=2) as generator:  # in turns
            turns = generator.generate([prompt], max_new_tokens=9, n=5, temperature=1.5, seed=11)
        assert [c.tokens for c in turns] == [c.tokens for c in many]
        with Generator(model, cache, max_running=4) as generator:
            greedy = generator.generate([prompt], max_new_tokens=9, n=3)
        assert all(c.tokens == alone(model, prompt, 9) for c in greedy)
        cache.check_integrity()


def test_drawn_tokens_do_not_depend_on_the_batch(model):
    prompts, news = mixed(12, seed=7)
    options = [
        SamplingParams(
            max_new_tokens=n,
            temperature=1.2,
            seed=i,
            top_k=(0, 20)[i % 2],
            top_p=(1, 0.9)[i % 3 > 0],
        )
        for i, n in enumerate(news)
    ]
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        with Generator(model, cache) as generator:
            together = generator.generate(prompts, options)
        with Generator(model, cache, max_running=2, chunk=5) as generator:
            few = generator.generate(prompts[::-1], options[::-1])[::-1]
    assert [c.tokens for c in few] == [c.tokens for c in together]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guessing_ahead_changes_no_token(model, temperature):
    prompts = [[5, 6, 7, 8, 9] * 8, [3, 4] * 20, mixed(1)[0][0]]
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 4, "logprobs": 0}
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        plain = generator.generate(prompts, **options)
        steps = generator.stats().steps
        guessed = generator.generate(prompts, prompt_lookup=5, **options)
        cache.check_integrity()
    assert [c.tokens for c in guessed] == [c.tokens for c in plain]
    for ours, theirs in zip(guessed, plain, strict=True):
        pairs = zip(ours.logprobs or (), theirs.logprobs or (), strict=True)
        assert all(a.logprob == pytest.approx(b.logprob, abs=1e-3) for a, b in pairs)
        assert len(ours.logprobs or ()) == len(ours.tokens)
    if temperature == 0:  # a tiny model repeats itself
        assert sum(c.drafted for c in guessed) > 0
        assert sum(c.accepted for c in guessed) > 0
        assert generator.stats().steps - steps <= steps


def test_ends_and_processors(model):
    prompt = mixed(1)[0][0]
    tokens = alone(model, prompt, 12)
    stop = tokens[5]
    first = tokens.index(stop)
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        ended, other, penalised = generator.generate(
            [prompt] * 3,
            [
                SamplingParams(max_new_tokens=12, stop_token_ids=(stop,)),
                SamplingParams(max_new_tokens=12, logits_processors=(lambda i, s: -s,), logprobs=3),
                SamplingParams(max_new_tokens=12, repetition_penalty=1.4),
            ],
        )
    assert ended.finish_reason == "stop"
    assert ended.tokens == tokens[: first + 1]
    with torch.no_grad():
        scores = model(torch.tensor([prompt])).logits[0, -1]
    assert other.tokens[0] == int(scores.argmin())
    assert other.logprobs is not None
    assert len(other.logprobs) == 12
    assert other.logprobs[0].logprob == pytest.approx(float(scores.log_softmax(-1).min()), abs=1e-3)
    assert [i for i, _ in other.logprobs[0].top] == scores.topk(3).indices.tolist()
    assert penalised.tokens == alone(model, prompt, 12, repetition_penalty=1.4)


def test_one_bad_request_ends_alone(model):
    def broken(ids, scores):
        raise ValueError("broken processor")

    prompts, news = mixed(6)
    wanted = [alone(model, p, n) for p, n in zip(prompts, news, strict=True)]
    bad: list[Any] = [[], [128], [3, -1], [2.5], [4, 5]]
    options = [SamplingParams()] * 4 + [SamplingParams(logits_processors=(broken,))]
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        done = generator.generate([*bad, *prompts], [*options, *params_of(news)])
        cache.check_integrity()
        assert cache.stats().used == 0
    assert all(c.finish_reason == "error" and c.tokens == [] for c in done[:5])
    with pytest.raises(UsageError, match=r"0\.\.127, got 128"):
        done[1].raise_for_error()
    with pytest.raises(ValueError, match="broken processor"):
        done[4].raise_for_error()
    assert [c.tokens for c in done[5:]] == wanted


def test_a_request_that_cannot_fit_alone_says_by_how_much(model):
    with (
        PagedKVCache.for_model(model, "100KiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        pages = cache.stats().groups[0].pages
        prompts = [[5] * (16 * pages + 8), [6] * 20, [7] * 60]
        news = [5, 5, 16 * pages]
        long, short, grows = generator.generate(prompts, params_of(news))
        cache.check_integrity()
    assert isinstance(long.error, OutOfPagesError)
    assert "1 pages" in str(long.error)
    assert long.error.needed - long.error.available == 1
    assert short.tokens == alone(model, prompts[1], 5)
    assert isinstance(grows.error, OutOfPagesError)
    assert len(grows.tokens) == 16 * pages - 60 + 1  # as far as the pages went


def test_a_prefix_being_computed_is_waited_for(model):
    shared = mixed(1, seed=9, longest=90)[0][0] + [9] * 64
    prompts = [[*shared, i, i] for i in range(2, 10)]
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, chunk=16) as generator,
    ):
        done = generator.generate(prompts, max_new_tokens=3)
        computed = generator.stats().tokens
    whole = len(shared) // 16 * 16
    assert all(c.cached_tokens >= whole for c in done[1:])
    assert computed < len(shared) + 8 * (16 + 2 + 3)
    assert [c.tokens for c in done] == [alone(model, p, 3) for p in prompts]


def test_salts_share_nothing(model):
    prompt = [5] * 50
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        found = [
            generator.generate([prompt], max_new_tokens=2, salt=salt)[0].cached_tokens
            for salt in (None, "a", "a", "b", None)
        ]
    assert found == [0, 0, 48, 0, 48]


def test_changed_weights_are_not_found():
    model = tiny()
    prompt = [5, 9] * 30
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, pack_weights=True) as generator,
    ):
        generator.generate([prompt], max_new_tokens=2)
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)
        (done,) = generator.generate([prompt], max_new_tokens=8)
    assert done.cached_tokens == 0
    assert done.tokens == alone(model, prompt, 8)
    assert "forward" not in vars(model.lm_head)


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


def test_submissions_hear_of_a_failing_loop(model, monkeypatch):
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):

        def broken(*_):
            raise RuntimeError("a failing loop")

        monkeypatch.setattr(generator._engine, "_take", broken)
        (completion,) = generator.submit([5, 6, 7], max_new_tokens=5).result(60)
        assert str(completion.error) == "a failing loop"
        monkeypatch.undo()
        (completion,) = generator.submit([5, 6, 7], max_new_tokens=5).result(60)
        assert completion.tokens == alone(model, [5, 6, 7], 5)
        cache.check_integrity()


def _fail_once():
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a failing layer")

    return hook


def test_models_that_mix_tokens_elsewhere_are_refused():
    model = tiny()
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: inner(x + x.cumsum(1))
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        pytest.raises(UnsupportedModelError, match="packed before it"),
    ):
        Generator(model, cache)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, of torch.jit
def test_greedy_tokens_compiled(model):
    prompts, news = mixed(10)
    wanted = [alone(model, p, n) for p, n in zip(prompts, news, strict=True)]
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, compile=True, pack_weights=True, max_running=4) as generator,
    ):
        assert generator.compile_s is not None
        from torch._dynamo.utils import counters

        graphs = counters["stats"]["unique_graphs"]
        done = generator.generate(prompts, params_of(news))
        assert_greedy(model, done, prompts, wanted)
        assert counters["stats"]["unique_graphs"] == graphs  # nothing compiled anew for any size
        cache.check_integrity()
