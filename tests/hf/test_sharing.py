"""What a session computes serves later ones, through generate(): every token as DynamicCache's."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kvpaged import PagedKVCache
from kvpaged.errors import UsageError
from tests.hf.tiny import assert_same_tokens, generate, ids

PAGE = 16


def ask(
    cache: PagedKVCache, model: Any, prompt: torch.Tensor, mask: Any = None, **options: Any
) -> tuple[int, torch.Tensor]:
    """Generate through a session; returns the columns it reused and the tokens, which are checked
    against DynamicCache's."""
    options.setdefault("max_new_tokens", 20)
    given = {"attention_mask": torch.ones_like(prompt) if mask is None else mask}
    with cache.session(prompt, mask) as past:
        reused = past.reused
        ours = generate(model, past, prompt, **given, **options)
        assert past.private is None
        cache.check_integrity()
    theirs = generate(model, DynamicCache(config=model.config), prompt, **given, **options)
    assert_same_tokens(model, ours, theirs, mask)
    return reused, ours


def joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def shared(cache: PagedKVCache, a: Any, b: Any) -> int:
    """Physical pages that two sessions' first rows both hold."""
    return len(np.intersect1d(a.batch.page_map()[0], b.batch.page_map()[0]))


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}, {"prompt_lookup_num_tokens": 3}])
def test_the_next_turn_computes_the_new_tokens_and_at_most_a_page(small, options):
    cache, model = small
    turn, reply = ask(cache, model, ids(1, 50), max_new_tokens=45, **options)
    assert turn == 0
    for seed in (1, 2):
        prompt = joined(reply, ids(1, 9, seed))
        with cache.session(prompt) as past:
            turn = past.reused
        _, reply = ask(cache, model, prompt, max_new_tokens=45, **options)
        computed = prompt.shape[1] - turn
        assert computed <= 9 + 1 + PAGE, "the reply's last token was never fed to the model"


def test_a_prompt_that_is_there_whole_computes_its_last_token(small):
    cache, model = small
    for columns in (48, 49):
        first, _ = ask(cache, model, ids(1, columns, columns))
        again, _ = ask(cache, model, ids(1, columns, columns))
        assert (first, again) == (0, columns - 1)


def test_a_page_that_agrees_in_part_is_copied_up_to_there(small):
    cache, model = small
    one = ids(1, 60)
    other = one.clone()
    other[0, 41] += 1 if other[0, 41] < 100 else -1
    ask(cache, model, one)
    before = cache.stats().groups[0].cached_pages
    assert ask(cache, model, other)[0] == 41
    assert ask(cache, model, one)[0] == 59
    assert ask(cache, model, other)[0] == 59
    assert cache.stats().groups[0].cached_pages > before


def test_two_live_sessions_hold_the_same_pages(small):
    cache, model = small
    prefix = ids(1, 40)
    a, b = joined(prefix, ids(1, 5, 1)), joined(prefix, ids(1, 5, 2))
    with cache.session(a) as first:
        generate(model, first, a, max_new_tokens=4)
        with cache.session(b) as second:
            assert second.reused == 40
            generate(model, second, b, max_new_tokens=4)
            assert shared(cache, first, second) == 2
            held = first.pages() + second.pages() - 2
            assert cache.stats().used == held * cache.groups[0].geometry.page_bytes
            cache.check_integrity()
    assert cache.stats().used == 0


def test_equal_rows_that_start_cold_end_up_on_the_same_pages(small):
    cache, model = small
    prompt = ids(1, 40).repeat(3, 1)
    prompt[1, 34:] = ids(1, 6, 5)
    with cache.session(prompt) as past:
        assert past.reused == 0
        generate(model, past, prompt, max_new_tokens=2)
        rows = past.batch.page_map()
        assert {tuple(row[:2].tolist()) for row in rows} == {tuple(rows[0][:2].tolist())}
        assert past.pages() == 2 + 3
        cache.check_integrity()


def test_padded_rows_reuse_the_same_columns_and_write_to_no_page_of_others(small):
    cache, model = small
    prompts = [ids(1, n, n) for n in (50, 37, 44)]
    for prompt in prompts[:2]:
        ask(cache, model, prompt)
    width = 50
    batch = torch.zeros(3, width, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, prompt in enumerate(prompts):
        batch[row, width - prompt.shape[1] :] = prompt
        mask[row, width - prompt.shape[1] :] = 1
    with cache.session(batch[:2], mask[:2]) as past:
        assert past.reused == 49, "the least of (pads + found) over the rows"
        assert past.batch.lengths.tolist() == [49, 36]
    with cache.session(batch, mask) as past:
        assert past.reused == 6, "the third row is not there: only its pads"
        assert past.batch.lengths.tolist() == [6, 0, 0]
    assert ask(cache, model, batch, mask)[0] == 6
    assert ask(cache, model, batch, mask)[0] == 49
    for prompt in prompts:
        assert ask(cache, model, prompt)[0] == prompt.shape[1] - 1


def test_rewinds_leave_both_ways_in_the_cache(small):
    cache, model = small
    prompt = ids(1, 40)
    with cache.session(prompt) as past:
        one = generate(model, past, prompt, max_new_tokens=40)
        past.rewind(30)
        assert past.columns == 30
        other = joined(one[:, :30], ids(1, 30, 7))
        two = generate(model, past, other, max_new_tokens=20)
        cache.check_integrity()
    theirs = generate(model, DynamicCache(config=model.config), other, max_new_tokens=20)
    assert_same_tokens(model, two, theirs, None)
    assert ask(cache, model, one)[0] >= one.shape[1] - 1 - PAGE
    assert ask(cache, model, two)[0] >= two.shape[1] - 1 - PAGE


def test_one_document_many_questions(small):
    cache, model = small
    document = ids(1, 100)
    with cache.session(document) as root:
        with torch.no_grad():
            model(document, past_key_values=root)
        branches = root.branch(5)
        root.close()
        for number, branch in enumerate(branches):
            question = joined(document, ids(1, 8, 10 + number))
            ours = generate(model, branch, question, max_new_tokens=10)
            theirs = generate(model, DynamicCache(config=model.config), question, max_new_tokens=10)
            assert_same_tokens(model, ours, theirs, None)
            cache.check_integrity()
        page = cache.groups[0].geometry.page_bytes
        assert cache.stats().used == (6 + 5 * 2) * page, "6 full pages once, and 2 for each"
        for branch in branches:
            branch.close()
    assert cache.stats().used == 0


def test_a_branch_goes_its_own_way_and_its_origin_too(small):
    cache, model = small
    prompt = ids(2, 21)
    with cache.session(prompt) as past:
        first = generate(model, past, prompt, max_new_tokens=7)
        with past.fork() as other:
            left = generate(model, other, joined(first, ids(2, 3, 1)), max_new_tokens=20)
            right = generate(model, past, joined(first, ids(2, 3, 2)), max_new_tokens=20)
            cache.check_integrity()
        for seed, ours in ((1, left), (2, right)):
            prompt_now = joined(first, ids(2, 3, seed))
            theirs = generate(
                model, DynamicCache(config=model.config), prompt_now, max_new_tokens=20
            )
            assert_same_tokens(model, ours, theirs, None)
        with pytest.raises(UsageError, match="at least 1 more, got 0"):
            past.branch(0)


def test_samples_of_one_prompt_share_its_pages(small):
    cache, model = small
    prompt = ids(1, 50)
    torch.manual_seed(3)
    with cache.session(prompt) as past:
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=past,
            do_sample=True, num_return_sequences=6, max_new_tokens=20, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        assert len({tuple(row.tolist()) for row in out}) > 1
        rows = past.batch.page_map()
        assert len({tuple(row[:3].tolist()) for row in rows}) == 1
        cache.check_integrity()
    for row in out:
        assert ask(cache, model, row[None])[0] >= 69 - PAGE


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_fed_the_whole_prompt_computes_it_all(small, masked):
    """As assisted generation does, whatever a cache holds."""
    cache, model = small
    prompt = ids(2, 40)
    mask = torch.ones_like(prompt) if masked else None
    with torch.no_grad():
        expected = model(prompt).logits
        for _ in range(2):
            with cache.session(prompt) as past:
                found = model(prompt, attention_mask=mask, past_key_values=past).logits
                torch.testing.assert_close(found, expected)
                assert past.columns == 40
                cache.check_integrity()


def test_nothing_is_shared_when_told_so(small):
    model = small[1]
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE, prefix_sharing=False) as cache:
        for _ in range(2):
            with cache.session(ids(1, 40)) as past:
                assert past.reused == 0
                generate(model, past, ids(1, 40), max_new_tokens=2)
                assert past.private == "the cache has no namespace"
        assert cache.stats().cached == 0


def windowed(kind: str) -> Any:
    torch.manual_seed(1)
    facts: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24,
        "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "all":
        return MistralForCausalLM(MistralConfig(**facts)).eval()
    return Gemma2ForCausalLM(Gemma2Config(**facts)).eval()


@pytest.mark.parametrize("kind", ["all", "some"])
def test_windows_need_only_the_pages_they_see(kind):
    model = windowed(kind)
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE) as cache:
        prompt = ids(1, 90)
        _, reply = ask(cache, model, prompt, max_new_tokens=40)
        assert ask(cache, model, reply)[0] >= reply.shape[1] - 1 - PAGE
        assert ask(cache, model, joined(prompt[:, :70], ids(1, 9, 4)))[0] == 70
        with cache.session(reply) as past:
            seen = [len(past.batch.page_map(group)[0]) for group in range(len(cache.groups))]
            windows = [group.window for group in cache.groups]
            for pages, window in zip(seen, windows, strict=True):
                assert pages <= (4 if window else 9), "the window, and a page to rewind into"


def test_windows_whose_pages_were_evicted_are_found_as_far_as_they_go():
    """Of a group with a window pages go alone: a hole is no hit, what lies beyond it is one."""
    model = windowed("all")
    with PagedKVCache.for_model(model, "4MiB", page_size=PAGE) as cache:
        prompt = ids(1, 160)
        ask(cache, model, prompt, max_new_tokens=2)
        allocator = cache.classes[0].allocator
        while allocator.cached_pages() > 3:  # the oldest are those that left the window first
            allocator.evict_oldest()
        cache.check_integrity()
        assert ask(cache, model, joined(prompt[:, :80], ids(1, 20, 9)), max_new_tokens=2)[0] == 0
        assert ask(cache, model, joined(prompt, ids(1, 5, 8)), max_new_tokens=2)[0] == 160


def test_salted_sessions_meet_their_own_only(small):
    cache, model = small
    prompt = ids(1, 60)

    def reused(salt: Any, **options: Any) -> int:
        with cache.session(prompt, salt=salt, **options) as past:
            generate(model, past, prompt, max_new_tokens=6)
            cache.check_integrity()
            return int(past.reused)

    assert [reused(salt) for salt in ("a", "a", b"b", None, "b", "a", None)] == [
        0, 59, 0, 0, 59, 59, 59,
    ]  # fmt: skip
    figures = cache.tenant_stats("b")
    assert (figures.asked, figures.reused) == (120, 59)
    cache.clear()
    # A system prompt of 40 tokens without salt, the rest under one: 2 pages are everybody's.
    assert [reused(s, salt_from=40) for s in ("a", "b", "a", None)] == [0, 32, 59, 32]
    with pytest.raises(UsageError, match="empty salt"):
        cache.session(prompt, salt="")
    with pytest.raises(UsageError, match="one for all rows or a sequence of 1"):
        cache.session(prompt, salt=["a", "b"])
