"""Prompts: token ids, text or messages, as ids that a model can take."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Embedding

from kvpaged.errors import UsageError
from kvpaged.generate.params import SamplingParams
from kvpaged.generate.requests import Ints

Prompt = str | Sequence[int] | Tensor | Sequence[Mapping[str, str]]
"""A prompt: text, token ids, or chat messages (`{"role": ..., "content": ...}`)."""


class Prompts:
    """Reads prompts for one model."""

    def __init__(
        self, tokenizer: Any, vocabulary: int, regimes: Any, positions: int | None = None
    ) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer, or `None`.
            vocabulary: token ids lie below it.
            positions: how many the model has learned embeddings of; `None`: any.
            regimes: `regime(length)`: what the model's positions are rotated by up to a length.
        """
        self.tokenizer = tokenizer
        self._vocabulary, self._regimes, self._positions = vocabulary, regimes, positions

    def ids(self, prompt: Prompt) -> Ints:
        """Token ids of a prompt.

        Raises:
            UsageError: it is no prompt, or needs a tokenizer.
        """
        if isinstance(prompt, Tensor):
            return prompt.detach().to("cpu", torch.int64).numpy()
        messages = not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping)
        if not isinstance(prompt, str) and not messages:
            return np.asarray(prompt)
        if self.tokenizer is None:
            raise UsageError("prompts of text need Generator(..., tokenizer=...)")
        if isinstance(prompt, str):
            return np.asarray(self.tokenizer(prompt)["input_ids"], np.int64)
        text = self.tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray(ids, np.int64)

    def check(self, ids: Ints, params: SamplingParams) -> None:
        """Raise `UsageError` unless these ids can be a prompt with these params."""
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise UsageError(
                f"a prompt is a flat, non-empty sequence of token ids, got shape {ids.shape} of "
                f"{ids.dtype}"
            )
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise UsageError(
                f"token ids lie in 0..{self._vocabulary - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}"
            )
        if params.stop and self.tokenizer is None:
            raise UsageError("stop texts need Generator(..., tokenizer=...)")
        if params.logprobs is not None and params.logprobs > self._vocabulary:
            raise UsageError(
                f"logprobs are of at most {self._vocabulary} tokens, got {params.logprobs}"
            )
        longest = len(ids) + params.max_new_tokens
        if self._positions is not None and longest - 1 > self._positions:
            raise UsageError(
                f"a prompt of {len(ids)} and {params.max_new_tokens} new tokens need "
                f"{longest - 1} positions, and the model knows {self._positions}"
            )
        regime = self._regimes.regime(longest)
        if regime is None or regime != self._regimes.regime(1):
            raise UsageError(
                f"a prompt of {len(ids)} and {params.max_new_tokens} new tokens reaches lengths at "
                "which the model's rotary embedding has other angles for all tokens of a pass: "
                "not served in a batch"
            )


def eos_of(model: Any) -> tuple[int, ...]:
    """The model's end-of-sequence tokens."""
    config = getattr(model, "generation_config", None) or model.config
    eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return (int(eos),) if isinstance(eos, int) else tuple(int(x) for x in eos)


def positions_of(model: Any) -> int | None:
    """How many positions the model has learned embeddings of; `None`: it has no such table."""
    sizes = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, Embedding) and ("position" in name or name.endswith("wpe"))
    ]
    return min(sizes, default=None)
