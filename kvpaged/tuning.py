"""Formats that know a model's queries.

Keys of 4 bits are coded better where it is known what queries of a layer are like: their errors are
then made to cancel for such queries, at the same size and the same speed of attention. What queries
are like is the model's: it differs little between one text and another, so that some hundred tokens
of any will do.
"""

from dataclasses import replace
from typing import Any

import torch

from kvpaged.errors import ConfigError
from kvpaged.formats.kv import KVFormat, is_int4
from kvpaged.integrations.queries import observe_queries
from kvpaged.texts import Texts, ids_of, windows_of


def tune(
    model: Any,
    texts: Texts,
    *,
    kv_format: str | KVFormat = "int4",
    tokenizer: Any = None,
    windows: int = 2,
    length: int = 1024,
) -> KVFormat:
    """A format with what a model's queries are like, to be given to `for_model(kv_format=...)`;
    `to_json` saves it. It is called what it was, and "-tuned".

    Only keys of 4 bits gain by it. A pass over each window is made: seconds on a CPU. Pages are
    shared, and found again in tiers, under the same numbers only: keep the result, for another
    machine may round to others.

    Args:
        model: a `transformers` causal LM, in eval mode, that `for_model` serves.
        texts: what it is observed on, best of the kind it is for: strings, with a `tokenizer`, or
            token ids.
        kv_format: the format, with which keys of some layers are coded in 4 bits.
        tokenizer: makes token ids of strings.
        windows: passes.
        length: tokens of a pass. Queries turn with their place, so windows as long as what the
            model will be asked are best, though what has turned is only lost, not made worse.

    Raises:
        ConfigError: `kv_format` has no keys of 4 bits, or layers that the model lacks, or an
            argument is impossible.
        UsageError: the texts are too short, or are strings and there is no tokenizer; queries are
            not finite.
        UnsupportedModelError: see `for_model`.
    """
    given = KVFormat.of(kv_format, {getattr(model, "dtype", torch.float32)})
    if not any(map(is_int4, (given.k, *(k for k, _ in given.layers.values())))):
        raise ConfigError(f"a format without keys of 4 bits is not tuned: got {given}")
    if not (isinstance(windows, int) and isinstance(length, int) and windows > 0 and length >= 64):
        raise ConfigError(f"1 window and 64 tokens are the least, got {windows} and {length}")
    rows = windows_of(ids_of(texts, tokenizer), windows, length)
    observed = observe_queries(model, rows[:, :-1])
    given.check_layers(observed)
    return replace(given, name=f"{given.name}-tuned").with_queries(
        {n: like for n, like in observed.items() if is_int4(given.codes(n)[0])}
    )
