"""Requests for a tiny model, and what `generate()` replies to each alone."""

import random

import torch

from kvpaged import SamplingParams
from tests.hf.tiny import assert_same_tokens


def alone(model, prompt, new, **options):
    """What `generate()` gives for a prompt by itself."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def mixed(count, seed=0, longest=90, new=20):
    """Prompts of mixed lengths, some of them beginning as others do."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    news: list[int] = []
    for _ in range(count):
        ids = [rng.randrange(2, 128) for _ in range(rng.randint(1, longest))]
        if prompts and rng.random() < 0.4:
            ids = rng.choice(prompts)[: rng.randint(1, longest)] + ids[: rng.randint(1, 20)]
        prompts.append(ids)
        news.append(rng.randint(1, new))
    return prompts, news


def params_of(news, **options):
    return [SamplingParams(max_new_tokens=new, **options) for new in news]


def assert_greedy(model, done, prompts, wanted):
    for completion, prompt, tokens in zip(done, prompts, wanted, strict=True):
        assert completion.error is None
        assert len(completion.tokens) == len(tokens)
        whole = torch.tensor([prompt + completion.tokens]), torch.tensor([prompt + tokens])
        assert_same_tokens(model, *whole, None)


def hybrid():
    """A tiny model with windows in some layers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.3, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def windowed():
    """A tiny model of nothing but windows."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=24,
        initializer_range=0.3, eos_token_id=None, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()
