"""The generation loop on a tiny model: whatever a request rides with, its tokens are its own."""

import pytest

from kvpaged import Generator, PagedKVCache, SamplingParams
from kvpaged.errors import UnsupportedModelError
from tests.generate.asked import alone, assert_greedy, hybrid, mixed, params_of
from tests.hf.tiny import tiny

pytestmark = pytest.mark.usefixtures("lookahead")


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
    model = hybrid()
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


def test_models_that_mix_tokens_elsewhere_are_refused():
    model = tiny()
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: inner(x + x.cumsum(1))
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        pytest.raises(UnsupportedModelError, match="packed before it"),
    ):
        Generator(model, cache)


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
        for length in (1, 2, 5, 40):  # each alone: a pass of one row, all of it new
            (one,) = generator.generate([prompts[0][:1] * length], max_new_tokens=3)
            assert one.tokens == alone(model, prompts[0][:1] * length, 3)
        cache.check_integrity()
