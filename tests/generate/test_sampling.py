"""Drawing tokens: against transformers' own processors, and by numbers of each request's own."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvpaged.errors import ConfigError
from kvpaged.generate import sampler
from kvpaged.generate.lookup import guess
from kvpaged.generate.params import SamplingParams
from kvpaged.generate.text import Texts, TextTail

WIDTH = 3000


def draw(scores, uniform, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    rows = len(scores)
    full = lambda x: torch.full((rows,), x, dtype=torch.float32)  # noqa: E731
    return sampler.draw(
        scores, temperature=full(temperature), top_k=torch.full((rows,), top_k, dtype=torch.int32),
        top_p=full(top_p), min_p=full(min_p), uniform=uniform,
        filters=bool(top_k or top_p < 1 or min_p), most=top_k,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 3.0, "top_p": 0.95, "min_p": 0.001},
    ],
)
def test_drawn_tokens_are_those_transformers_would_draw_from(options):
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(1, WIDTH, generator=generator) * 3).repeat(4096, 1)
    uniform = (torch.arange(4096) + 0.5) / 4096
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    wanted = warpers(None, scores[:1].double()).softmax(-1)[0]
    drawn = draw(scores, uniform, **options)
    counts = torch.bincount(drawn, minlength=WIDTH) / 4096
    assert (counts - wanted).abs().max() < 1.01 / 4096  # a stratified draw is off by one at most
    assert not counts[wanted == 0].any()


def test_temperature_zero_is_the_highest_score_beside_rows_that_draw():
    scores = torch.randn(3, WIDTH)
    drawn = sampler.draw(
        scores, temperature=torch.tensor([0.0, 1.0, 0.0]), top_k=torch.zeros(3, dtype=torch.int32),
        top_p=torch.ones(3), min_p=torch.zeros(3), uniform=torch.full((3,), 0.5), filters=False,
        most=0,
    )  # fmt: skip
    assert drawn[0] == scores[0].argmax()
    assert drawn[2] == scores[2].argmax()


def test_a_number_close_to_one_draws_a_possible_token():
    scores = torch.full((1, WIDTH), -torch.inf)
    scores[0, 7] = 0.0
    assert draw(scores, torch.tensor([1 - 2**-24])).item() == 7
    assert draw(scores, torch.tensor([0.0]), top_p=0.5).item() == 7


def test_penalty_is_transformers():
    scores, ids = torch.randn(1, WIDTH), torch.tensor([[3, 5, 5, 9]])
    seen = torch.zeros(1, WIDTH, dtype=torch.bool)
    seen[0, ids[0]] = True
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    assert torch.equal(sampler.penalise(scores, seen, torch.tensor([1.3])), wanted)


def test_numbers_depend_on_seed_and_place_alone_and_are_even():
    seeds, places = np.arange(200, dtype=np.uint64), np.arange(500)
    grid = np.stack([sampler.uniforms(seeds, np.full(200, place)) for place in places])
    alone = sampler.uniforms(np.array([17], np.uint64), np.array([33]))
    assert alone[0] == grid[33, 17]
    assert grid.min() >= 0
    assert grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(grid[:, 0], grid[:, 1])[0, 1]) < 0.15
    assert len(np.unique(grid)) > 0.99 * grid.size


def test_guesses_follow_the_latest_earlier_run():
    ids = np.array([1, 2, 3, 4, 9, 2, 3, 7, 8, 1, 2, 3], np.int32)
    assert guess(ids, 3).tolist() == [4, 9, 2]  # after 1 2 3, not after the later 2 3
    assert guess(ids[1:], 2).tolist() == [7, 8]
    assert guess(np.array([1, 2, 3], np.int32), 4).tolist() == []
    assert guess(np.array([5, 5, 5, 5], np.int32), 4).tolist() == [5]


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, token_ids, *, skip_special_tokens):
        return bytes(token_ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("stop", [(), ("ö!",), ("xyz", "é")])
def test_text_comes_in_whole_characters_and_never_beyond_a_stop(stop):
    text = "aé€ xy ö? xö!rest"
    tail = TextTail(Texts(Bytes()), stop)
    shown = []
    for byte in text.encode():
        shown.append(tail.add([byte]))
        assert "\ufffd" not in shown[-1]
        if tail.stopped:
            break
    shown.append(tail.end())
    ends = [text.find(each) for each in stop if each in text]
    assert "".join(shown) == tail.text == text[: min(ends, default=len(text))]
    assert tail.stopped == bool(ends)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"n": 0}, {"max_new_tokens": 0}, {"stop": ("",)},
     {"prompt_lookup": 4, "repetition_penalty": 1.2}, {"seed": -1}],
)  # fmt: skip
def test_impossible_options_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[0]):
        SamplingParams(**wrong)
