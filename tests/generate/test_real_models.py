"""Greedy tokens of real models: 64 mixed requests, each as `generate()` gives it alone."""

import random
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from kvpaged import Generator, PagedKVCache, SamplingParams
from kvpaged.generate.text import Texts, TextTail
from kvpaged.testing import models
from tests.hf.tiny import assert_same_tokens


def requests(ids, count):
    """Prompts of 1 to 200 tokens of text, a third of them beginning as an earlier one does."""
    rng = random.Random(1)
    prompts: list[list[int]] = []
    for number in range(count):
        length = int(200 ** rng.random())
        start = rng.randrange(len(ids) - length)
        begin = rng.choice(prompts)[:100] if number % 3 == 2 else []
        prompts.append(begin + ids[start : start + length])
    return prompts, [rng.choice([1, 3, 8]) for _ in range(count)]


@pytest.mark.parametrize(("name", "count"), [("smollm2", 64), ("gemma3", 24)])
def test_many_requests_are_each_their_own(name, count):
    model, tokenizer = models.load(name)
    prompts, news = requests(tokenizer("\n".join(topics.values())[:100_000])["input_ids"], count)
    wanted = []
    with torch.no_grad():
        for prompt, new in zip(prompts, news, strict=True):
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
            wanted.append(out[0, len(prompt) :].tolist())
    page = model.config.num_hidden_layers * 2 * model.config.head_dim * 4 * 16
    page *= model.config.num_key_value_heads
    pools: list[tuple[int | str, dict[str, Any]]] = [
        ("256MiB", {}),
        (page * 40, {"chunk": 11, "max_running": 12, "pack_weights": True, "lookahead": True}),
    ]
    for memory, options in pools:
        with (
            PagedKVCache.for_model(model, memory, page_size=16) as cache,
            Generator(model, cache, **options) as generator,
        ):
            done = generator.generate(prompts, [SamplingParams(max_new_tokens=new) for new in news])
            cache.check_integrity()
            assert sum(c.cached_tokens for c in done) > 0
            for completion, prompt, tokens in zip(done, prompts, wanted, strict=True):
                assert completion.error is None
                ours, theirs = (torch.tensor([prompt + x]) for x in (completion.tokens, tokens))
                assert_same_tokens(model, ours, theirs, None)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_text_told_token_by_token_is_the_text_of_all(name, request):
    _, tokenizer = request.getfixturevalue(name)
    rng = random.Random(1)
    text = "A quick brown fox's tale: 1,234.5 <b>ünïcödé</b> 漢字\t\n  emoji 🙂🏽 end"
    ids = tokenizer(text)["input_ids"]
    texts = Texts(tokenizer)
    assert texts.pieces is not None
    orders = [ids, rng.sample(ids, len(ids)), [rng.randrange(2000) for _ in range(200)]]
    orders += [[rng.randrange(len(tokenizer)) for _ in range(60)] for _ in range(20)]
    for order in orders:
        tail = TextTail(texts, ())
        shown = [tail.add([token]) for token in order]
        shown.append(tail.end())
        assert "".join(shown) == tail.text == tokenizer.decode(order, skip_special_tokens=True)


def test_text_is_put_together_from_bytes_where_tokens_cut_characters(smollm2):
    _, tokenizer = smollm2
    bytes_of = [tokenizer.convert_tokens_to_ids(x) for x in "ðŁĻĤé"]  # 🙂 in bytes, and a half
    assert all(isinstance(token, int) for token in bytes_of)
    tail = TextTail(Texts(tokenizer), ("\N{SLIGHTLY SMILING FACE}!",))
    shown = [tail.add([token]) for token in bytes_of]
    assert shown == ["", "", "", "", ""]  # the face may become a stop text
    assert tail.end() == tail.text == tokenizer.decode(bytes_of)
