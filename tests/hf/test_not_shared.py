"""What must not be found: each thing that KV bytes depend on is changed, and nothing stale hit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvpaged import PagedKVCache
from kvpaged.errors import UsageError
from tests.hf.tiny import assert_same_tokens, generate, ids, tiny

PAGE = 16
PROMPT = 60


@pytest.fixture
def own() -> Iterator[tuple[PagedKVCache, Any]]:
    """A cache and a model of this test's own: it is changed."""
    model = tiny()
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE) as cache:
        yield cache, model


def reused(cache: PagedKVCache, model: Any, prompt: Any = None, **options: Any) -> int:
    """Columns a session finds; its tokens are DynamicCache's, so what it found was right."""
    prompt = ids(1, PROMPT) if prompt is None else prompt
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8} | options
    short_again(model)
    with cache.session(prompt) as past:
        found = int(past.reused)
        ours = generate(model, past, prompt, **given)
        cache.check_integrity()
    short_again(model)
    theirs = generate(model, DynamicCache(config=model.config), prompt, **given)
    assert_same_tokens(model, ours, theirs, None)
    return found


def short_again(model: Any) -> None:
    """Bring dynamic NTK's angles back: transformers keeps those of the longest pass since the last
    short one.
    """
    with torch.no_grad():
        model(ids(1, 2))


def digests(cache: PagedKVCache, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors of each digest from now on."""
    from kvpaged.integrations import identity, inspection

    counted: list[int] = []
    original = inspection.digest_tensors

    def count(tensors: Any) -> Any:
        if len(tensors):
            counted.append(len(tensors))
        return original(tensors)

    monkeypatch.setattr(identity, "digest_tensors", count)
    return counted


# -- weights --------------------------------------------------------------------------------------


def test_an_optimizer_step(own):
    cache, model = own
    assert (reused(cache, model), reused(cache, model)) == (0, PROMPT - 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = model(ids(1, 20), labels=ids(1, 20)).loss
    loss.backward()
    optimizer.step()
    assert (reused(cache, model), reused(cache, model)) == (0, PROMPT - 1)


@pytest.mark.parametrize(
    "change",
    ["in place", "inference mode", "foreach", "fused", "another parameter", "load_state_dict",
     "assigned", "data replaced", "through data", "a buffer"],
)  # fmt: skip
def test_any_write_to_a_weight(own, change, monkeypatch):
    cache, model = own
    reused(cache, model)
    linear = model.model.layers[0].self_attn.k_proj
    weight = linear.weight
    counted = digests(cache, monkeypatch)
    if change == "another parameter":
        linear.weight = torch.nn.Parameter(weight.detach() * 2)
    elif change == "data replaced":
        weight.data = weight.detach() * 2
    elif change == "through data":
        weight.data.mul_(2)
    elif change == "a buffer":
        model.model.rotary_emb.inv_freq *= 0.5
    elif change in ("load_state_dict", "assigned"):
        name = "model.layers.0.self_attn.k_proj.weight"
        state = {**model.state_dict(), name: weight.detach() * 2}
        model.load_state_dict(state, assign=change == "assigned")
    elif change == "fused":
        weight.grad, before = torch.ones_like(weight), weight._version
        torch.optim.AdamW([weight], lr=0.01, fused=True).step()
        assert weight._version == before, "torch counts the writes of a fused optimizer now"
    elif change == "foreach":
        with torch.no_grad():
            torch._foreach_mul_([weight], 2.0)
    else:
        with torch.no_grad() if change == "in place" else torch.inference_mode():
            weight.mul_(2)
    assert (reused(cache, model), reused(cache, model)) == (0, PROMPT - 1)
    assert len(counted) == 1
    if change in ("in place", "inference mode", "foreach", "another parameter", "a buffer"):
        assert counted == [1], "only what was written to is digested again"


def test_a_write_to_a_few_elements_that_torch_does_not_count_needs_refresh(own):
    cache, model = own
    reused(cache, model)
    model.model.layers[0].self_attn.k_proj.weight.data[1, 3] += 5
    cache.refresh()
    assert (reused(cache, model), reused(cache, model)) == (0, PROMPT - 1)


def test_weights_that_come_back_find_their_pages(own):
    cache, model = own
    first = cache.namespace
    reused(cache, model)
    weight = model.model.layers[0].self_attn.k_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3)
        assert reused(cache, model) == 0
        assert cache.namespace != first
        weight.copy_(kept)
    assert reused(cache, model) == PROMPT - 1
    assert cache.namespace == first


def test_a_step_in_the_middle_of_a_session_publishes_nothing(own):
    cache, model = own
    prompt = ids(1, PROMPT)
    with cache.session(prompt) as past, torch.no_grad():
        model(prompt[:, :20], past_key_values=past)
        model.model.layers[0].self_attn.k_proj.weight.mul_(2)
        model(prompt[:, 20:], past_key_values=past)
        assert past.private == "the model or the namespace has changed since it began"
    assert reused(cache, model) == 0
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.div_(2)
    assert reused(cache, model) == PAGE, "what was computed before is what it was"


def test_a_step_between_a_hit_and_its_use_is_named(own):
    cache, model = own
    reused(cache, model)
    with cache.session(ids(1, PROMPT)) as past:
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(2)
        with pytest.raises(UsageError, match="changed since the session found 59 columns"):
            generate(model, past, ids(1, PROMPT), max_new_tokens=2)


def test_equal_models_have_one_namespace_and_others_another():
    def namespace(**changes: Any) -> bytes:
        options: dict[str, Any] = {"page_size": PAGE}
        options |= {k: changes.pop(k) for k in ("page_size", "namespace") if k in changes}
        dtype = changes.pop("dtype", torch.float32)
        model = tiny(**changes).to(dtype)
        with PagedKVCache.for_model(model, "4MiB", **options) as cache:
            return cache.namespace

    others: list[dict[str, Any]] = [
        {}, {"page_size": 32}, {"dtype": torch.bfloat16}, {"namespace": b"patched"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rms_norm_eps": 1e-3},
        {"num_hidden_layers": 3},
    ]  # fmt: skip
    found = [namespace(**changes) for changes in others]
    assert len(set(found)) == len(others)
    assert namespace() == found[0]
    assert all(len(name) == 32 for name in found)


# -- adapters -------------------------------------------------------------------------------------


# PEFT looks at gradient checkpointing in a way that transformers deprecates.
old_fashioned = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def adapted() -> Iterator[tuple[PagedKVCache, Any]]:
    """A model with two adapters that do something."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    model = get_peft_model(tiny(), config, adapter_name="one")
    model.add_adapter("two", config)
    model.set_adapter("one")
    model.eval()
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE) as cache:
        yield cache, model


def adapter_reused(cache: PagedKVCache, model: Any, **options: Any) -> int:
    prompt = ids(1, PROMPT)
    with cache.session(prompt) as past, torch.no_grad():
        found = int(past.reused)
        ours = model(prompt[:, found:], past_key_values=past, **options).logits[:, -1]
        cache.check_integrity()
    with torch.no_grad():
        theirs = model(prompt, **options).logits[:, -1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    return found


@old_fashioned
def test_set_adapter(adapted, monkeypatch):
    cache, model = adapted
    counted = digests(cache, monkeypatch)
    assert (adapter_reused(cache, model), adapter_reused(cache, model)) == (0, 48)
    model.set_adapter("two")
    assert (adapter_reused(cache, model), adapter_reused(cache, model)) == (0, 48)
    model.set_adapter("one")
    assert adapter_reused(cache, model) == 48
    with model.disable_adapter():
        assert (adapter_reused(cache, model), adapter_reused(cache, model)) == (0, 48)
    assert adapter_reused(cache, model) == 48
    base = len(list(model.get_base_model().parameters()))
    assert all(count < base // 2 for count in counted), "only adapters were digested again"


@old_fashioned
def test_scaling_merging_and_training_an_adapter(adapted):
    cache, model = adapted
    adapter_reused(cache, model)
    layer = model.get_base_model().model.layers[0].self_attn.k_proj
    layer.scaling["one"] *= 2
    assert (adapter_reused(cache, model), adapter_reused(cache, model)) == (0, 48)
    with torch.no_grad():
        layer.lora_B["one"].weight.mul_(2)
    assert (adapter_reused(cache, model), adapter_reused(cache, model)) == (0, 48)
    model.merge_adapter()
    assert (adapter_reused(cache, model), adapter_reused(cache, model)) == (0, 48)


@old_fashioned
def test_another_adapter_that_is_not_in_use_changes_nothing(adapted):
    from peft import LoraConfig

    cache, model = adapted
    adapter_reused(cache, model)
    model.add_adapter("three", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("one")
    model.eval()
    assert adapter_reused(cache, model) == 48


@old_fashioned
def test_adapters_switched_between_two_passes_of_a_session(adapted):
    cache, model = adapted
    prompt = ids(1, PROMPT)
    with cache.session(prompt) as past, torch.no_grad():
        model(prompt[:, :20], past_key_values=past)
        model.set_adapter("two")
        model(prompt[:, 20:30], past_key_values=past)
        model.set_adapter("one")
        model(prompt[:, 30:], past_key_values=past)
        assert past.private == "the model has changed since the session began"
    assert adapter_reused(cache, model) == PAGE


@old_fashioned
def test_adapters_of_single_rows(adapted):
    cache, model = adapted
    prompt = ids(1, PROMPT).repeat(2, 1)
    with cache.session(prompt) as past, torch.no_grad():
        model(prompt, past_key_values=past, adapter_names=["one", "two"])
        assert past.private is not None
    assert adapter_reused(cache, model) == 0


# -- rotary embeddings that follow the length ----------------------------------------------------


def rope(kind: str) -> Any:
    if kind == "dynamic":
        return tiny(
            max_position_embeddings=64,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        )
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
    return tiny(
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0,
            "original_max_position_embeddings": 64, **factors,
        },
    )  # fmt: skip


def test_longrope_has_pages_for_each_regime():
    model = rope("longrope")
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE) as cache:
        short, long = ids(1, 50), ids(1, 90)
        long[:, :50] = short
        assert (reused(cache, model, short), reused(cache, model, short)) == (0, 48)
        assert (reused(cache, model, long), reused(cache, model, long)) == (0, 89)
        assert reused(cache, model, short) == 48
        # 60 + 8 tokens: the angles change under a session; what is computed after that is its own.
        across = torch.cat((short, ids(1, 12, 4)), 1)
        assert reused(cache, model, across, max_new_tokens=40) == 48
        assert reused(cache, model, across) == 61
        further = torch.cat((across, ids(1, 20, 6)), 1)
        assert reused(cache, model, further) == 50


def test_dynamic_ntk_shares_up_to_the_length_it_was_trained_for():
    model = rope("dynamic")
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE) as cache:
        short, long = ids(1, 40), ids(1, 90)
        long[:, :40] = short
        assert (reused(cache, model, short), reused(cache, model, short)) == (0, 32)
        assert (reused(cache, model, long), reused(cache, model, long)) == (0, 0)
        with cache.session(long) as past:
            assert past.private is not None
        assert reused(cache, model, short) == 32
        across = torch.cat((short, ids(1, 20, 4)), 1)
        assert reused(cache, model, across, max_new_tokens=30) == 32
        assert reused(cache, model, across, max_new_tokens=2) == 48


# -- passes that others can't reproduce ----------------------------------------------------------


def test_inputs_embeds(own):
    cache, model = own
    prompt = ids(1, PROMPT)
    with cache.session(prompt) as past, torch.no_grad():
        model(prompt[:, :20], past_key_values=past)
        model(inputs_embeds=torch.randn(1, 20, 64), past_key_values=past)
        model(prompt[:, 40:], past_key_values=past)
        assert past.private == "a forward pass came without token ids, or out of place"
    assert reused(cache, model) == PAGE


def test_other_positions(own):
    cache, model = own
    prompt = ids(1, PROMPT)
    with cache.session(prompt) as past, torch.no_grad():
        model(prompt, past_key_values=past, position_ids=torch.arange(7, 67)[None])
    assert reused(cache, model) == 0


def test_a_mask_of_ones_own(own):
    cache, model = own
    prompt = ids(1, PROMPT)
    holes = torch.ones_like(prompt)
    holes[0, 10:20] = 0
    with cache.session(prompt) as past, torch.no_grad():
        with pytest.raises(UsageError, match="the mask hides 10 columns"):
            model(prompt, attention_mask=holes, past_key_values=past)
        model(prompt[:, :8], past_key_values=past)
    assert reused(cache, model) == 0


def test_anything_else_a_pass_is_given(own):
    cache, model = own
    prompt = ids(1, PROMPT)
    with cache.session(prompt) as past, torch.no_grad():
        model(prompt, past_key_values=past, steering=torch.ones(1))
        assert past.private == "a forward pass was given steering"
    assert reused(cache, model) == 0


def test_a_hook_that_may_change_what_layers_compute(own):
    cache, model = own
    reused(cache, model)
    handle = model.model.layers[0].register_forward_hook(lambda *a: a[2] * 1.5)
    assert reused(cache, model) == 0
    assert reused(cache, model) == 0
    with cache.session(ids(1, PROMPT)) as past:
        assert past.private == "a forward hook is on model.layers.0"
    handle.remove()
    assert reused(cache, model) == PROMPT - 1


def test_a_hook_that_comes_while_a_session_runs(own):
    cache, model = own
    prompt = ids(1, PROMPT)
    with cache.session(prompt) as past, torch.no_grad():
        model(prompt[:, :20], past_key_values=past)
        handle = model.model.layers[0].register_forward_pre_hook(lambda _, a: (a[0] * 2, *a[1:]))
        model(prompt[:, 20:], past_key_values=past)
        handle.remove()
    assert reused(cache, model) == PAGE
