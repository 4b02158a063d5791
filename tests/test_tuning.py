"""`tune`: what queries of a model are like, and formats that know it."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvpaged import DiskTier, KVFormat, PagedKVCache, tune
from kvpaged.errors import ConfigError, UsageError
from kvpaged.geometry import LayerGroup, PageGeometry
from kvpaged.integrations.queries import observe_queries
from kvpaged.pages.mixed import MixedClass
from tests.hf.compressed import always_loads, hybrid
from tests.hf.tiny import ids, tiny

PAGE = 16
TEXT = [ids(1, 400, seed=5)[0].tolist()]


def alike() -> Any:
    """A tiny model whose queries have much in common, in all heads that share keys, and turn
    slowly.
    """
    slow = {"rope_type": "default", "rope_theta": 1e7}
    model = tiny(attention_bias=True, initializer_range=0.1, head_dim=64, rope_parameters=slow)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            same = 3 * torch.randn(2, 1, 64).expand(2, 2, 64)
            layer.self_attn.q_proj.bias.copy_(same.flatten())
    return model


def seen(model: Any, rows: Tensor) -> dict[int, Tensor]:
    """The second moments of queries, as another attention function sees them."""
    moments: dict[int, Tensor] = {}

    def look(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        heads = k.shape[1]
        each = q.double().view(len(q), heads, -1, *q.shape[2:])
        moment = torch.einsum("nhgtd,nhgte->hde", each, each)
        moments[module.layer_idx] = moments.get(module.layer_idx, torch.zeros(())) + moment
        return sdpa_attention_forward(module, q, k, *args, **kwargs)

    AttentionInterface.register("looking", look)
    AttentionMaskInterface.register("looking", sdpa_mask)
    model.set_attn_implementation("looking")
    with torch.inference_mode():
        model(rows)
    return moments


@pytest.mark.parametrize("make", [tiny, alike, hybrid])
def test_what_is_observed_is_of_the_second_moment(make):
    rows = ids(2, 100, seed=1)
    found = observe_queries(make(), rows)
    for layer, moment in seen(make(), rows).items():
        assert found[layer].shape == (len(moment), 2, moment.shape[1])
        for head, (u, w) in enumerate(found[layer].double()):
            unit = moment[head].diagonal().sqrt()
            share = torch.linalg.eigh(moment[head] / unit[:, None] / unit)
            u_there = share.eigenvectors[:, -1] * share.eigenvalues[-1].sqrt() * unit
            w_there = unit.square() - u_there.square()
            mean = w_there.mean()
            torch.testing.assert_close(w, w_there / mean, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(u.abs(), u_there.abs() / mean.sqrt(), rtol=1e-3, atol=1e-3)
            assert w.mean().item() == pytest.approx(1, abs=1e-4)
            assert u[u.abs().argmax()] > 0


def test_the_model_is_left_as_it_was_and_found_the_same_again():
    model = alike()
    before = model.config._attn_implementation
    rows = ids(1, 50)
    with torch.inference_mode():
        exact = model(rows).logits
        first = tune(model, TEXT, length=128)
        assert torch.equal(model(rows).logits, exact)
    assert model.config._attn_implementation == before
    assert tune(model, TEXT, length=128) == first
    assert set(first.queries) == {0, 1}


def test_what_an_open_cache_holds_stays():
    model = alike()
    prompt = ids(1, 70)
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE) as cache:
        with cache.session(prompt) as past, torch.inference_mode():
            model(prompt, past_key_values=past)
        tune(model, TEXT, length=128)
        with cache.session(prompt) as past:
            assert past.reused == 64
        cache.check_integrity()


def error_of(model: Any, kv_format: KVFormat, rows: Tensor, exact: Tensor) -> float:
    """The mean divergence of predictions over keys coded so."""
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=PAGE, kv_format=kv_format) as cache,
        cache.session(rows) as past,
        torch.inference_mode(),
    ):
        found = model(rows, past_key_values=past).logits
    p, q = exact.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_keys_tuned_do_less_harm_and_are_as_large():
    model, rows = alike(), ids(4, 300, seed=9)
    with torch.inference_mode():
        exact = model(rows).logits
    plain = KVFormat(name="keys", k="int4")
    tuned = tune(model, TEXT, kv_format=plain, length=256, windows=1)
    assert error_of(model, tuned, rows, exact) < 0.6 * error_of(model, plain, rows, exact)
    group = group_of(2, 64)
    sealed, others = tuned.sealed(group), plain.sealed(group)
    assert sealed is not None
    assert others is not None
    assert sealed.layouts == others.layouts
    assert sealed.queries == tuple(tuned.queries[layer] for layer in (0, 1))


def group_of(kv_heads: int, width: int) -> LayerGroup:
    geometry = PageGeometry(
        layers=2, kv_heads=kv_heads, head_dim=width, page_size=PAGE, dtype=torch.float32
    )
    return LayerGroup(geometry=geometry, layers=(0, 1))


def test_json_keeps_it_and_pages_of_others_are_not_taken_for_its():
    given = KVFormat.of("int4", {torch.float32})
    tuned = given.with_queries({0: torch.randn(2, 2, 16).abs(), 1: torch.randn(2, 2, 16).abs()})
    assert KVFormat.from_json(tuned.to_json()) == tuned
    document = json.loads(given.to_json())
    del document["queries"]  # as it was written before there were any
    assert KVFormat.from_json(json.dumps(document)) == given
    other = tuned.with_queries({0: torch.randn(2, 2, 16).abs()})
    assert len({one.key() for one in (given, tuned, other)}) == 3
    assert tuned.id == given.id
    assert len({given, tuned, other, KVFormat.from_json(tuned.to_json())}) == 3


def test_a_disk_keeps_both_apart_and_finds_each_again(tmp_path, monkeypatch):
    """Their records are alike but for the keys."""
    model, prompt = alike(), ids(1, 100)
    plain = KVFormat.of("int4", {torch.float32})
    tuned = tune(model, TEXT, kv_format=plain, length=128)
    found = []
    for kv_format in (plain, tuned, tuned, plain):
        tiers = [DiskTier(tmp_path, "64MiB")]
        with PagedKVCache.for_model(
            model, "4MiB", page_size=PAGE, kv_format=kv_format, tiers=tiers
        ) as cache:
            always_loads(cache, monkeypatch)
            with cache.session(prompt) as past, torch.inference_mode():
                found.append(past.reused)
                model(prompt, past_key_values=past)
            assert cache.flush(20)
    assert found == [0, 0, 96, 96]


def test_only_layers_with_keys_of_4_bits_take_it():
    means = {0: torch.randn(2, 2, 16).abs(), 1: torch.randn(2, 2, 16).abs()}
    layers = {1: ("int4g64", "fp8")}
    kv_format = KVFormat(k="int8", v="int8", layers=layers).with_queries(means)
    sealed = kv_format.sealed(group_of(2, 16))
    assert sealed is not None
    assert sealed.queries == (b"", kv_format.queries[1])
    with PagedKVCache(
        group_of(2, 16).geometry, "1MiB", kv_format=kv_format, namespace=b"x"
    ) as cache:
        pages = cache.classes[0]
        assert isinstance(pages, MixedClass)
        assert pages.sealed.queries(slice(0, 1)) is None
        found = pages.sealed.queries(slice(1, 2))
        assert found is not None
        assert torch.equal(found[0], means[1].half().float())


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            torch.zeros(2, 2, 8),
            "of layer 1 are like is 32 numbers, two for each channel",
        ),
        (torch.full((2, 2, 16), torch.nan), "queries of layer 1 are not finite"),
        (torch.full((2, 2, 16), torch.inf), "queries of layer 1 are not finite"),
        (torch.full((2, 2, 16), -1.0), "w is below 0"),
        (torch.zeros(64), r"queries of layer 1 are \[kv_heads, 2, k_width\], got \(64,\)"),
        (torch.zeros(2, 16, 2), r"got \(2, 16, 2\)"),
    ],
)
def test_queries_that_do_not_fit(like, message):
    with pytest.raises(ConfigError, match=message):
        KVFormat.of("int4", {torch.float32}).with_queries({1: like}).sealed(group_of(2, 16))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"queries": {0: "abcd"}}, "queries bytes, by layer number"),
        ({"queries": {0: b"abc"}}, "not finite numbers of fp16"),
        ({"layers": {"first": ("fp8", "fp8")}}, "pairs of codes"),
        ({"layers": {0: "fp8"}}, "pairs of codes"),
        ({"keep": 1.5}, "0 or more pages exact, got 1.5"),
        ({"keep": True}, "0 or more pages exact, got True"),
        ({"name": 5}, "a format's name is a string, got 5"),
    ],
)
def test_formats_of_wrong_types(wrong, message):
    with pytest.raises(ConfigError, match=message):
        KVFormat(**({"k": "int4", "v": "int4"} | wrong))


def test_formats_are_values():
    """Equal ones have one key and one hash, and nothing changes them."""
    layers: Any = {np.int64(0): ["int8", "int8"]}
    one, same = KVFormat(layers=layers), KVFormat(layers={0: ("int8", "int8")})
    assert one == same
    assert (hash(one), one.key()) == (hash(same), same.key())
    layers[1] = ("int4", "int4")
    assert one == same
    assert KVFormat.from_json(one.to_json()).key() == one.key()


def test_queries_that_nothing_is_coded_for_change_no_key():
    known = {0: torch.randn(2, 2, 16).abs()}
    for kv_format in (KVFormat(k="int8", v="int4"), KVFormat(layers={1: ("int4", "int4")})):
        assert kv_format.with_queries(known).key() == kv_format.key()


def test_a_format_of_another_model_is_refused():
    for wrong in (
        KVFormat(k="int4", v="int4", layers={7: ("int8", "int8")}),
        KVFormat(k="int4", v="int4").with_queries({7: torch.ones(2, 2, 16)}),
    ):
        with pytest.raises(ConfigError, match=r"is for layers \[7\], which the model has not"):
            PagedKVCache.for_model(tiny(), "1MiB", page_size=PAGE, kv_format=wrong)
        with pytest.raises(ConfigError, match=r"is for layers \[7\]"):
            tune(tiny(), TEXT, kv_format=wrong, length=64)


def test_queries_that_are_no_numbers_are_named():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="queries of layer 1 are not finite numbers"):
        tune(model, TEXT, length=64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kv_format": "fp8"}, ConfigError, "without keys of 4 bits is not tuned"),
        ({"kv_format": "auto"}, ConfigError, "without keys of 4 bits is not tuned"),
        ({"kv_format": "int3"}, ConfigError, "int3"),
        ({"windows": 0}, ConfigError, "got 0 and"),
        ({"length": 63}, ConfigError, "got 2 and 63"),
        ({"windows": 1.5}, ConfigError, "got 1.5 and"),
        ({"texts": [1, 2, 3]}, UsageError, "got list of int"),
        ({"texts": "a text"}, UsageError, "got str of str"),
        ({"length": 1024}, UsageError, "2 windows of 1024 tokens need 2050 tokens"),
    ],
)
def test_what_can_not_be_tuned(options, error, message):
    with pytest.raises(error, match=message):
        tune(tiny(), **({"texts": TEXT} | options))


def test_strings_need_a_tokenizer():
    with pytest.raises(UsageError, match="need a tokenizer"):
        tune(tiny(), ["a text"])
