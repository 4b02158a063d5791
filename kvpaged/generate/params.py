"""What a request asks for, and what it gets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from kvpaged.errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]

LogitsProcessor = Callable[[Any, Any], Any]
"""As in transformers: ids int64 `[1, tokens]` and scores `[1, vocabulary]` to scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen, and when it ends.

    Attributes:
        max_new_tokens: the most tokens generated.
        temperature: 0: greedy, the token of the highest score. Above: scores are divided by it and
            a token is drawn from their softmax.
        top_k: draw from the `top_k` highest scores only; 0: all.
        top_p: draw from the fewest tokens whose probabilities (after `top_k`) reach it; 1: all.
        min_p: draw from tokens at least this fraction as probable as the most probable; 0: all.
        repetition_penalty: scores of tokens that the prompt or the reply has are divided by it if
            positive and multiplied if negative (Keskar et al., arXiv:1909.05858); 1: none.
        seed: of the random numbers. The i-th token of a request is drawn with a number that
            depends on the seed and i alone, whatever else is computed with it. `None`: one is
            chosen by the generator.
        stop: texts that end the reply, before which its text is cut (a tokenizer is needed).
        stop_token_ids: tokens that end the reply; the last token of it is one of them then.
        ignore_eos: go on after the model's end-of-sequence tokens.
        logprobs: `None`, or for each token its log-probability and those of that many most
            probable ones (0: its own only), of the model's scores as they are.
        n: how many replies; the prompt is computed once.
        logits_processors: called for each token, before temperature; the request is computed
            without lookahead.
        prompt_lookup: up to so many tokens are guessed each step from what followed the same words
            earlier in the request, and checked together (Saxena, "Prompt Lookup Decoding", 2023).
            The tokens are the same with it and without.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    logits_processors: tuple[LogitsProcessor, ...] = ()
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        for name, value, fits, range_ in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", self.top_k, 0 <= self.top_k < 2**31, f"in 0..{2**31 - 1}"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < np.inf,
             "above 0"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= 1000,
             "None or 0 to 1,000"),
            ("n", self.n, self.n >= 1, "1 or more"),
            ("prompt_lookup", self.prompt_lookup, 0 <= self.prompt_lookup <= 15, "0 to 15"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
        ):  # fmt: skip
            if not fits:
                raise ConfigError(f"{name} is {range_}, got {value!r}")
        if any(not 0 <= token < 2**31 for token in self.stop_token_ids):
            raise ConfigError(
                f"stop_token_ids are in 0..{2**31 - 1}, got {list(self.stop_token_ids)}"
            )
        if any(not text for text in self.stop):
            raise ConfigError("a stop text has at least one character")
        if self.prompt_lookup and (self.logits_processors or self.repetition_penalty != 1):
            raise ConfigError(
                "prompt_lookup can't be combined with logits_processors or a repetition_penalty: "
                "they follow the tokens one by one"
            )


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one place: of the token chosen, and of the most probable ones."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Completion:
    """One reply.

    Attributes:
        request: the number of its request, as submitted; of `generate()`, its place in the list.
        index: which of the request's `n` replies.
        tokens: generated ids, the stop token included.
        text: of those tokens, without special ones and up to a stop text; `None` without a
            tokenizer.
        finish_reason: `"stop"`, `"length"`, `"cancelled"`, `"deadline"`, or `"error"`.
        error: what went wrong, with `"error"`.
        prompt_tokens: of the prompt.
        cached_tokens: how many of those were in the cache already.
        first_token_s: seconds from submission to its first token; `None` without one.
        total_s: seconds from submission to its end.
        preemptions: how often it was set back because pages ran out.
        drafted, accepted: tokens guessed by prompt lookup, and how many of them were right.
        logprobs: one for each token, if asked for.
    """

    request: int
    index: int
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: FinishReason = "length"
    error: Exception | None = None
    cached_tokens: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    logprobs: list[TokenLogprobs] | None = None

    def raise_for_error(self) -> "Completion":
        """Raise what went wrong with this request, if anything did; else return it."""
        if self.error is not None:
            raise self.error
        return self


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """Something that happened to a reply.

    Attributes:
        request, index: see `Completion`.
        tokens: new ids.
        text: what can be shown of the reply by now and was not before: a character whose bytes are
            not all there, and what may become a stop text, come later.
        completion: the whole reply, with its last event; else `None`.
    """

    request: int
    index: int
    tokens: tuple[int, ...]
    text: str
    completion: Completion | None
