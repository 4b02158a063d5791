"""Caches whose full pages are compressed, and replies of tiny models through them, as far as those
are certain.
"""

from typing import Any, NamedTuple

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from kvpaged import PagedKVCache, tune
from kvpaged.formats.kv import KVFormat
from tests.hf.tiny import generate, tiny

PAGE = 16
NOISE = 1e-3
"""The two best scores are so far apart where a token is certain: sums in another order move a
number over the border of two codes now and then.
"""
FORMATS: dict[str, str | KVFormat] = {
    "fp8": "fp8", "int8": "int8", "k8v4": "k8v4", "int4": "int4",
    "by layer": KVFormat(
        name="by layer", k="int4", v="int4", layers={0: ("int8", "exact"), 1: ("exact", "fp8")}
    ),
    "tuned": KVFormat(name="tuned", k="int4g16", v="int4"),  # with what a model's queries are like
}  # fmt: skip


def hybrid() -> Any:
    """A tiny model with windows in some layers, that does not repeat itself."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.3, eos_token_id=None, pad_token_id=0, bos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


MODELS = {"llama": tiny, "hybrid": hybrid}


class Reply(NamedTuple):
    """Tokens after a prompt, and how many of them, from the first on, are certain."""

    tokens: list[int]
    certain: int

    def check(self, tokens: list[int]) -> None:
        """Raise unless these are the same, as far as they are certain."""
        assert len(tokens) == len(self.tokens)
        assert tokens[: self.certain] == self.tokens[: self.certain]


def make(model: Any, kv_format: str, *, memory: str = "4MiB", **options: Any) -> PagedKVCache:
    """A cache of pages of 16 tokens."""
    given = FORMATS[kv_format]
    if kv_format == "tuned":
        text = torch.arange(200) * 37 % 101 + 5
        given = tune(model, [text.tolist()], kv_format=given, length=96)
    return PagedKVCache.for_model(model, memory, page_size=PAGE, kv_format=given, **options)


def replied(model: Any, past: Any, prompt: torch.Tensor, new: int, **options: Any) -> Reply:
    """The greedy reply to a prompt of one row."""
    out: Any = model.generate(
        prompt, past_key_values=past, do_sample=False, pad_token_id=0, eos_token_id=None,
        attention_mask=torch.ones_like(prompt), max_new_tokens=new, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    best = torch.stack(out.logits)[:, 0].topk(2).values
    close = (best[:, 0] - best[:, 1] < NOISE).tolist()
    certain = close.index(True) if True in close else len(close)
    return Reply(out.sequences[0, prompt.shape[1] :].tolist(), certain)


def cold(
    model: Any, kv_format: str, prompt: torch.Tensor, new: int = 24, *, sure: int = 6,
    **options: Any,
) -> Reply:  # fmt: skip
    """The reply to a prompt in a cache of its own, of which so many tokens are to be certain."""
    with make(model, kv_format, **options) as cache, cache.session(prompt) as past:
        reply = replied(model, past, prompt, new)
        cache.check_integrity()
    assert reply.certain >= sure, "too little of it is certain to compare anything"
    return reply


def ask(cache: PagedKVCache, model: Any, prompt: torch.Tensor, new: int, **options: Any) -> Any:
    """Columns found, and the tokens after a prompt."""
    with cache.session(prompt) as past:
        reused = past.reused
        out = generate(
            model, past, prompt, max_new_tokens=new, attention_mask=torch.ones_like(prompt),
            **options,
        )  # fmt: skip
        cache.check_integrity()
    return reused, out[0, prompt.shape[1] :].tolist()


def always_loads(cache: PagedKVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computing so small a model may be quicker, and then is chosen: it is never measured."""
    assert cache.mover is not None
    monkeypatch.setattr(cache.mover, "note_pass", lambda tokens, seconds: None)
