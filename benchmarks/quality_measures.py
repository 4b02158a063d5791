"""What a cache does to a model's predictions: on windows of text, for needles, in long replies.

Everything is teacher-forced and takes what any cache takes: tokens in passes, logits out.
"""

import math
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpaged.likeness import Likeness, likeness, mean

PREFILL, SCORED, CHUNK = 1024, 256, 64
"""Tokens of a window that go in at once; those that are scored; how many of them go in at once."""

Past = Any
"""A `transformers.Cache`."""


def text_of_topics() -> str:
    """The text of every quality run: the standard library's own documentation."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(ids: Sequence[int], count: int, length: int) -> Tensor:
    """`count` windows of `length` tokens, evenly spaced over a text: int64 `[count, length]`.

    Raises:
        ValueError: the text is shorter than one.
    """
    last = len(ids) - length
    if last < 0:
        raise ValueError(f"a window has {length} tokens, the text {len(ids)}")
    starts = [round(n * last / max(count - 1, 1)) for n in range(count)]
    return torch.tensor([list(ids[start : start + length]) for start in starts])


@torch.inference_mode()
def logits_of(model: Any, past: Past, rows: Tensor, *, prefill: int = PREFILL) -> list[Tensor]:
    """Logits at the positions behind the prefill, `CHUNK` of them a tensor, `[rows, CHUNK, vocab]`.

    Args:
        model: a transformers causal LM.
        past: a cache that has nothing of these rows.
        rows: int64 `[rows, tokens]`: all but the last go in, the first `prefill` at once.
        prefill: how many.
    """
    model(rows[:, :prefill], past_key_values=past, logits_to_keep=1)
    stop = rows.shape[1] - 1
    return [
        model(rows[:, at : min(at + CHUNK, stop)], past_key_values=past).logits
        for at in range(prefill, stop, CHUNK)
    ]


def compare(exact: Sequence[Tensor], found: Sequence[Tensor], rows: Tensor) -> list[Likeness]:
    """What each row's logits are beside the exact ones, both as `logits_of` gives them."""
    totals = torch.zeros(len(rows), 3, dtype=torch.float64)
    count = sum(chunk.shape[1] for chunk in exact)
    at = rows.shape[1] - count
    for theirs, ours in zip(exact, found, strict=True):
        tokens = ours.shape[1]
        for row in range(len(rows)):  # one at a time: a vocabulary is a quarter of a million
            each = likeness(theirs[row], ours[row], rows[row, at : at + tokens])
            totals[row] += tokens / count * torch.tensor(each, dtype=torch.float64)
        at += tokens
    return [Likeness(*each) for each in totals.tolist()]


def summarise(exact: Sequence[Likeness], found: Sequence[Likeness]) -> dict[str, float]:
    """Of all windows of one cache and of the exact one: perplexity, its change in per cent by the
    paired differences, KL and agreement, each with the standard error over windows.
    """
    nll, _ = mean([each.nll for each in found])
    change, change_error = mean([f.nll - e.nll for e, f in zip(exact, found, strict=True)])
    kl, kl_error = mean([each.kl for each in found])
    agree, agree_error = mean([each.agree for each in found])
    ratio = math.exp(change)
    return {
        "perplexity": math.exp(nll),
        "change_percent": 100 * (ratio - 1), "change_error": 100 * ratio * change_error,
        "kl": kl, "kl_error": kl_error, "agree": agree, "agree_error": agree_error,
    }  # fmt: skip


# -- needles ---------------------------------------------------------------------------------------

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
SECRETS = ("7391", "2846", "5073")
NEEDLE = "The secret number of the blue box is {}."
QUESTION = "\n\nThe secret number of the blue box is"
ANSWER = 6
"""Tokens of a reply: models write each digit as a token, some the blank before them too."""


class Needle(NamedTuple):
    """A prompt with a number hidden in it, and asked for at its end."""

    ids: list[int]
    secret: str


def needles(tokenizer: Any, ids: Sequence[int], *, tokens: int, count: int) -> list[Needle]:
    """`count` prompts of `tokens` tokens each: a stretch of the text, a needle at some depth of it,
    the question.
    """
    ask = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    made = []
    for number in range(count):
        secret = SECRETS[number // len(DEPTHS) % len(SECRETS)]
        said = f"\n\n{NEEDLE.format(secret)}\n\n"
        needle = tokenizer(said, add_special_tokens=False)["input_ids"]
        room = tokens - len(needle) - len(ask)
        start = number * (len(ids) - room) // count
        stretch = list(ids[start : start + room])
        at = round(DEPTHS[number % len(DEPTHS)] * room)
        made.append(Needle([*stretch[:at], *needle, *stretch[at:], *ask], secret))
    return made


@torch.inference_mode()
def answers(model: Any, past: Past, prompts: Tensor, count: int = ANSWER) -> Tensor:
    """Greedy replies of `count` tokens, `[rows, count]`, to `[rows, tokens]` prompts."""
    fed, made = prompts, []
    for _ in range(count):
        fed = model(fed, past_key_values=past, logits_to_keep=1).logits[:, -1:].argmax(-1)
        made.append(fed)
    return torch.cat(made, 1)


def is_hit(tokenizer: Any, reply: Tensor, secret: str) -> bool:
    """Whether a reply begins with the number."""
    text: str = tokenizer.decode(reply.tolist())
    return text.strip().startswith(secret)


# -- long greedy replies ---------------------------------------------------------------------------


@torch.inference_mode()
def diverges(model: Any, past: Past, prompts: Tensor, reply: Tensor) -> list[int | None]:
    """Where greedy replies first differ from the exact model's, `reply` `[rows, tokens]`; `None`:
    nowhere.

    Up to there both have the same tokens, so a reply's next token is what is most likely after the
    exact reply so far: that goes in `CHUNK` tokens at a time, and pages (and the residuals of
    QuantizedCache, whose length is a multiple of `CHUNK`) are coded where they are in decode.
    """
    first = model(prompts, past_key_values=past, logits_to_keep=1).logits.argmax(-1)
    likely = [first]
    for at in range(0, reply.shape[1] - 1, CHUNK):
        fed = reply[:, at : min(at + CHUNK, reply.shape[1] - 1)]
        likely.append(model(fed, past_key_values=past).logits.argmax(-1))
        wrong = (torch.cat(likely, 1) != reply[:, : at + 1 + fed.shape[1]]).any(1)
        if wrong.all():
            break
    found = torch.cat(likely, 1)
    places: list[int | None] = []
    for row, wanted in zip(found, reply, strict=True):
        wrong = (row != wanted[: len(row)]).nonzero()
        places.append(int(wrong[0, 0]) if len(wrong) else None)
    return places


@torch.inference_mode()
def greedy(model: Any, past: Past, prompts: Tensor, count: int) -> Tensor:
    """Greedy replies, a token at a time, whatever ends a text: `[rows, count]`."""
    return answers(model, past, prompts, count)
