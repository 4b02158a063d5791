"""What once went wrong: found by reading against the code, held here."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvpaged import PagedKVCache
from kvpaged.errors import OutOfPagesError, UsageError
from tests.hf.tiny import beside_dynamic, generate, ids, tiny


def logits_of(model: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        out = model(*args, **kwargs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def test_rows_whose_pages_lie_downwards(small):
    """Equal prompts whose second row's pages lie below the first's are no regular grid."""
    model = small[1]
    page = 2 * 2 * 2 * 16 * 16 * 4
    with PagedKVCache.for_model(model, 36 * page, page_size=16) as cache:
        blocker = cache.session(ids(1, 5))
        logits_of(model, ids(1, 5), past_key_values=blocker)
        upper = cache.session(ids(1, 5))
        logits_of(model, ids(1, 5), past_key_values=upper)
        blocker.close()
        for _ in range(2):
            with cache.session(ids(2, 5)) as past:
                ours = logits_of(model, ids(2, 5), past_key_values=past)
                torch.testing.assert_close(ours, logits_of(model, ids(2, 5)))
            upper.close()


def test_a_pass_that_fails_before_its_first_layer_leaves_no_trace(small):
    """Neither for the inner model's next pass, nor for masks of passes without a session."""
    cache, model = small
    prompt, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    with torch.no_grad(), cache.session(prompt) as past:
        logits_of(model, prompt, past_key_values=past)
        with pytest.raises(IndexError):
            model(torch.full((2, 1), 5000), past_key_values=past)
        alone = logits_of(model.model, prompt, attention_mask=mask)
        logits_of(model.model, ids(2, 1, 8), past_key_values=past)
        assert past.get_seq_length() == 13
        with PagedKVCache.for_model(model, "1MiB"):
            assert torch.equal(logits_of(model.model, prompt, attention_mask=mask), alone)
    assert torch.equal(logits_of(model.model, prompt, attention_mask=mask), alone)


def test_positional_arguments_are_seen(small):
    cache, model = small
    prompt, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    with cache.session(prompt, mask) as past:
        ours = logits_of(model, prompt, mask, None, past)
        theirs = logits_of(model, prompt, mask, None, DynamicCache(config=model.config))
        shown = mask.bool()
        torch.testing.assert_close(ours[shown], theirs[shown], rtol=1e-4, atol=1e-4)
    with cache.session(prompt) as past, pytest.raises(UsageError, match="the mask hides 5"):
        logits_of(model, prompt, mask, None, past)


def test_a_mask_that_changes_on_the_way_is_refused(small):
    cache, model = small
    with cache.session(ids(1, 8)) as past:
        logits_of(model, ids(1, 8), past_key_values=past)
        mask = torch.ones(1, 9, dtype=torch.int64)
        mask[0, 3] = 0
        with pytest.raises(UsageError, match="the mask hides 1 columns"):
            logits_of(model, ids(1, 1), attention_mask=mask, past_key_values=past)


def test_chunks_of_one_column_inside_the_padding(small):
    cache, model = small
    prompt, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :6] = 0
    options = {"prefill_chunk_size": 1, "max_new_tokens": 6}
    ours, theirs = beside_dynamic(cache, model, prompt, mask, **options)
    assert torch.equal(ours, theirs)


def test_values_that_require_gradients_are_refused(small):
    cache, model = small
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    prompt = ids(1, 6)
    with cache.session(prompt) as past:
        with pytest.raises(UsageError, match="gradients"):
            model(prompt, past_key_values=past)
        logits_of(model, prompt, past_key_values=past)
        with pytest.raises(UsageError, match="gradients"):
            model(ids(1, 1), past_key_values=past)
    assert not cache.classes[0].flat.requires_grad


def test_pages_of_a_failed_pass_go_back_with_the_next(small):
    cache, model = small
    with cache.session(ids(1, 300)) as past, torch.no_grad():
        fail = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids(1, 300), past_key_values=past)
        fail.remove()
        past.reset()
        logits_of(model, ids(1, 7), past_key_values=past)
        assert past.pages() == 1


def test_out_of_pages_leaves_the_rows_of_a_session_as_they_were(small):
    model = small[1]
    page = 2 * 2 * 2 * 16 * 16 * 4
    with PagedKVCache.for_model(model, 4 * page, page_size=16) as cache:
        prompt = ids(1, 20)
        with cache.session(prompt) as past:
            with pytest.raises(OutOfPagesError):
                generate(model, past, prompt, max_new_tokens=4, num_beams=8)
            ours = generate(model, past, prompt, max_new_tokens=4)
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=4, do_sample=False))


def test_a_reset_session_takes_any_rows(small):
    cache, model = small
    with cache.session(ids(1, 9)) as past:
        generate(model, past, ids(1, 9), max_new_tokens=4, num_beams=4)
        past.reset()
        assert past.tokens(0).tolist() == []
        ours = generate(model, past, ids(2, 7), max_new_tokens=4)
        with pytest.raises(UsageError, match="rows to select"):
            past.batch_select_indices(torch.zeros(2, dtype=torch.bool))
    assert torch.equal(ours, model.generate(ids(2, 7), max_new_tokens=4, do_sample=False))


def test_tokens_at_other_positions_are_not_known(small):
    cache, model = small
    prompt = ids(1, 8)
    with cache.session(prompt) as past:
        logits_of(model, prompt, past_key_values=past, position_ids=torch.arange(100, 108)[None])
        assert past.tokens(0) is None
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    with cache.session(ids(2, 8), mask) as past:
        logits_of(model, ids(2, 8), attention_mask=mask, past_key_values=past)
        assert past.tokens(0) is None, "without positions transformers numbers the pads too"


def test_a_prompt_that_is_held_whole_is_not_fed_again(small):
    cache, model = small
    prompt = ids(1, 12)
    with cache.session(prompt) as past:
        logits_of(model, prompt, past_key_values=past)
        with pytest.raises(UsageError, match=r"held whole; crop\(-1\)"):
            generate(model, past, prompt, max_new_tokens=4)
        past.crop(-1)
        ours = generate(model, past, prompt, max_new_tokens=4)
    assert torch.equal(ours, model.generate(prompt, max_new_tokens=4, do_sample=False))


def test_inference_mode_and_back():
    model = tiny()
    prompt = ids(1, 9)
    with torch.inference_mode():
        cache = PagedKVCache.for_model(model, "1MiB", page_size=16)
        past = cache.session(prompt)
        model(prompt, past_key_values=past)
    first = model.generate(prompt, max_new_tokens=1, do_sample=False)
    ours = generate(model, past, first, max_new_tokens=30)
    cache.check_integrity()
    cache.close()
    assert torch.equal(ours, model.generate(first, max_new_tokens=30, do_sample=False))


def test_copies_of_a_prepared_model_and_other_edges():
    import copy

    model = tiny()
    prompt = ids(1, 9)
    expected = logits_of(model, prompt)
    cache = PagedKVCache.for_model(model, "1MiB")
    other = copy.deepcopy(model)
    assert torch.equal(logits_of(other, prompt), expected)
    model.config._attn_implementation = "eager"
    with pytest.raises(UsageError, match="set to 'eager' while a cache of it is open"):
        PagedKVCache.for_model(model, "1MiB")
    model.config._attn_implementation = "kvpaged"
    cache.close()
    assert torch.equal(logits_of(other, prompt), expected)
    with pytest.raises(UsageError, match="the cache is closed"):
        cache.stats()
