"""`calibrate` finds what a budget needs: on random models, where it is known what needs bits."""

import itertools
import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import kvpaged
from kvpaged import PagedKVCache, calibrate
from kvpaged.calibration import LEAST, LEAST_OF_8
from kvpaged.errors import ConfigError, UsageError
from kvpaged.formats.choice import Option, choose, frontier
from kvpaged.formats.kv import KVFormat, slice_layout
from kvpaged.geometry import PageGeometry
from kvpaged_kernels.reference.seal import code, unseal
from tests.hf.tiny import ids, tiny

PAGE, LENGTH = 32, 160
OUTLIERS, MOST = 2, 60.0  # the layer of channels that large


def model_of(**changes):
    return tiny(num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, **changes)


def enlarge(model, layer: int, kind: str, factor: float) -> None:
    """Make two channels of a layer's K, or V, of every head larger; the model computes the same.

    Channels of K that rotate together, and those of Q smaller, so scores stay; of V, and what the
    output takes of them less.
    """
    attention = model.model.layers[layer].self_attn
    width = attention.head_dim
    with torch.no_grad():
        for head, channel in itertools.product(range(2), (3, 3 + width // 2)):
            row = head * width + channel
            if kind == "k":
                attention.k_proj.weight[row] *= factor
                attention.q_proj.weight[row] /= factor
            else:
                attention.v_proj.weight[row] *= factor
                attention.o_proj.weight[:, row] /= factor


def calibrated(model, **options):
    given: dict[str, Any] = {
        "budget": 0.01, "formats": ("int8", "int4"), "page_size": PAGE, "length": LENGTH,
        "windows": 1, "held_out": 2, "memory": "32MiB", "backend": "reference",
    } | options  # fmt: skip
    return calibrate(model, ids(4, 400, seed=3).tolist(), **given)


@pytest.fixture(scope="module")
def plain():
    return calibrated(model_of(), budget=0.05)


@pytest.fixture(scope="module")
def enlarged():
    model = model_of()
    enlarge(model, OUTLIERS, "v", MOST)
    return calibrated(model, budget=0.05)


def test_the_chosen_format_holds_the_budget_with_fewer_bits_than_what_holds_it_uniformly(plain):
    limit = torch.tensor(plain.budget).log1p().item()
    assert 0 < plain.measured.kl <= limit
    assert plain.uniform["int4"].kl > limit > plain.uniform["int8"].kl
    assert plain.uniform["int4"].bits < plain.bits < plain.uniform["int8"].bits
    assert len({plain.format.codes(layer) for layer in range(4)}) > 1


def test_outliers_of_v_cost_bits_where_they_are_and_nowhere_else(plain, enlarged):
    assert enlarged.harm[OUTLIERS, "v"]["int4"] > 10 * plain.harm[OUTLIERS, "v"]["int4"]
    assert plain.format.codes(OUTLIERS)[1] == "int4"
    assert enlarged.format.codes(OUTLIERS)[1] == "int8"
    assert (OUTLIERS, "v") in enlarged.causes
    for of in set(plain.harm) - {(OUTLIERS, "v")}:
        assert enlarged.harm[of]["int4"] == pytest.approx(plain.harm[of]["int4"], rel=0.05)


def test_outliers_of_k_cost_nothing_for_a_channel_has_its_own_scale(plain):
    model = model_of()
    enlarge(model, OUTLIERS, "k", 64.0)  # a power of two: codes and all are the same
    found = calibrated(model, budget=0.05)
    assert found.harm[OUTLIERS, "k"]["int4"] == pytest.approx(
        plain.harm[OUTLIERS, "k"]["int4"], rel=0.05
    )


def test_it_says_that_a_model_collapses_and_why():
    model = model_of()
    with torch.no_grad():  # scores so large that a step of 4 bits turns them over
        model.model.layers[0].self_attn.q_proj.weight *= 8
    found = calibrated(model, budget=0.05)
    assert found.collapses == ("int4",)
    assert found.causes[0] == (0, "k")
    assert found.format.codes(0)[0] != "int4"
    said = found.report()
    assert "collapses with int4 in all layers" in said
    assert "K of layer 0" in said


def test_a_model_that_bears_it_gets_the_fewest_bits_and_is_not_said_to_collapse():
    found = calibrated(model_of(initializer_range=0.05))
    assert found.collapses == ()
    assert "collapses" not in found.report()
    assert {found.format.codes(layer) for layer in range(4)} == {("int4", "int4")}
    assert found.bits == found.uniform["int4"].bits


def test_keys_of_4_bits_are_coded_for_the_queries_that_were_observed(plain):
    """Of the layers that have some, and with them in what is measured."""
    of_4 = {layer for layer in range(4) if plain.format.codes(layer)[0] == "int4"}
    assert 0 < len(of_4) < 4
    assert set(plain.format.queries) == of_4
    untuned = replace(plain.format, queries={})
    rows = ids(4, 160, seed=3)
    exact, tuned, others = (
        predicted(model_of(), kv_format, rows) for kv_format in (KVFormat(), plain.format, untuned)
    )
    assert not torch.equal(tuned, others)
    assert not torch.equal(tuned, exact)


def predicted(model, kv_format, rows):
    with (
        PagedKVCache.for_model(
            model, "32MiB", page_size=PAGE, kv_format=kv_format, backend="reference"
        ) as cache,
        cache.session(rows) as past,
        torch.inference_mode(),
    ):
        return model(rows, past_key_values=past).logits


def test_groups_of_4_bits_are_chosen_from_where_nothing_is_said():
    found = calibrated(
        model_of(), budget=0.05, formats=("int8", "int4g16", "int4", "int4g64"), page_size=64,
        length=320,
    )  # fmt: skip
    assert found.coarsest == "int4g64"
    chosen = {code for layer in range(4) for code in found.format.codes(layer)}
    assert chosen & {"int4g64", "int4g16"}
    assert found.measured.kl <= torch.tensor(found.budget).log1p().item()
    assert set(found.format.queries) == {
        layer for layer in range(4) if found.format.codes(layer)[0].startswith("int4")
    }


@pytest.mark.parametrize("of", ["k", "v"])
def test_no_code_is_better_than_it_is_taken_to_be(of):
    """The least harm a code could do, beside squared errors of random numbers."""
    torch.manual_seed(0)
    x = torch.randn(8, 2, 64, 64)
    x = torch.cat((x, torch.randn(8, 2, 64, 1) * x, 2 * torch.rand(8, 2, 64, 64) - 1))
    geometry = PageGeometry(layers=1, kv_heads=2, head_dim=64, page_size=64, dtype=torch.float32)
    errors = {}
    for one in ("fp8", "int8", "int4g16", "int4", "int4g64"):
        layout = slice_layout(geometry, one, one)
        found = unseal(code(x, x, layout), layout)["kv".index(of)]
        errors[one] = float((found - x).square().mean())
    for coarse in LEAST:
        for one, error in errors.items():
            least = LEAST_OF_8 if one not in LEAST else LEAST[one] / LEAST[coarse]
            if LEAST.get(one, 0) < LEAST[coarse]:
                assert error > least * errors[coarse], (one, coarse)


def test_its_format_is_saved_as_json_and_taken_by_a_cache(plain):
    again = KVFormat.from_json(json.dumps(json.loads(plain.format.to_json())))
    assert again == plain.format
    model, prompt = model_of(), ids(1, LENGTH)
    with (
        PagedKVCache.for_model(
            model, "32MiB", page_size=PAGE, kv_format=again, backend="reference"
        ) as cache,
        cache.session(prompt) as past,
        torch.inference_mode(),
    ):
        model(prompt, past_key_values=past)
        held = past.memory_bytes()
    exact = LENGTH * 4 * 2 * 2 * 32 * 4
    assert held < exact * 0.6


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"formats": ("int3",)}, ConfigError, "int3"),
        ({"formats": ()}, ConfigError, "formats are of"),
        ({"budget": 0}, ConfigError, "budget above 0"),
        ({"length": 2 * PAGE}, ConfigError, "at least 96 tokens"),
        ({"held_out": 20}, UsageError, "there are 1600"),
    ],
)
def test_what_is_impossible_is_an_error(options, error, said):
    with pytest.raises(error, match=said):
        calibrated(model_of(), **options)


def test_strings_need_a_tokenizer():
    with pytest.raises(UsageError, match="need a tokenizer"):
        calibrate(model_of(), ["a text"])


def test_the_public_name_stays_a_function():
    assert callable(kvpaged.calibrate)
    assert kvpaged.calibrate is calibrate


# -- the choice ------------------------------------------------------------------------------------


def random_layers(rng: random.Random, count: int) -> list[list[Option]]:
    def layer() -> list[Option]:
        fine = [Option(("exact", "exact"), 320, 0.0)]
        harms = sorted(rng.random() ** 3 for _ in range(4))
        sizes = sorted(rng.sample(range(80, 320, 5), 4), reverse=True)
        return fine + [Option((str(h), ""), s, h) for h, s in zip(harms, sizes, strict=True)]

    return [layer() for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_keeps_the_limit_and_is_near_the_best_there_is(seed):
    rng = random.Random(seed)
    layers = random_layers(rng, 5)
    most = 3 * rng.random()
    chosen = choose(layers, most)
    assert all(option in options for option, options in zip(chosen, layers, strict=True))
    assert sum(option.harm for option in chosen) <= most + 1e-12
    best = min(
        sum(option.size for option in way)
        for way in itertools.product(*layers)
        if sum(option.harm for option in way) <= most
    )
    assert sum(option.size for option in chosen) <= 1.15 * best


def test_where_nothing_keeps_the_limit_the_least_harmful_is_chosen():
    layers = [[Option(("int8", "int8"), 10, 0.2), Option(("int4", "int4"), 5, 0.9)]] * 2
    assert [option.size for option in choose(layers, 0.1)] == [10, 10]


def test_a_frontier_leaves_out_what_is_never_worth_it():
    worse, above = Option(("a", ""), 8, 0.5), Option(("b", ""), 6, 0.45)
    ends = [Option(("c", ""), 10, 0.0), Option(("d", ""), 5, 0.4), Option(("e", ""), 2, 2.0)]
    assert frontier([worse, above, *ends]) == ends
