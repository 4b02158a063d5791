"""Texts that a model is observed on: as token ids, and in windows."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvpaged.errors import UsageError

Texts = Sequence[str] | Sequence[Sequence[int]]
"""Strings, which need a tokenizer, or token ids."""


def ids_of(texts: Texts, tokenizer: Any) -> list[int]:
    """All tokens of some texts.

    Raises:
        UsageError: they are strings and there is no tokenizer, or not a sequence of texts.
    """
    ids: list[int] = []
    for text in [None] if isinstance(texts, str) else texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise UsageError("texts that are strings need a tokenizer")
            text = tokenizer(text, verbose=False)["input_ids"]
        if not isinstance(text, Iterable):
            raise UsageError(
                "texts are a sequence of strings, or of sequences of token ids; got "
                f"{type(texts).__name__} of {type(texts[0]).__name__}"
            )
        ids += [int(token) for token in text]
    return ids


def windows_of(ids: Sequence[int], count: int, length: int) -> Tensor:
    """`count` windows of `length` tokens and the next, evenly spaced: int64.

    Raises:
        UsageError: there are not so many tokens.
    """
    need = count * (length + 1)
    if len(ids) < need:
        raise UsageError(
            f"{count} windows of {length} tokens need {need} tokens of text, there are {len(ids)}"
        )
    starts = [n * (len(ids) - length - 1) // max(count - 1, 1) for n in range(count)]
    return torch.tensor([list(ids[start : start + length + 1]) for start in starts])
