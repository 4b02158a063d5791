"""A tiny model, and generation through a session beside DynamicCache."""

from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvpaged import PagedKVCache

TIE = 1e-4
"""Gap of the two best logits, in fp64, under which another token is a tie and not a fault."""


def tiny(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers with random weights: for what does not depend on a trained model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **(
            {
                "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None,
                "pad_token_id": 0, "initializer_range": 0.3,
            } | changes
        )
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 128, (rows, columns), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, past: Any, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    out = model.generate(
        input_ids, past_key_values=past, do_sample=False, pad_token_id=0, eos_token_id=None,
        **options,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


def beside_dynamic(
    cache: PagedKVCache, model: Any, input_ids: torch.Tensor, mask: Any = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same generation through a session and through DynamicCache."""
    if mask is not None:
        options["attention_mask"] = mask
    with cache.session(input_ids, mask) as past:
        ours = generate(model, past, input_ids, **options)
        cache.check_integrity()
    theirs = generate(model, DynamicCache(config=model.config), input_ids, **options)
    return ours, theirs


def assert_same_tokens(model: Any, ours: torch.Tensor, theirs: torch.Tensor, mask: Any) -> None:
    """Rows are equal up to a tie in fp64, whose gap is printed."""
    for row in range(len(ours)):
        differ = (ours[row] != theirs[row]).nonzero()
        if not len(differ):
            continue
        place = int(differ[0])
        pad = 0 if mask is None else int((mask[row] == 0).sum())
        double = type(model)(model.config).double().eval()
        double.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
        with torch.no_grad():
            logits = double(theirs[row : row + 1, pad:place]).logits[0, -1]
        best = logits.topk(2).values
        gap = float(best[0] - best[1])
        print(f"row {row}: a tie at token {place}, gap {gap:.2e} in fp64")
        assert gap < TIE, f"row {row}, token {place}: {ours[row, place]} and {theirs[row, place]}"
