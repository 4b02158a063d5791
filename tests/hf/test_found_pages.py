"""What was found is used only in passes it is valid for; and changes that come and go are seen."""

import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from kvpaged import PagedKVCache
from kvpaged.errors import UsageError
from tests.hf.test_not_shared import reused
from tests.hf.test_sharing import windowed
from tests.hf.tiny import beside_dynamic, generate, ids, tiny

PAGE = 16
X = ids(1, 40)


def fresh(model: Any) -> PagedKVCache:
    return PagedKVCache.for_model(model, "8MiB", page_size=PAGE)


def logits(model: Any, cache: PagedKVCache, prompt: torch.Tensor = X, **options: Any) -> Any:
    """The last logits through a session that begins with what is found, and without a cache."""
    with cache.session(prompt, options.get("attention_mask")) as past, torch.no_grad():
        ours = model(prompt[:, past.reused :], past_key_values=past, **options).logits[:, -1]
        found = past.reused
    return found, ours


def is_right(model: Any, cache: PagedKVCache) -> int:
    """Columns found, after checking that what they give is right."""
    found, ours = logits(model, cache)
    with torch.no_grad():
        torch.testing.assert_close(ours, model(X).logits[:, -1], rtol=1e-4, atol=1e-4)
    return int(found)


# -- passes that what was found is not valid for --------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"position_ids": torch.arange(32, 40)[None] * 2}, "other positions"),
        ({"steering": torch.ones(1)}, "was given steering"),
    ],
)
def test_a_pass_that_is_not_plain_is_named_and_can_be_had_privately(small, options, why):
    cache, model = small
    is_right(model, cache)
    with pytest.raises(UsageError, match=f"found 32 columns .* {why}.* private=True"):
        logits(model, cache, **options)
    with cache.session(X, private=True) as past, torch.no_grad():
        assert past.reused == 0
        full = options | ({"position_ids": torch.arange(40)[None] * 2} if "position_ids" in options
                          else {})  # fmt: skip
        ours = model(X, past_key_values=past, **full).logits
        torch.testing.assert_close(ours, model(X, **full).logits, rtol=1e-4, atol=1e-4)
    assert is_right(model, cache) == 32


def test_embeddings_after_a_hit(small):
    cache, model = small
    is_right(model, cache)
    with cache.session(X) as past, torch.no_grad():
        embedded = model.get_input_embeddings()(X)
        with pytest.raises(UsageError, match="comes without token ids"):
            model(inputs_embeds=embedded, past_key_values=past)


def test_padded_rows_without_positions_after_a_hit(small):
    cache, model = small
    batch, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits(model, cache, batch, attention_mask=mask, position_ids=positions)
    with cache.session(batch, mask) as past, torch.no_grad():
        assert past.reused > 0
        with pytest.raises(UsageError, match="other positions"):
            model(batch[:, past.reused :], attention_mask=mask, past_key_values=past)
        found = past.reused
        ours = model(
            batch[:, found:], attention_mask=mask, position_ids=positions[:, found:],
            past_key_values=past,
        ).logits[:, -1]  # fmt: skip
        theirs = model(batch, attention_mask=mask, position_ids=positions).logits[:, -1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_token_types_after_a_hit():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_positions=256, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    with fresh(model) as cache:
        assert (is_right(model, cache), is_right(model, cache)) == (0, 32)
        with pytest.raises(UsageError, match="was given token_type_ids"):
            logits(model, cache, token_type_ids=torch.ones(1, 8, dtype=torch.int64))


def test_a_continuation_that_repeats_the_prompt_is_one(small):
    cache, model = small
    same = torch.full((1, 80), 5)
    for _ in range(2):
        with cache.session(same[:, :40]) as past, torch.no_grad():
            model(same[:, past.reused :], past_key_values=past)
            assert past.columns == 80


@pytest.mark.parametrize("kind", ["all", "some"])
def test_a_whole_prompt_and_rewinds_under_a_window_after_a_hit(kind):
    model = windowed(kind)
    prompt = ids(1, 200)
    with fresh(model) as cache:
        for _ in range(2):
            ours, theirs = beside_dynamic(
                cache, model, prompt, torch.ones_like(prompt), max_new_tokens=20,
                prompt_lookup_num_tokens=3,
            )  # fmt: skip
            assert torch.equal(ours, theirs)
        with cache.session(prompt) as past:
            assert past.reused == 199
            past.rewind(190)
            ours = generate(model, past, prompt, max_new_tokens=10)
            theirs = generate(model, DynamicCache(config=model.config), prompt, max_new_tokens=10)
            assert torch.equal(ours, theirs)
            past.rewind(0)
            assert past.columns == 0


# -- what comes and goes between two looks --------------------------------------------------------


def test_weights_put_in_for_one_pass(small):
    cache, model = small
    other = {k: v * 1.3 for k, v in model.named_parameters() if "layers.0" in k}
    with cache.session(X) as past, torch.no_grad():
        torch.func.functional_call(model, other, (X[:, :10],), {"past_key_values": past})
        model(X[:, 10:], past_key_values=past)
        assert past.private is not None
    assert is_right(model, cache) == 0


def test_a_hook_for_one_pass(small):
    cache, model = small
    with cache.session(X) as past, torch.no_grad():
        handle = model.model.layers[0].register_forward_hook(lambda *a: a[2] * 1.5)
        model(X[:, :10], past_key_values=past)
        handle.remove()
        model(X[:, 10:], past_key_values=past)
    assert is_right(model, cache) == 0


def test_a_part_in_training_mode_keeps_it_private():
    model = tiny(attention_dropout=0.5)
    with fresh(model) as cache:
        model.model.layers[1].train()
        with cache.session(X) as past, torch.no_grad():
            model(X, past_key_values=past)
            assert past.private is not None
        model.eval()
        assert (is_right(model, cache), is_right(model, cache)) == (0, 32)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_fused_step_over_a_few_rows(kind):
    model = tiny(vocab_size=1000, tie_word_embeddings=False)
    with fresh(model) as cache:
        is_right(model, cache)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        weight = model.get_input_embeddings().weight.requires_grad_(True)
        options: dict[str, Any] = {"weight_decay": 0.0} if kind == "AdamW" else {}
        optimizer = getattr(torch.optim, kind)([weight], lr=0.1, fused=True, **options)
        model(X, labels=X, use_cache=False).loss.backward()
        optimizer.step()
        assert (is_right(model, cache), is_right(model, cache)) == (0, 32)


@pytest.mark.parametrize("where", ["all columns but one", "a transposed weight", "one in ten"])
def test_writes_through_data_that_touch_a_part(where):
    model = tiny()
    layer = model.model.layers[0]
    if where == "a transposed weight":
        proj = layer.self_attn.v_proj
        proj.weight = torch.nn.Parameter(proj.weight.detach().t().contiguous().t())
    with fresh(model) as cache:
        is_right(model, cache)
        if where == "all columns but one":
            layer.mlp.down_proj.weight.data[:, 1:] *= 1.5
        elif where == "a transposed weight":
            layer.self_attn.v_proj.weight.data *= 1.5
        else:
            weight = layer.mlp.up_proj.weight.data
            weight[torch.rand(weight.shape) < 0.1] += 0.5
        assert (is_right(model, cache), is_right(model, cache)) == (0, 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_weights_are_in_the_namespace():
    def namespace(scale: float) -> tuple[bytes, str | None]:
        model = tiny()
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(scale)
        quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        with fresh(quantised.eval()) as cache:
            return cache.namespace, cache.private

    one, other = namespace(1.0), namespace(2.0)
    assert one[1] is None
    assert one[0] != other[0]


def test_weights_that_can_not_be_read_keep_it_private():
    model = tiny()
    with fresh(model) as cache:
        past = cache.session(X)
        with torch.no_grad():
            model(X, past_key_values=past)
        model.lm_head.weight = torch.nn.Parameter(torch.empty(128, 64, device="meta"))
        assert reused_nothing(cache)
        past.close()
        assert past.batch.closed
        assert cache.stats().used == 0


def reused_nothing(cache: PagedKVCache) -> bool:
    with cache.session(X) as past:
        return past.reused == 0 and "can't be read" in str(cache.private)


def test_refresh_without_a_change_changes_nothing(small):
    cache, model = small
    is_right(model, cache)
    with cache.session(X) as past:
        name = cache.namespace
        cache.refresh()
        assert cache.namespace == name
        generate(model, past, X, max_new_tokens=2)
        assert past.private is None
    model.model.layers[0].self_attn.scaling *= 2
    cache.refresh()
    assert (is_right(model, cache), is_right(model, cache)) == (0, 32)


def test_autocast_keeps_it_private():
    model = tiny().to(torch.bfloat16)
    with fresh(model) as cache:
        with cache.session(X) as past, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(X, past_key_values=past)
            assert past.private == "a forward pass ran under autocast"
        assert reused(cache, model, X) == 0


def test_figures_of_a_salt_that_nothing_is_kept_for():
    model = tiny()
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE, prefix_sharing=False) as cache:
        cache.session(X, salt="secret").close()
        assert cache.tenant_stats("secret").asked == 40
        assert cache.tenant_stats(None).asked == 0


def test_a_cache_that_is_closed_while_a_thread_is_in_a_pass():
    """The pass ends as it began, or with an error: never with attention over something else."""
    for trial in range(6):
        model = tiny()
        cache = fresh(model)
        expected = generate(model, DynamicCache(config=model.config), X, max_new_tokens=30)
        found: list[Any] = []
        past = cache.session(X)
        begun = threading.Event()
        model.lm_head.register_forward_pre_hook(lambda *_, begun=begun: begun.set())

        def work(model: Any = model, past: Any = past, found: list[Any] = found) -> None:
            try:
                found.append(generate(model, past, X, max_new_tokens=30))
            except UsageError as error:
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert begun.wait(60)
        threading.Event().wait(0.003 * trial)
        cache.close()
        thread.join(60)
        assert not thread.is_alive()
        assert isinstance(found[0], UsageError) or torch.equal(found[0], expected)
        assert model.config._attn_implementation != "kvpaged"
        assert torch.equal(model.generate(X, max_new_tokens=5, do_sample=False)[:, :40], X)
