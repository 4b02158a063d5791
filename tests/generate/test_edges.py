"""What once went wrong at the edges of a step: ends, threads, options, windows."""

import gc
import random
import threading
from typing import Any

import pytest
import torch

from kvpaged import Generator, PagedKVCache, SamplingParams, TokenEvent
from kvpaged.errors import UsageError
from kvpaged.generate import replies
from kvpaged.generate.generator import REPLY_SEED
from kvpaged.generate.sampler import draw
from kvpaged.integrations import transformers as integration
from tests.generate.asked import alone, windowed
from tests.hf.tiny import tiny

PROMPTS = [[random.Random(s).randrange(2, 128) for _ in range(20 + s)] for s in range(6)]


def within(seconds, call):
    """What a call returns, or None if it has not in time: a lost request spins for ever."""
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0] if said else None


@pytest.mark.filterwarnings("ignore")
def test_adapter_switched_between_requests_is_captured_anew(monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), config, "first")
    model.add_adapter("second", config)
    model.eval().set_adapter("first")

    def capture(run):  # as a CUDA graph: what ran when it was captured runs again
        then = model.active_adapter
        logits = run()

        def replay():
            now = model.active_adapter
            model.set_adapter(then)
            logits.copy_(run())
            model.set_adapter(now)

        return replay, logits

    monkeypatch.setattr(integration, "can_capture", lambda cache: True)
    monkeypatch.setattr(integration, "CudaCapture", lambda: capture)
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16, backend="reference") as cache,
        Generator(model, cache, max_running=2) as generator,
    ):
        for name in ("first", "second"):
            model.set_adapter(name)
            (done,) = generator.generate(PROMPTS[:1], max_new_tokens=30)
            assert done.tokens == alone(model, PROMPTS[0], 30)


def test_an_abandoned_stream_may_be_collected_within_a_step(model):
    wanted = [alone(model, prompt, 12) for prompt in PROMPTS]
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        generator = Generator(model, cache, max_running=4)
        stream = generator.stream(PROMPTS[:1], max_new_tokens=40)
        next(stream)
        cycle: list[Any] = [stream]  # as a traceback that holds the frame of its loop
        cycle.append(cycle)
        gc.disable()
        del stream, cycle
        passes = []

        def collect(*_):
            passes.append(0)
            if len(passes) == 3:
                gc.collect()

        hook = model.model.layers[0].mlp.register_forward_hook(collect)
        try:
            done = within(20, lambda: generator.generate(PROMPTS, max_new_tokens=12))
        finally:
            hook.remove()
            gc.enable()
        assert done is not None
        assert [c.tokens for c in done] == wanted
        generator.close()
        assert cache.stats().used == 0


def test_a_processor_may_cancel_its_own_request(model):
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        generator = Generator(model, cache, max_running=4)
        box: list[Any] = []

        def enough(ids, scores):
            if ids.shape[1] >= len(PROMPTS[0]) + 3 and box:
                box.pop().cancel()
            return scores

        box.append(generator.submit(PROMPTS[0], max_new_tokens=30, logits_processors=(enough,)))
        done = within(20, lambda: generator.generate(PROMPTS, max_new_tokens=12))
        assert done is not None
        assert [c.tokens for c in done] == [alone(model, p, 12) for p in PROMPTS]


def test_a_salt_that_is_none_does_not_end_the_thread(model):
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        generator = Generator(model, cache)
        with pytest.raises(UsageError, match="salt"):
            generator.submit([5, 6, 7], max_new_tokens=3, salt=1.5)  # type: ignore[arg-type]
        assert generator.submit([5, 6, 7], max_new_tokens=3).result(5)[0].error is None


def test_a_stream_is_told_its_end_by_another_threads_step(model, monkeypatch):
    entered, go = threading.Event(), threading.Event()
    real = TokenEvent

    def slow(number, index, tokens, text, completion):
        if completion is not None and completion.prompt_tokens == 3:
            entered.set()
            go.wait(5)
        return real(number, index, tokens, text, completion)

    monkeypatch.setattr(replies, "TokenEvent", slow)
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        generator = Generator(model, cache)
        stream = generator.stream([[5, 6, 7]], max_new_tokens=2)
        next(stream)
        other = threading.Thread(target=lambda: generator.generate([[9, 8]], max_new_tokens=3))
        other.start()
        assert entered.wait(5)
        rest: list[Any] = []
        reader = threading.Thread(target=lambda: rest.extend(stream))
        reader.start()
        reader.join(0.5)
        go.set()
        reader.join(5)
        other.join(5)
        assert [event.completion is not None for event in rest] == [True]


def test_a_tokenizer_that_fails_ends_its_request_alone(model):
    first = alone(model, PROMPTS[0], 12)
    others = [p for p in PROMPTS[1:] if first[5] not in alone(model, p, 12)]

    class Tokenizer:
        def decode(self, ids, skip_special_tokens=True):
            if first[5] in ids:
                raise ValueError("no such token")
            return "x" * len(ids)

    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        generator = Generator(model, cache, tokenizer=Tokenizer())
        asked = [generator.submit(p, max_new_tokens=12) for p in [PROMPTS[0], *others]]
        done = [submission.result(5)[0] for submission in asked]
        assert [c.finish_reason for c in done] == ["error"] + ["length"] * len(others)


def test_forks_are_penalised_for_their_own_first_token(model):
    seed = (2**64 - REPLY_SEED + 12345) % 2**64
    options: dict[str, Any] = {"temperature": 1.5, "repetition_penalty": 3.0, "max_new_tokens": 30}
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        _, fork = generator.generate(PROMPTS[:1], n=2, seed=seed, **options)
        (same,) = generator.generate(PROMPTS[:1], seed=(seed + REPLY_SEED) % 2**64, **options)
        assert fork.tokens == same.tokens


@pytest.mark.parametrize("new", [5, 60])
def test_what_left_a_window_is_given_back_before_a_request_fails(new):
    model = windowed()
    prompt = [random.Random(3).randrange(2, 128) for _ in range(200)]
    with (
        PagedKVCache.for_model(model, "48KiB", page_size=16) as cache,  # 6 pages, 4 are needed
        Generator(model, cache, chunk=8, max_running=4) as generator,
    ):
        (done,) = generator.generate([prompt], max_new_tokens=new)
        assert done.error is None
        assert done.tokens == alone(model, prompt, new)


@pytest.mark.parametrize(
    "bad",
    [{"logprobs": 200}, {"logprobs": 200, "n": 2}],
    ids=["logprobs", "logprobs and n"],
)
def test_options_beyond_the_model_end_their_request_alone(model, bad):
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        generator = Generator(model, cache)
        params = [SamplingParams(max_new_tokens=4), SamplingParams(max_new_tokens=4, **bad)]
        done = within(10, lambda: generator.generate([[5, 6, 7], [8, 9]], params))
        assert done is not None
        assert done[0].tokens == alone(model, [5, 6, 7], 4)


def test_a_prompt_beyond_the_models_positions_ends_alone():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4, eos_token_id=None
        )
    ).eval()
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        short, long = generator.generate([[5, 6, 7], [5] * 70], max_new_tokens=5)
        assert long.finish_reason == "error"
        assert short.error is None


def test_top_k_beyond_the_candidates_does_not_depend_on_the_batch():
    scores = (-torch.arange(8192.0) / 250)[torch.randperm(8192)][None]

    def drawn(top_k, most, uniform):
        rows = len(top_k)
        return draw(
            scores.repeat(rows, 1), temperature=torch.ones(rows),
            top_k=torch.tensor(top_k, dtype=torch.int32), top_p=torch.full((rows,), 0.9),
            min_p=torch.zeros(rows), uniform=torch.full((rows,), uniform), filters=True, most=most,
        )[0]  # fmt: skip

    for uniform in torch.linspace(0, 0.99, 50).tolist():
        assert drawn([2000], 2000, uniform) == drawn([2000, 0], 0, uniform)


def test_more_replies_than_the_pool_has_pages_for(model):
    with (
        PagedKVCache.for_model(model, "64KiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        done = generator.generate([[5] * 20], max_new_tokens=4, n=20, temperature=1.0)
        assert all(c.error is None for c in done), done[0].error


@pytest.mark.parametrize("door", ["generate", "submit"])
def test_a_model_that_can_not_be_looked_at_ends_the_request_that_came(model, monkeypatch, door):
    def broken(batch):
        raise RuntimeError("no look at the model")

    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        monkeypatch.setattr(generator._packed, "refresh", broken)
        if door == "generate":
            done = within(10, lambda: generator.generate([[5, 6, 7]], max_new_tokens=3, n=2))
        else:
            done = generator.submit([5, 6, 7], max_new_tokens=3, n=2).result(10)
        assert done is not None
        assert [str(c.error) for c in done] == ["no look at the model"] * 2
        monkeypatch.undo()
        (good,) = generator.generate([[5, 6, 7]], max_new_tokens=3)
        assert good.tokens == alone(model, [5, 6, 7], 3)
