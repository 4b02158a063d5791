"""Decode steps as captured graphs: all that stands around a capture, on a device without one."""

import pytest
import torch

from kvpaged import Generator, PagedKVCache
from kvpaged.errors import UsageError
from kvpaged.integrations import transformers as integration
from kvpaged.integrations.graphs import buckets, can_capture, record
from tests.generate.asked import alone, assert_greedy, hybrid, mixed, params_of
from tests.hf.tiny import tiny

pytestmark = pytest.mark.usefixtures("lookahead")


@pytest.fixture
def recorded(monkeypatch):
    """How often each size was launched again."""
    replays = []

    def capture(run):
        replay, logits = record(run)

        def counted():
            replays.append(len(logits))
            replay()

        return counted, logits

    monkeypatch.setattr(integration, "can_capture", lambda cache: True)
    monkeypatch.setattr(integration, "CudaCapture", lambda: capture)
    return replays


def test_sizes_suffice_and_are_few():
    for rows in range(1, 600):
        sizes = buckets(rows)
        assert sizes[-1] >= rows
        assert len(sizes) == 1 or sizes[-2] < rows
        assert sizes == sorted(set(sizes))
    assert buckets(7) == [1, 2, 4, 8]
    assert buckets(100)[-3:] == [64, 96, 128][-3:]
    assert len(buckets(256)) == 17


@pytest.mark.parametrize("made", [tiny, hybrid])
@pytest.mark.parametrize("layout", ["layer-major", "page-major"])
def test_tokens_are_those_of_generate_alone(recorded, made, layout):
    model = made()
    prompts, news = mixed(14, longest=60)
    wanted = [alone(model, p, n) for p, n in zip(prompts, news, strict=True)]
    with (
        PagedKVCache.for_model(
            model, "2MiB", page_size=16, backend="reference", layout=layout
        ) as cache,
        Generator(model, cache, chunk=24, max_running=5) as generator,
    ):
        done = generator.generate(prompts, params_of(news))
        assert_greedy(model, done, prompts, wanted)
        cache.check_integrity()
    assert set(recorded) >= {1, 2, 4, 8}


def test_on_the_triton_kernels(recorded, model):
    prompts = [[5, 6, 7], [9] * 20, [11, 12]]
    wanted = [alone(model, prompt, 6) for prompt in prompts]
    with (
        PagedKVCache.for_model(model, "1MiB", page_size=16, backend="triton") as cache,
        Generator(model, cache, max_running=3) as generator,
    ):
        done = generator.generate(prompts, max_new_tokens=6)
        assert_greedy(model, done, prompts, wanted)
        cache.check_integrity()
    assert recorded.count(4) >= 4  # three rows in the graph of four


def test_rows_outgrow_the_table_they_began_with(recorded, model):
    wanted = alone(model, [5, 6, 7], 200)
    with (
        PagedKVCache.for_model(model, "1MiB", page_size=16, backend="reference") as cache,
        Generator(model, cache, max_running=2) as generator,
    ):
        (done,) = generator.generate([[5, 6, 7]], max_new_tokens=200)
        assert_greedy(model, [done], [[5, 6, 7]], [wanted])
    assert recorded.count(1) >= 199


def test_replaced_weights_and_new_hooks_are_captured_anew(recorded):
    model = tiny()
    with (
        PagedKVCache.for_model(model, "1MiB", page_size=16, backend="reference") as cache,
        Generator(model, cache, max_running=2) as generator,
    ):
        graphs = generator._packed.graphs
        assert graphs is not None
        before = graphs._captured
        captured = dict(before)
        generator.generate([[5, 6, 7]], max_new_tokens=3)
        assert graphs._captured == captured
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0))
        (done,) = generator.generate([[5, 6, 7]], max_new_tokens=3)
        assert graphs._captured != captured
        assert done.tokens == alone(model, [5, 6, 7], 3)
        captured = dict(graphs._captured)
        model.model.layers[0].register_forward_hook(lambda *_: None)
        generator.generate([[5, 6, 7]], max_new_tokens=3)
        assert graphs._captured != captured


def test_graphs_where_there_can_be_none(model):
    with PagedKVCache.for_model(model, "1MiB", page_size=16) as cache:
        assert not can_capture(cache)
        with pytest.raises(UsageError, match=r"one CUDA device .* is on cpu served by cpu"):
            Generator(model, cache, graphs=True)


def test_rows_a_graph_has_too_many_are_empty(recorded, model):
    with (
        PagedKVCache.for_model(model, "1MiB", page_size=16, backend="reference") as cache,
        Generator(model, cache, max_running=4) as generator,
    ):
        graphs = generator._packed.graphs
        assert graphs is not None
        lengths = graphs._groups[0].lengths
        news = [3, 9, 9, 9]
        prompts = [[5], [6] * 20, [7] * 3, [8] * 9]
        done = generator.generate(prompts, params_of(news))
        assert_greedy(
            model, done, prompts, [alone(model, *x) for x in zip(prompts, news, strict=True)]
        )
        # Four rows, then three: the fourth of the graph of four has nothing to write.
        assert recorded.count(4) >= 7
        assert lengths.tolist().count(0) == 1
