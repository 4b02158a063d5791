"""Weights side by side: the model's own still, one product in a compiled pass."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from transformers import LlamaConfig, LlamaForCausalLM

from kvpaged import Generator, PagedKVCache
from kvpaged.integrations import compiling, packed_model
from kvpaged.integrations.beside import LinearsBeside, Repeated

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def llama(*, bias=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=bias,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Block(nn.Module):
    """Layers as models name them."""

    def __init__(self, *, bias=True, dtypes=(torch.float32,) * 3):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(16, n, bias=bias, dtype=dtype)
            for n, dtype in zip((24, 8, 8), dtypes, strict=True)
        )

    def forward(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def products_of(model, x):
    """Results of a compiled model, and how many products its graph had."""
    counts = []

    class Count(CustomGraphPass):
        def __call__(self, graph):
            Repeated()(graph)
            graph.lint()
            counts.append(sum(node.target in PRODUCTS for node in graph.nodes))

        def uuid(self):
            return None

    torch._dynamo.reset()
    options: dict[str, Any] = {"post_grad_custom_pre_pass": Count()}
    run = torch.compile(model, dynamic=True, fullgraph=True, options=options)
    with torch.no_grad():
        return run(x), counts


@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_are_one_product(bias):
    block, x = Block(bias=bias), torch.randn(5, 16)
    expected = block(x)
    beside = LinearsBeside(block)
    assert len(beside) == 3
    assert all(torch.equal(a, b) for a, b in zip(block(x), expected, strict=True))
    got, counts = products_of(block, x)
    assert counts == [1]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    beside.release()
    assert "forward" not in vars(block.q_proj)
    _, counts = products_of(block, x)
    assert counts == [3]


def test_parameters_are_views_until_they_are_released():
    block = Block()
    before = copy.deepcopy(block.state_dict())
    beside = LinearsBeside(block)
    weights = [m.weight for m in (block.q_proj, block.k_proj, block.v_proj)]
    assert len({w.untyped_storage().data_ptr() for w in weights}) == 1
    assert sum(w.nbytes for w in weights) == weights[0].untyped_storage().nbytes()
    beside.release()
    assert all(w.untyped_storage().nbytes() == w.nbytes for w in weights)
    assert all(torch.equal(block.state_dict()[name], x) for name, x in before.items())


def test_what_is_written_in_place_is_in_the_product():
    block, x = Block(), torch.randn(5, 16)
    LinearsBeside(block)
    with torch.no_grad():
        block.k_proj.weight.mul_(3)
    (_, k, _), _ = products_of(block, x)
    torch.testing.assert_close(k, nn.functional.linear(x, block.k_proj.weight, block.k_proj.bias))


def test_another_weight_is_laid_beside_at_the_next_refresh():
    block, x = Block(), torch.randn(5, 16)
    beside = LinearsBeside(block)
    place = block.v_proj.weight.data_ptr()
    assert beside.refresh() == 0
    block.v_proj.weight = nn.Parameter(torch.randn(8, 16))
    block.k_proj.bias.data = torch.randn(8)
    expected = block(x)
    assert beside.refresh() == 2
    assert block.v_proj.weight.data_ptr() == place
    got, counts = products_of(block, x)
    assert counts == [1]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_that_became_another_kind_is_given_up_with_those_beside_it():
    block, x = Block(), torch.randn(5, 16)
    beside = LinearsBeside(block)
    block.k_proj.weight = nn.Parameter(torch.randn(4, 16))
    block.k_proj.bias = nn.Parameter(torch.randn(4))
    assert beside.refresh() == 3
    assert len(beside) == 0
    assert [out.shape[-1] for out in block(x)] == [24, 4, 8]
    assert all("forward" not in vars(m) for m in (block.q_proj, block.k_proj, block.v_proj))


@pytest.mark.parametrize("spoil", ["dtype", "tied", "view", "subclass", "forward"])
def test_what_cannot_be_side_by_side_stays_as_it_is(spoil):
    dtypes = (torch.float32, torch.bfloat16 if spoil == "dtype" else torch.float32, torch.float32)
    block = Block(dtypes=dtypes)
    if spoil == "tied":
        block.v_proj.weight = block.k_proj.weight
    elif spoil == "view":
        block.k_proj.weight.data = torch.randn(9, 16)[1:]
    elif spoil == "subclass":
        block.k_proj.__class__ = type("Other", (nn.Linear,), {})
    elif spoil == "forward":
        vars(block.k_proj)["forward"] = block.k_proj.forward
    before = [m.weight.data_ptr() for m in (block.q_proj, block.k_proj, block.v_proj)]
    assert len(LinearsBeside(block)) == 0
    assert before == [m.weight.data_ptr() for m in (block.q_proj, block.k_proj, block.v_proj)]


def test_only_equal_products_are_left_out():
    def function(x, y):
        return x @ y, x @ y, x @ (y + 1), y.t() @ y.t(), torch.rand(2), torch.rand(2)

    graph = torch.fx.experimental.proxy_tensor.make_fx(function)(
        torch.randn(4, 4), torch.randn(4, 4)
    )
    Repeated()(graph.graph)
    graph.graph.lint()
    assert sum(node.target in PRODUCTS for node in graph.graph.nodes) == 3
    assert sum(node.target is torch.ops.aten.rand.default for node in graph.graph.nodes) == 2


@pytest.mark.parametrize("bias", [True, False])
def test_the_generator_has_the_tokens_of_the_model(monkeypatch, bias):
    model = llama(bias=bias)
    prompts = [[5, 17, 3, 9], [40, 2, 77]]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, pad_token_id=0)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    monkeypatch.setattr(packed_model, "_pack", lambda model, **_: LinearsBeside(model))
    graphs = []
    passes = compiling._Passes.__call__

    def count(self, graph):
        passes(self, graph)
        graphs.append(sum(node.target in PRODUCTS for node in graph.nodes))

    monkeypatch.setattr(compiling._Passes, "__call__", count)
    monkeypatch.setattr(compiling._Passes, "uuid", lambda self: None)
    with (
        PagedKVCache.for_model(model, memory="4MiB", page_size=16) as cache,
        Generator(model, cache, compile=True, pack_weights=True, max_running=2) as generator,
    ):
        done = generator.generate(prompts, max_new_tokens=8)
        assert [c.tokens for c in done] == expected
        assert graphs[-1] == 2 * 4 + 1  # of two layers, and of the vocabulary
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.data = (
                model.model.layers[0].self_attn.v_proj.weight * 2
            )
        changed = model.generate(
            torch.tensor([prompts[0]]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        done = generator.generate(prompts[:1], max_new_tokens=8)
        assert done[0].tokens == changed[0, 4:].tolist()
    assert all("forward" not in vars(module) for module in model.modules())


def test_layers_that_exchanged_their_memory_keep_what_they_have():
    block, x = Block(), torch.randn(5, 16)
    beside = LinearsBeside(block)
    k, v = block.k_proj, block.v_proj
    k.weight.data, v.weight.data = v.weight.data, k.weight.data
    expected = block(x)
    assert beside.refresh() == 2
    got, _ = products_of(block, x)
    for a, b, now in zip(got, expected, block(x), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(now, b)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = nn.ModuleList([Block(), Block()])
    before = copy.deepcopy(model.state_dict())
    cat, calls = torch.cat, []

    def fail_later(*given, **more):
        calls.append(given)
        if len(calls) == 3:
            raise MemoryError("no room")
        return cat(*given, **more)

    monkeypatch.setattr(torch, "cat", fail_later)
    with pytest.raises(MemoryError, match="no room"):
        LinearsBeside(model)
    assert all("forward" not in vars(module) for module in model.modules())
    for name, x in model.named_parameters():
        assert torch.equal(x, before[name])
        assert x.untyped_storage().nbytes() == x.nbytes
