"""Sessions under unmodified transformers: the tokens of DynamicCache, and what can go wrong."""

import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvpaged import PagedKVCache
from kvpaged.errors import ConfigError, OutOfPagesError, UnsupportedModelError, UsageError
from tests.hf.tiny import assert_same_tokens, beside_dynamic, generate, ids, tiny


@pytest.fixture(scope="module")
def real(smollm2):
    model, tokenizer = smollm2
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    with PagedKVCache.for_model(model, "1GiB") as cache:
        yield cache, model, tokenizer
    assert model.config._attn_implementation == "sdpa"


def test_greedy_tokens_of_a_real_model(real):
    cache, model, tokenizer = real
    prompt = tokenizer("The history of the Roman empire began", return_tensors="pt").input_ids
    ours, theirs = beside_dynamic(cache, model, prompt, max_new_tokens=128)
    assert ours.shape[1] == prompt.shape[1] + 128
    assert_same_tokens(model, ours, theirs, None)
    assert cache.stats().used == 0


def test_greedy_tokens_of_a_ragged_padded_batch(real):
    cache, model, tokenizer = real
    texts = ["Hello", "The quick brown fox jumps over the lazy dog and then", "a b c d", "In 1945,"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    mask = batch.attention_mask
    ours, theirs = beside_dynamic(cache, model, batch.input_ids, mask, max_new_tokens=128)
    assert_same_tokens(model, ours, theirs, mask)


def test_beams_of_a_real_model(real):
    cache, model, tokenizer = real
    prompt = tokenizer("My favourite animal is", return_tensors="pt").input_ids
    ours, theirs = beside_dynamic(cache, model, prompt, max_new_tokens=128, num_beams=4)
    assert torch.equal(ours, theirs)


def test_a_prompt_of_three_thousand_tokens(real):
    import pydoc_data.topics as topics

    cache, model, tokenizer = real
    text = " ".join(topics.topics.values())[:14_000]
    prompt = tokenizer(text, return_tensors="pt").input_ids[:, :3000]
    assert prompt.shape[1] == 3000
    ours, theirs = beside_dynamic(cache, model, prompt, max_new_tokens=32)
    assert_same_tokens(model, ours, theirs, None)


def test_memory_is_what_the_tokens_need_and_half_a_page_a_row(small):
    """On average over all lengths a row can end at within a page; at worst a page less a token."""
    cache, model = small
    token = sum(group.geometry.token_bytes for group in cache.groups)
    size = cache.config.page_size
    over = []
    with cache.session(ids(3, 200)) as past, torch.no_grad():
        for step in range(2 * size):
            new = ids(3, 200) if step == 0 else ids(3, 1, step)
            model(new, past_key_values=past)
            need = 3 * past.get_seq_length() * token
            over.append(past.memory_bytes() - need)
            assert 0 <= over[-1] <= 3 * (size - 1) * token
    assert sum(over) / len(over) <= 0.03 * need + 3 * size // 2 * token


def test_windows_of_a_hybrid_model(gemma3):
    """Gemma-3: 15 layers of window 512 beside 3 full ones, past the window, padded."""
    model, tokenizer = gemma3
    tokenizer.padding_side = "left"
    import pydoc_data.topics as topics

    words = " ".join(topics.topics.values())
    batch = tokenizer([words[:2600], words[5000:7000]], return_tensors="pt", padding=True)
    assert batch.input_ids.shape[1] > 520
    with PagedKVCache.for_model(model, "512MiB") as cache:
        assert sorted((len(g.layers), g.window or 0) for g in cache.groups) == [(3, 0), (15, 512)]
        mask = batch.attention_mask
        ours, theirs = beside_dynamic(cache, model, batch.input_ids, mask, max_new_tokens=24)
        assert_same_tokens(model, ours, theirs, mask)


# -- with a tiny model ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
def test_every_backend_gives_the_same_tokens(backend, layout):
    model = tiny()
    prompt, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :7] = 0
    options = {"backend": backend, "layout": layout, "page_size": 16}
    with PagedKVCache.for_model(model, "4MiB", **options) as cache:
        ours, theirs = beside_dynamic(cache, model, prompt, mask, max_new_tokens=4)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 7},
        {"repetition_penalty": 1.3},
    ],
)
def test_ways_of_generating(small, options):
    cache, model = small
    prompt = ids(1, 33)
    ours, theirs = beside_dynamic(cache, model, prompt, max_new_tokens=30, **options)
    assert torch.equal(ours, theirs)


def test_several_sampled_sequences_share_their_prompt(small):
    cache, model = small
    prompt = ids(1, 48)
    with cache.session(prompt) as past:
        torch.manual_seed(3)
        ours = model.generate(
            prompt, past_key_values=past, do_sample=True, num_return_sequences=5, max_new_tokens=9
        )
        cache.check_integrity()
        assert past.tokens(4).tolist() == ours[4, :-1].tolist()
    torch.manual_seed(3)
    theirs = model.generate(prompt, do_sample=True, num_return_sequences=5, max_new_tokens=9)
    assert torch.equal(ours, theirs)


def test_a_session_goes_on_where_it_stopped(small):
    cache, model = small
    prompt = ids(2, 10)
    with cache.session(prompt) as past:
        first = generate(model, past, prompt, max_new_tokens=5)
        longer = torch.cat((first, ids(2, 6, seed=9)), dim=1)
        ours = generate(model, past, longer, max_new_tokens=8)
    theirs = generate(model, DynamicCache(config=model.config), longer, max_new_tokens=8)
    assert torch.equal(ours, theirs)


def test_crop_reset_and_selecting_rows(small):
    cache, model = small
    prompt = ids(3, 40)
    mask = torch.ones_like(prompt)
    mask[0, :11] = 0
    with cache.session(prompt, mask) as past, torch.no_grad():
        logits = model(prompt, attention_mask=mask, past_key_values=past).logits
        past.crop(-25)
        cache.check_integrity()
        again = model(prompt[:, 15:], attention_mask=mask, past_key_values=past).logits
        torch.testing.assert_close(again[:, -5:], logits[:, -5:], rtol=1e-4, atol=1e-4)
        past.batch_select_indices(torch.tensor([2, 0]))
        more = ids(2, 3, seed=4)
        out = model(
            more, past_key_values=past,
            attention_mask=torch.cat((mask[[2, 0]], torch.ones_like(more)), dim=1),
            position_ids=torch.tensor([[40, 41, 42]] * 2),  # columns, as in the passes before
        ).logits  # fmt: skip
        alone = model(torch.cat((prompt[2:], more[:1]), dim=1)).logits
        torch.testing.assert_close(out[0], alone[0, -3:], rtol=1e-4, atol=1e-5)
        alone = model(torch.cat((prompt[:1, 11:], more[1:]), dim=1)).logits
        torch.testing.assert_close(out[1], alone[0, -3:], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="-43 to 0, got 1"):
            past.crop(1)
        past.reset()
        assert past.get_seq_length() == 0
        assert past.pages() == 0
        model(more, past_key_values=past)
        cache.check_integrity()
        assert past.get_seq_length() == 3


def test_sessions_side_by_side_and_dynamic_cache_between(small):
    cache, model = small
    prompts = [ids(1, 20, seed) for seed in range(3)]
    expected = [model.generate(p, max_new_tokens=12, do_sample=False) for p in prompts]
    sessions = [cache.session(p) for p in prompts]
    others = [DynamicCache(config=model.config) for _ in prompts]
    rows = [(p, p) for p in prompts]
    with torch.no_grad():
        for _ in range(12):
            for i, (past, other) in enumerate(zip(sessions, others, strict=True)):
                seen = past.get_seq_length()
                a = model(rows[i][0][:, seen:], past_key_values=past).logits[:, -1:].argmax(-1)
                b = model(rows[i][1][:, seen:], past_key_values=other).logits[:, -1:].argmax(-1)
                rows[i] = (torch.cat((rows[i][0], a), 1), torch.cat((rows[i][1], b), 1))
    for (a, b), whole in zip(rows, expected, strict=True):
        assert torch.equal(a, whole)
        assert torch.equal(b, whole)
    for past in sessions:
        past.close()
    assert cache.stats().used == 0


def test_out_of_pages_in_the_middle_of_a_generation():
    model = tiny()
    page = 2 * 2 * 2 * 16 * 16 * 4
    with PagedKVCache.for_model(model, 10 * page, page_size=16) as cache:
        prompt = ids(1, 30)
        other = cache.session(prompt)
        first = generate(model, other, prompt, max_new_tokens=10)
        with cache.session(ids(1, 30, 9)) as past:
            with pytest.raises(OutOfPagesError, match="out of pages: 1 new tokens in 1 sequences"):
                generate(model, past, ids(1, 30, 9), max_new_tokens=200)
            assert past.get_seq_length() == 7 * 16
            cache.check_integrity()
        assert cache.stats().used == 3 * page, "all its pages are back"
        ours = generate(model, other, first, max_new_tokens=10)
        assert torch.equal(ours, model.generate(first, max_new_tokens=10, do_sample=False))
        other.close()


def test_an_exception_inside_a_forward_pass_leaves_the_session_as_it_was(small):
    cache, model = small
    prompt = ids(1, 20)
    with cache.session(prompt) as past, torch.no_grad():
        fail = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(prompt, past_key_values=past)
        fail.remove()
        assert past.get_seq_length() == 0
        cache.check_integrity()
        ours = generate(model, past, prompt, max_new_tokens=8)
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=8, do_sample=False))


def test_a_forgotten_session_gives_its_pages_back(small):
    cache, model = small
    past = cache.session(ids(1, 30))
    generate(model, past, ids(1, 30), max_new_tokens=3)
    assert cache.stats().used > 0
    del past
    gc.collect()
    assert cache.stats().used == 0


def test_for_model_twice_and_close_in_any_order():
    model = tiny()
    prompt = ids(1, 9)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    first = PagedKVCache.for_model(model, "1MiB")
    second = PagedKVCache.for_model(model, "1MiB", page_size=16)
    first.close()
    with second.session(prompt) as past:
        assert torch.equal(generate(model, past, prompt, max_new_tokens=6), expected)
    second.close()
    second.close()
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("original", ["eager", "sdpa"])
def test_other_passes_of_a_prepared_model_are_the_originals(original):
    model = tiny()
    model.set_attn_implementation(original)
    prompt, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad():
        before = model(prompt, attention_mask=mask).logits
        with PagedKVCache.for_model(model, "1MiB"):
            assert torch.equal(model(prompt, attention_mask=mask).logits, before)
    assert model.config._attn_implementation == original


def misuse(call: str, cache: PagedKVCache, model: Any) -> None:
    prompt = ids(2, 8)
    mask = torch.ones_like(prompt)
    past = cache.session(prompt)
    if call == "other tokens":
        model(prompt.flip(1), past_key_values=past)
    elif call == "rows":
        model(prompt[:1], past_key_values=past)
    elif call == "holes":
        mask[1, 4] = 0
        cache.session(prompt, mask)
    elif call == "mask":
        mask[1, 0] = 0
        model(prompt, attention_mask=mask, past_key_values=past)
    elif call == "no mask":
        mask[0, 0] = 0
        model(prompt, past_key_values=cache.session(prompt, mask))
    elif call == "shape":
        cache.session(prompt[0])
    elif call == "training":
        model.train()
        try:
            model(prompt, past_key_values=past)
        finally:
            model.eval()
    elif call == "closed":
        past.close()
        model(prompt, past_key_values=past)
    elif call == "attention":
        model.config._attn_implementation = "sdpa"
        try:
            model(prompt, past_key_values=past)
        finally:
            model.config._attn_implementation = "kvpaged"
    elif call == "weights":
        model(prompt, past_key_values=past, output_attentions=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("other tokens", "row 0, column 0: the session was made for token"),
        ("rows", "the session has 2 rows, the forward pass 1"),
        ("holes", "row 1 is padded elsewhere"),
        ("mask", "row 1: the mask hides 1 columns, the session was made with 0 pads"),
        ("no mask", "the forward pass has no mask"),
        ("shape", r"ints \[rows, columns\], got \(8,\)"),
        ("training", "training mode"),
        ("closed", "closed"),
        ("attention", "set to 'sdpa' since for_model"),
        ("weights", "no attention weights"),
    ],
)
def test_misuse_is_named(small, call, message):
    cache, model = small
    with torch.no_grad(), pytest.raises(UsageError, match=message):
        misuse(call, cache, model)
    cache.check_integrity()


def test_gradients_are_refused(small):
    cache, model = small
    with pytest.raises(UsageError, match="gradients"):
        model(ids(1, 4), past_key_values=cache.session(ids(1, 4)))


def test_a_custom_mask_is_refused(small):
    cache, model = small
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"\[rows, columns\] or none"):
        model(ids(1, 4), attention_mask=mask, past_key_values=cache.session(ids(1, 4)))


def test_models_that_cannot_be_served_are_named():
    with pytest.raises(UnsupportedModelError, match="takes a transformers model"):
        PagedKVCache.for_model(torch.nn.Linear(2, 2), "1MiB")
    model = tiny()
    with pytest.raises(UsageError, match="training mode"):
        PagedKVCache.for_model(model.train(), "1MiB")
    with pytest.raises(ConfigError, match="kv_format is one of auto"):
        PagedKVCache.for_model(model.eval(), "1MiB", kv_format="int3")
    with pytest.raises(ConfigError, match="smaller than one page"):
        PagedKVCache.for_model(model, "1KiB")
    assert model.config._attn_implementation == "sdpa"


def test_embeddings_are_computed_and_leave_no_ids(small):
    cache, model = small
    prompt = ids(1, 12)
    with cache.session(prompt) as past, torch.no_grad():
        ours = model(inputs_embeds=model.get_input_embeddings()(prompt), past_key_values=past)
        torch.testing.assert_close(ours.logits, model(prompt).logits, rtol=1e-4, atol=1e-5)
        assert past.tokens(0) is None
