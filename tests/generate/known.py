"""Requests whose replies are known: each continued alone, in fp64, by the model itself.

A reply ends in the table where scores a little off would give another token: so whatever is served
of it has to be equal to the table, token for token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvpaged import Completion, OutOfPagesError, SamplingParams
from kvpaged.errors import UsageError
from kvpaged.generate.generator import REPLY_SEED
from kvpaged.generate.sampler import draw, uniforms

NOISE = 1e-3
"""Scores in fp32 are nearer than this to those in fp64: by a factor of a hundred."""

REPLIES = 3
"""Known for each way of choosing tokens, with seeds as of a request's `n`."""


def reverse(ids: Any, scores: Any) -> Any:
    """A logits processor: the least likely token."""
    return -scores


class BrokenProcessorError(Exception):
    """What a request's own processor fails by."""


class Letters:
    """A tokenizer: every id is one character."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(0x100 + token) for token in token_ids)


LETTERS = Letters()

WAYS = {
    "greedy": SamplingParams(),
    "penalised": SamplingParams(repetition_penalty=1.3),
    "penalised draws": SamplingParams(temperature=1.0, repetition_penalty=1.2, seed=13),
    "drawn": SamplingParams(temperature=1.0, seed=11),
    "filtered": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, seed=12),
    "processed": SamplingParams(logits_processors=(reverse,)),
}


class Entry(NamedTuple):
    """A prompt and its replies: for each way of choosing tokens, one for each seed."""

    prompt: list[int]
    replies: dict[str, list[list[int]]]


@dataclass
class Ask:
    """A request, and what has to come of it.

    Attributes:
        prompt, params: what is asked.
        wanted: tokens of each reply, if nobody ends it early.
        error: what it fails by then, or `None`.
        options: of the door: salt, priority, deadline.
    """

    prompt: list[int]
    params: SamplingParams
    wanted: list[list[int]]
    error: type[Exception] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, completion: Completion, *, cancelled: bool) -> None:
        """Raise unless a reply is one that this request may get."""
        wanted, tokens = self.wanted[completion.index], completion.tokens
        text = LETTERS.decode(tokens)
        reason = completion.finish_reason
        facts = f"{self}, which was cancelled: {cancelled}, got {completion}"
        assert completion.prompt_tokens == len(self.prompt), facts
        if reason in ("cancelled", "deadline"):
            asked = cancelled if reason == "cancelled" else "deadline_s" in self.options
            assert asked, facts
            assert tokens == wanted[: len(tokens)], facts
            assert self.error or len(tokens) < len(wanted), facts
            return
        assert tokens == wanted, facts
        if self.error is not None:
            assert isinstance(completion.error, self.error), facts
            assert reason == "error", facts
            return
        stop = [each for each in self.params.stop if text.endswith(each)]
        stopped = bool(stop) or (bool(tokens) and tokens[-1] in self.params.stop_token_ids)
        assert reason == ("stop" if stopped else "length"), facts
        assert completion.text == text[: len(text) - max(map(len, stop), default=0)], facts
        assert completion.error is None, facts
        assert (completion.first_token_s or 0.0) > 0, facts
        logprobs = completion.logprobs
        assert (logprobs is None) == (self.params.logprobs is None), facts
        assert logprobs is None or len(logprobs) == len(tokens), facts


class Known:
    """A table of prompts and their replies, and requests drawn from it."""

    def __init__(self, model: Any, prompts: Sequence[list[int]], new: int) -> None:
        """
        Args:
            model: in fp32.
            prompts: token ids of each.
            new: tokens of each reply.
        """
        double = type(model)(model.config).double().eval()
        double.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
        entries = [Entry(prompt, _continued(double, prompt, new)) for prompt in prompts]
        self.entries = [e for e in entries if all(all(replies) for replies in e.replies.values())]

    def ask(self, rng: random.Random, pool_tokens: int | None) -> Ask:
        """A request with options of all kinds.

        Args:
            rng: what it is drawn by.
            pool_tokens: that the whole pool holds: what is longer can't be served. `None`: anything
                can.
        """
        kind = rng.random()
        if kind < 0.01 and pool_tokens is not None:
            ask = Ask([5] * (pool_tokens + 8), SamplingParams(), [[]], OutOfPagesError)
        elif kind < 0.03:
            ask = Ask(rng.choice([[], [4, -1], [10_000]]), SamplingParams(), [[]], UsageError)
        elif kind < 0.07:
            ask = self._broken(rng)
        else:
            ask = self._plain(rng)
        ask.options = {
            "salt": rng.choice([None, None, "a", "b"]),
            "priority": rng.choice([0, 0, 1]),
        }
        if rng.random() < 0.06:
            ask.options["deadline_s"] = rng.choice([0.0, 0.003, 0.02])
        return ask

    def _plain(self, rng: random.Random) -> Ask:
        entry = rng.choice(self.entries)
        way = rng.choice(["greedy", "greedy", *WAYS])
        n = rng.choice([1, 1, 1, 2, REPLIES])
        replies = entry.replies[way][:n]
        new = rng.randint(1, min(map(len, replies)))
        options: dict[str, Any] = {"max_new_tokens": new, "n": n}
        if rng.random() < 0.2:
            options["stop_token_ids"] = (rng.choice(replies[0]), 3)
        if rng.random() < 0.2:
            start = rng.randrange(len(replies[0]))
            options["stop"] = (LETTERS.decode(replies[0][start : start + rng.randint(1, 2)]),)
        if rng.random() < 0.3 and way != "processed" and "penalised" not in way:
            options["prompt_lookup"] = rng.choice([1, 4])
        if rng.random() < 0.1:
            options["logprobs"] = rng.choice([0, 2])
        params = SamplingParams(**{**_fields(WAYS[way]), **options})
        wanted = [_cut(reply[:new], params) for reply in replies]
        return Ask(entry.prompt, params, wanted)

    def _broken(self, rng: random.Random) -> Ask:
        """A request whose processor fails at some token."""
        entry = rng.choice(self.entries)
        reply = entry.replies["greedy"][0]
        good = rng.randrange(len(reply))
        most = len(entry.prompt) + good

        def fail(ids: Any, scores: Any) -> Any:
            if ids.shape[1] >= most:
                raise BrokenProcessorError(f"token {good}")
            return scores

        params = SamplingParams(max_new_tokens=good + rng.randint(1, 4), logits_processors=(fail,))
        return Ask(entry.prompt, params, [reply[:good]], BrokenProcessorError)


def prompts_of(count: int, seed: int, longest: int) -> list[list[int]]:
    """Prompts of which most begin as others do, and some repeat themselves."""
    rng = random.Random(seed)
    trunks = [[rng.randrange(2, 128) for _ in range(longest - 12)] for _ in range(3)]
    found = []
    for number in range(count):
        end = [rng.randrange(2, 128) for _ in range(rng.randint(1, 12))]
        begin = rng.choice(trunks)[: rng.randint(8, longest - 12)] if number % 4 else end * 4
        found.append(begin + end)
    return found


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


def _cut(tokens: list[int], params: SamplingParams) -> list[int]:
    """As far as the first stop token or text, that included."""
    for end in range(1, len(tokens) + 1):
        text = LETTERS.decode(tokens[:end])
        if tokens[end - 1] in params.stop_token_ids or any(map(text.endswith, params.stop)):
            return tokens[:end]
    return tokens


@torch.inference_mode()
def _continued(double: Any, prompt: list[int], new: int) -> dict[str, list[list[int]]]:
    """Replies to a prompt by all ways and seeds at once, each as far as it is certain."""
    rows = [(way, index) for way in WAYS for index in range(REPLIES)]
    replies: dict[tuple[str, int], list[int]] = {row: [] for row in rows}
    certain = torch.ones(len(rows), dtype=torch.bool)
    past, given = DynamicCache(config=double.config), torch.tensor([prompt] * len(rows))
    noise = torch.Generator().manual_seed(0)
    penalty = torch.tensor([[WAYS[way].repetition_penalty] for way, _ in rows]).double()
    seen = torch.zeros((len(rows), double.config.vocab_size), dtype=torch.bool)
    for place in range(new):
        scores = double(given, past_key_values=past).logits[:, -1]
        seen[torch.arange(len(rows))[:, None], given] = True
        scores = torch.where(
            seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores
        )
        tokens = _choose(rows, scores, place)
        for _ in range(3):
            off = torch.rand(scores.shape, generator=noise) * 2 * NOISE - NOISE
            certain &= tokens == _choose(rows, scores + off, place)
        for row, token, sure in zip(rows, tokens.tolist(), certain.tolist(), strict=True):
            if sure:
                replies[row].append(token)
        given = tokens[:, None]
    return {way: [replies[way, index] for index in range(REPLIES)] for way in WAYS}


def _choose(rows: list[tuple[str, int]], scores: Tensor, place: int) -> Tensor:
    params = [WAYS[way] for way, _ in rows]
    seeds = [(p.seed or 0) + index * REPLY_SEED for p, (_, index) in zip(params, rows, strict=True)]
    uniform = uniforms(
        np.array([seed % 2**64 for seed in seeds], np.uint64), np.full(len(rows), place)
    )
    sign = torch.tensor([-1.0 if p.logits_processors else 1.0 for p in params])
    return draw(
        scores.float() * sign[:, None],
        temperature=torch.tensor([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in params]),
        min_p=torch.tensor([p.min_p for p in params]),
        uniform=torch.from_numpy(uniform),
        filters=True,
        most=0,
    )
