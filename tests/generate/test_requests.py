"""What single requests want, find in the cache, and fail by, beside others."""

from typing import Any

import pytest
import torch

from kvpaged import Generator, OutOfPagesError, PagedKVCache, SamplingParams
from kvpaged.errors import UsageError
from tests.generate.asked import alone, mixed, params_of
from tests.hf.tiny import tiny

pytestmark = pytest.mark.usefixtures("lookahead")


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


@pytest.mark.parametrize("new", [4, 9])
def test_a_stream_says_nothing_of_a_token_that_could_not_be_chosen(model, new):
    def broken(ids, scores):
        if ids.shape[1] == 2 + 3:
            raise ValueError("broken processor")
        return scores

    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        options = SamplingParams(max_new_tokens=new, logits_processors=(broken,))
        events = list(generator.stream([[5, 6]], options))
    last = events[-1].completion
    assert last is not None
    assert last.finish_reason == "error"
    assert [i for event in events for i in event.tokens] == last.tokens == alone(model, [5, 6], 3)


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


def test_what_the_pool_could_never_hold_is_refused_at_once(model):
    with (
        PagedKVCache.for_model(model, "64KiB", page_size=16) as cache,
        Generator(model, cache) as generator,
    ):
        pages = cache.stats().groups[0].pages
        stream = generator.stream([[5] * 10, [6] * (pages * 16)], max_new_tokens=8)
        first = next(stream)
        assert first.completion is not None
        assert first.request == 1
        with pytest.raises(OutOfPagesError, match=rf"{pages + 1} pages of 16 .* {pages} are there"):
            first.completion.raise_for_error()
        done = [event.completion for event in stream if event.completion is not None]
        assert [c.tokens for c in done] == [alone(model, [5] * 10, 8)]
