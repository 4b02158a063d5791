"""The generator over compressed pages: whatever a request rides with, its tokens are what a session
by itself gives.
"""

import functools
from typing import Any

import pytest
import torch

from kvpaged import Generator, HostTier, OutOfPagesError, SamplingParams
from tests.generate.asked import mixed
from tests.hf.compressed import FORMATS, MODELS, Reply, always_loads, cold, make

COUNT, NEW = 8, 14

EACH = [
    (name, kind, ("layer-major", "page-major")[(i + j) % 2])
    for i, name in enumerate(FORMATS)
    for j, kind in enumerate(MODELS)
]
every_format = pytest.mark.parametrize(("name", "kind", "layout"), EACH)


@functools.cache
def model_of(kind: str) -> Any:
    return MODELS[kind]()


@functools.cache
def work(name: str, kind: str) -> tuple[list[list[int]], list[Reply]]:
    """Prompts, some of which begin as others do, and the reply to each, cold."""
    prompts, _ = mixed(COUNT, seed=2)
    model = model_of(kind)
    return prompts, [cold(model, name, torch.tensor([p]), NEW, sure=0) for p in prompts]


def check(done: Any, replies: list[Reply]) -> None:
    for completion, reply in zip(done, replies, strict=True):
        assert completion.error is None
        reply.check(completion.tokens)


@every_format
def test_together_and_found(name, kind, layout):
    prompts, replies = work(name, kind)
    assert sum(reply.certain for reply in replies) > COUNT * NEW * 3 // 4
    model = model_of(kind)
    with (
        make(model, name, layout=layout) as cache,
        Generator(model, cache, chunk=23, max_running=5) as generator,
    ):
        for _ in range(2):
            check(generator.generate(prompts, max_new_tokens=NEW), replies)
        cache.check_integrity()
        assert cache.stats().used == 0
        assert cache.stats().reuse.reused > sum(map(len, prompts)) // 2


@pytest.mark.parametrize(
    ("name", "kind", "layout"),
    # A pool as small as that has four frames for the four classes of this one.
    [each for each in EACH if each[:2] != ("by layer", "hybrid")],
)
def test_in_little_memory_rows_are_set_back_and_come_back(name, kind, layout):
    prompts, replies = work(name, kind)
    model = model_of(kind)
    memory = "128KiB" if kind == "llama" else "192KiB"
    with (
        make(model, name, layout=layout, memory=memory) as cache,
        Generator(model, cache, chunk=9, max_running=8) as generator,
    ):
        check(generator.generate(prompts * 2, max_new_tokens=NEW), replies * 2)
        cache.check_integrity()
        assert cache.stats().used == 0
        assert cache.stats().pages_evicted > 0
        assert generator.stats().preemptions > 0


@every_format
def test_guesses_and_forks(name, kind, layout):
    """Drafts, right or wrong, change nothing; several replies to a prompt are forks of its row."""
    prompts, replies = work(name, kind)
    model = model_of(kind)
    params = [
        SamplingParams(max_new_tokens=NEW, prompt_lookup=(0, 3, 6)[i % 3], n=1 + i % 2)
        for i in range(COUNT)
    ]
    with make(model, name, layout=layout) as cache, Generator(model, cache) as generator:
        for _ in range(2):
            done = generator.generate(prompts, params)
            check(done, [r for i, r in enumerate(replies) for _ in range(1 + i % 2)])
        cache.check_integrity()
        assert cache.stats().used == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_over_a_tier(name, kind, monkeypatch):
    prompts, replies = work(name, kind)
    model = model_of(kind)
    tiers = [HostTier("8MiB", policy="write-through", pin=False)]
    with make(model, name, tiers=tiers) as cache:
        always_loads(cache, monkeypatch)
        with Generator(model, cache, chunk=23, max_running=5) as generator:
            check(generator.generate(prompts, max_new_tokens=NEW), replies)
            assert cache.flush(20)
            cache.clear()
            check(generator.generate(prompts, max_new_tokens=NEW), replies)
        cache.check_integrity()
        offload = cache.stats().offload
        assert offload is not None
        assert offload.tiers[0].promoted > 0


def test_a_row_that_can_not_go_on_is_ended():
    """Its exact pages lie in both frames of the pool, so that there is none for a compressed page:
    it went back to the beginning of its page and came there again, for ever.
    """
    prompts, replies = work("fp8", "llama")
    model = model_of("llama")
    with (
        make(model, "fp8", layout="layer-major", memory="84KiB") as cache,
        Generator(model, cache, chunk=9, max_running=8) as generator,
    ):
        for completion, reply in zip(
            generator.generate(prompts, max_new_tokens=NEW), replies, strict=True
        ):
            if completion.error is None:
                reply.check(completion.tokens)
            else:
                assert isinstance(completion.error, OutOfPagesError)
        cache.check_integrity()
        assert cache.stats().used == 0
