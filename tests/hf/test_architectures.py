"""Architectures of transformers, tiny and random: what they cache is served, or refused by name."""

from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvpaged import PagedKVCache
from kvpaged.errors import UnsupportedModelError

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip

SERVED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 20},
    "Phi3": {"rope_scaling": None},
    "Olmo2": {},
    "Gemma2": {"sliding_window": 20, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "Gemma3Text": {"sliding_window": 20},
    "GptOss": {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256},
}


def build(name: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(COMMON | changes))
    heads = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    return getattr(transformers, heads.get(name, f"{name}ForCausalLM"))(config).float().eval()


@pytest.mark.parametrize("name", SERVED)
def test_tokens_of_an_architecture(name):
    """Greedy tokens of a padded batch, past the windows, and the same logits of the prompt."""
    model = build(name, SERVED[name])
    prompt = torch.randint(2, 96, (3, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[0, :9], mask[2, :25] = 0, 0
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    with PagedKVCache.for_model(model, "8MiB", page_size=16) as cache:
        windows = {group.window for group in cache.groups}
        assert windows >= ({20} if "sliding_window" in SERVED[name] else {None})
        with cache.session(prompt, mask) as past, torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs = {"input_ids": prompt, "attention_mask": mask, "position_ids": positions}
            ours = model(**inputs, past_key_values=past).logits
            theirs = model(**inputs, past_key_values=DynamicCache(config=model.config)).logits
            seen = mask.bool()
            torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-3, atol=1e-4)
        with cache.session(prompt, mask) as past:
            tokens = model.generate(prompt, attention_mask=mask, past_key_values=past, **options)
            cache.check_integrity()
        expected = model.generate(prompt, attention_mask=mask, **options)
    assert torch.equal(tokens, expected)


def test_latent_attention_is_refused_by_name():
    model = build(
        "DeepseekV3",
        {
            "num_key_value_heads": 4, "head_dim": 8, "qk_rope_head_dim": 8,
            "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1,
            "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
            "first_k_dense_replace": 4,
        },
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 1, 2, 3\] cache does not feed"):
        PagedKVCache.for_model(model, "8MiB")
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_hooks


def test_encoder_decoders_are_refused_by_name():
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-dec"):
        PagedKVCache.for_model(model, "1MiB")
