"""Prompts: token ids, text or messages, as ids that a model can take."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import UsageError
from kvpaged.generate.params import SamplingParams
from kvpaged.generate.requests import Ints

Prompt = str | Sequence[int] | Tensor | Sequence[Mapping[str, str]]
"""A prompt: text, token ids, or chat messages (`{"role": ..., "content": ...}`)."""


class Prompts:
    """Reads prompts for one model."""

    def __init__(self, tokenizer: Any, vocabulary: int, regimes: Any) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer, or `None`.
            vocabulary: token ids lie below it.
            regimes: `regime(length)`: what the model's positions are rotated by up to a length.
        """
        self.tokenizer = tokenizer
        self._vocabulary, self._regimes = vocabulary, regimes

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
        longest = len(ids) + params.max_new_tokens
        regime = self._regimes.regime(longest)
        if regime is None or regime != self._regimes.regime(1):
            raise UsageError(
                f"a prompt of {len(ids)} and {params.max_new_tokens} new tokens reaches lengths at "
                "which the model's rotary embedding has other angles for all tokens of a pass: "
                "not served in a batch"
            )
