"""Steps by native code, and what a model compiled without guards notices."""

import functools
import logging

import pytest
import torch
from torch import nn

from kvpaged import Generator, PagedKVCache
from kvpaged.errors import UnsupportedModelError
from kvpaged.generate.sampler import greedy
from kvpaged.integrations.native import NativeAttention
from kvpaged_kernels.cpu import native_attend
from kvpaged_kernels.cpu.native import NativeError
from tests.generate.asked import (
    alone,
    assert_greedy,
    hybrid,
    mixed,
    params_of,
    windowed,
)
from tests.hf.tiny import tiny


@pytest.mark.parametrize(
    ("make", "works"), [(tiny, True), (tiny, False), (windowed, True), (hybrid, True)]
)
def test_tokens_by_native_attention(make, works, monkeypatch, caplog):
    model = make()
    if not works:

        def fail(*args):
            raise NativeError("no compiler")

        monkeypatch.setattr(native_attend, "_code", fail)
    prompts, news = mixed(10, new=60)
    wanted = [alone(model, p, n) for p, n in zip(prompts, news, strict=True)]
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, max_running=4, chunk=9) as generator,
    ):
        served = NativeAttention(cache)
        generator._packed.past._native = served
        with caplog.at_level(logging.WARNING, "kvpaged"):
            done = generator.generate(prompts, params_of(news))
        assert_greedy(model, done, prompts, wanted)
        assert len(served._layers) == (len(cache.layers) if works else 0)
        assert [r.getMessage() for r in caplog.records].count(
            "attention stays with stock torch: no compiler"
        ) == (not works)
        cache.check_integrity()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, of torch.jit
def test_a_compiled_model_that_changed_is_noticed():
    model = tiny()
    prompt = [5, 6, 7, 8, 9]
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, compile=True, pack_weights=True, max_running=2) as generator,
    ):
        first = generator.generate([prompt], max_new_tokens=8, ignore_eos=True)
        assert_greedy(model, first, [prompt], [alone(model, prompt, 8)])
        model.train()
        (failed,) = generator.generate([prompt], max_new_tokens=2)
        assert "training mode" in str(failed.error)
        model.eval()
        model.model.layers[0].mlp.act_fn = nn.ReLU()
        cache.refresh()
        changed = generator.generate([prompt], max_new_tokens=8, ignore_eos=True)
        assert_greedy(model, changed, [prompt], [alone(model, prompt, 8)])
        assert changed[0].tokens != first[0].tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_equal_scores(dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (40, 3000), generator=generator).to(dtype)
    scores[0] = -torch.inf
    scores[1, 2999] = 9
    expected = [row.index(max(row)) for row in scores.tolist()]
    assert greedy(scores).tolist() == expected


def one_row(packed, ids, positions, take):
    return packed._call(ids[None], positions[None], take)


def test_a_compiled_model_that_gives_other_scores_is_refused(model):
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=16) as cache,
        Generator(model, cache, max_running=2) as generator,
    ):
        packed = generator._packed
        packed._fast = functools.partial(one_row, packed)
        packed._check_compiled(generator._batch)
        packed._fast = lambda *given: one_row(packed, *given).flip(0)
        with pytest.raises(UnsupportedModelError, match="other scores when it is compiled"):
            packed._check_compiled(generator._batch)
        assert packed._fast is not None
        packed._fast = None
