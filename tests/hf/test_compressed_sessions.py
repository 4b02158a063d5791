"""Sessions over compressed pages: the same greedy tokens however a prompt was come by."""

import functools
from typing import Any

import pytest
import torch

from kvpaged import DiskTier, HostTier
from kvpaged.config import Layout
from tests.hf.compressed import FORMATS, MODELS, PAGE, Reply, always_loads, ask, cold, make, replied
from tests.hf.tiny import generate, ids, tiny

NEW = 24
LENGTHS = (77, 51, 64)
EACH = [
    (name, kind, ("page-major", "layer-major")[(i + j) % 2])
    for i, name in enumerate(FORMATS)
    for j, kind in enumerate(MODELS)
]

every_format = pytest.mark.parametrize(("name", "kind", "layout"), EACH)


@functools.cache
def model_of(kind: str) -> Any:
    return MODELS[kind]()


@functools.cache
def reply_to(name: str, kind: str, length: int) -> Reply:
    """The reply to the prompt of a length, cold."""
    return cold(model_of(kind), name, ids(1, length, length), NEW)


def whole(tokens: int) -> int:
    """As many of so many tokens as are shared: compressed pages are shared whole."""
    return tokens if tokens < PAGE else tokens // PAGE * PAGE


@every_format
def test_found_in_the_cache_or_computed(name, kind, layout):
    model = model_of(kind)
    with make(model, name, layout=layout) as cache:
        for length in LENGTHS:
            for turn in range(2):
                reused, tokens = ask(cache, model, ids(1, length, length), NEW)
                assert reused == (whole(length - 1) if turn else 0)
                reply_to(name, kind, length).check(tokens)
        assert cache.stats().used == 0


@every_format
def test_the_next_turn_of_a_chat_is_what_it_is_cold(name, kind, layout):
    model = model_of(kind)
    first = ids(1, 77, 77)
    with make(model, name, layout=layout) as cache:
        _, tokens = ask(cache, model, first, NEW)
        prompt = torch.cat([first, torch.tensor([tokens]), ids(1, 9, 3)], dim=1)
        reused, tokens = ask(cache, model, prompt, NEW)
        assert reused >= whole(77 + NEW - 1)
    cold(model, name, prompt, NEW, layout=layout).check(tokens)


@every_format
@pytest.mark.parametrize("chunk", [7, 33])
def test_prompts_in_chunks(name, kind, layout, chunk):
    model = model_of(kind)
    with make(model, name, layout=layout) as cache:
        _, tokens = ask(cache, model, ids(1, 77, 77), NEW, prefill_chunk_size=chunk)
    reply_to(name, kind, 77).check(tokens)


@every_format
def test_padded_rows_together(name, kind, layout):
    model, width = model_of(kind), max(LENGTHS)
    prompts = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    mask = torch.zeros_like(prompts)
    for row, length in enumerate(LENGTHS):
        prompts[row, width - length :] = ids(1, length, length)
        mask[row, width - length :] = 1
    with make(model, name, layout=layout) as cache:
        for turn in range(2):  # found, rows go on from unlike places of their pages: some owe
            with cache.session(prompts, mask) as past:
                assert (past.reused > 0) == turn
                out = generate(model, past, prompts, attention_mask=mask, max_new_tokens=NEW)
                cache.check_integrity()
            for row, length in zip(out, LENGTHS, strict=True):
                reply_to(name, kind, length).check(row[width:].tolist())


@every_format
def test_a_rewind_into_a_compressed_page(name, kind, layout):
    model, prompt = model_of(kind), ids(1, 77, 77)
    with make(model, name, layout=layout) as cache, cache.session(prompt) as past:
        first = replied(model, past, prompt, NEW)
        both = torch.cat([prompt, torch.tensor([first.tokens])], dim=1)
        assert past.columns == 77 + NEW - 1
        for columns in (90, 84, 82):  # into the page that ends at 96, of what is owed, one more
            past.rewind(columns)
            assert past.batch.lengths.tolist() == [columns // PAGE * PAGE]
            known = past.tokens(0)
            assert known is not None
            assert known.tolist() == both[0, : past.columns].tolist()
            cache.check_integrity()
        again = replied(model, past, both[:, :83], NEW - 6)
        sure = max(first.certain - 6, 0)
        assert again.tokens[:sure] == first.tokens[6:][:sure]
        if kind == "llama":  # windows do not see so far back
            past.rewind(77 - 20)
            assert past.batch.lengths.tolist() == [48]
            first.check(replied(model, past, prompt, NEW).tokens)
        cache.check_integrity()


@every_format
def test_beams_and_guesses(name, kind, layout):
    """Beams are the same cold, found and in chunks; guessed tokens change nothing."""
    model, prompt = model_of(kind), ids(1, 51, 51)
    with make(model, name, layout=layout) as cache:
        beams = [
            ask(cache, model, prompt, NEW, num_beams=3, **options)
            for options in ({}, {}, {"prefill_chunk_size": 11})
        ]
        assert [reused for reused, _ in beams] == [0, 48, 48]
        assert beams[0][1] == beams[1][1] == beams[2][1]
        repeats = torch.cat([prompt] * 2, dim=1)
        reply = cold(model, name, repeats, NEW)
        for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": guesser(kind)}):
            cache.clear()
            for _ in range(2):
                reply.check(ask(cache, model, repeats, NEW, **options)[1])


@every_format
def test_guesses_that_were_wrong_over_the_end_of_a_page(name, kind, layout):
    """Taken back, they leave the row within a page that is compressed by now, and windows have to
    have what that page sees.
    """
    model = model_of(kind)
    with make(model, name, layout=layout) as cache:
        for length in (60, 66, 78):
            half = ids(1, length // 2, length)
            prompt = torch.cat([half, half], dim=1)
            reply = cold(model, name, prompt, NEW, sure=0)
            reply.check(ask(cache, model, prompt, NEW, prompt_lookup_num_tokens=10)[1])


@functools.cache
def guesser(kind: str) -> Any:
    """A model that guesses some tokens of the other: the same, a little off."""
    model = MODELS[kind]()
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights), alpha=0.01)
    return model


@pytest.mark.parametrize("name", FORMATS)
def test_logits_of_one_pass_of_several_and_after_a_crop(name):
    model, prompt = model_of("llama"), ids(2, 70)
    with make(model, name) as cache, torch.no_grad():
        with cache.session(prompt, private=True) as past:
            expected = model(prompt, past_key_values=past).logits
        with cache.session(prompt, private=True) as past:
            parts = [
                model(prompt[:, a:b], past_key_values=past).logits
                for a, b in ((0, 5), (5, 31), (31, 32), (32, 64), (64, 70))
            ]
            torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=2e-2)
            past.crop(-30)
            assert past.batch.lengths.tolist() == [32, 32]
            again = model(prompt[:, 40:], past_key_values=past).logits
            torch.testing.assert_close(again, expected[:, 40:], rtol=0, atol=2e-2)
            cache.check_integrity()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_through_tiers_and_a_restart(name, kind, tmp_path, monkeypatch):
    """Evicted pages come back from host memory; another process finds those on the disk; another
    format finds nothing.
    """
    model, prompt, reply = model_of(kind), ids(1, 77, 77), reply_to(name, kind, 77)

    def opened(form: str, layout: Layout) -> Any:
        tiers = [HostTier("8MiB", pin=False), DiskTier(tmp_path, "32MiB")]
        cache = make(model, form, layout=layout, tiers=tiers)
        always_loads(cache, monkeypatch)
        return cache

    with opened(name, "page-major") as cache:
        reply.check(ask(cache, model, prompt, NEW)[1])
        assert cache.flush(20)
        cache.clear()
        reused, tokens = ask(cache, model, prompt, NEW)
        assert reused == whole(76)
        reply.check(tokens)
        assert cache.flush(20)
    with opened(name, "layer-major") as cache:
        reused, tokens = ask(cache, model, prompt, NEW)
        assert reused == whole(76), "pages are the same bytes in both layouts"
        reply.check(tokens)
    others = [form for form in FORMATS if form != name]
    with opened(others[0], "page-major") as cache:
        assert ask(cache, model, prompt, 2)[0] == 0


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_kernels_give_the_same_tokens(name):
    model = tiny()
    prompt = ids(1, 41, 41)
    reply = cold(model, name, prompt, 6)
    reply.check(cold(model, name, prompt, 6, backend="reference").tokens)
