"""Conversations whose keys and values are four times the pool, through `Generator`.

    working set   sixty conversations begin, then their further turns come in random order, a few at
                  a time: with a host and a disk tier, without tiers, and in a pool that holds all
    no hits       prompts that nothing is known of, written through to the disk as they come, beside
                  the same without tiers: what having tiers costs

    python -m benchmarks.tiers_working_set               # 3 and 5 rounds
    python -m benchmarks.tiers_working_set --quick       # tiny: does it run at all

SmolLM2-135M over English text, greedy, in the dtype that benchmarks.prefix takes. Each run has a
cache, a generator and an empty folder of its own, made and closed outside of the time; what is left
to write at the end is timed apart. A turn's prompt is all of its conversation, replies included.
Then the working set again, smaller, in fp32, in which all replies must be the same.
"""

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common
from benchmarks.prefix import Text
from benchmarks.systems import load_model
from benchmarks.tiers_common import page_bytes, publish_part
from benchmarks.tiers_worker import make_tiers
from kvpaged import Generator, PagedKVCache, SamplingParams
from kvpaged.bench.common import PAGE_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CASES = {"tiers": "host and disk", "none": "no tiers", "whole": "a pool that holds all"}
GOALS = {"working_set": 2.5, "no_hits": 0.97}
"""Tokens a second with tiers over without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much of everything.

    Attributes:
        conversations, turns: how many, and of each.
        history: tokens a conversation begins with, its own.
        user, reply: tokens of a turn that come from the user, and of the answer.
        width: requests at a time.
        share: how many times the pool the working set is.
        prompts, prompt: how many without hits, and tokens of each.
    """

    conversations: int = 60
    turns: int = 4
    history: int = 1200
    user: int = 60
    reply: int = 16
    width: int = 8
    share: int = 4
    prompts: int = 32
    prompt: int = 600

    @property
    def pages(self) -> int:
        """Of all conversations at their ends."""
        tokens = self.history + self.turns * (self.user + self.reply)
        return self.conversations * -(-tokens // PAGE_SIZE)

    @property
    def pool_pages(self) -> int:
        """Of the pool."""
        return self.pages // self.share


QUICK = Setting(
    conversations=8, turns=2, history=130, user=10, reply=3, width=2, prompts=4, prompt=130
)


@dataclass(frozen=True, slots=True)
class Played:
    """One run.

    Attributes:
        first_s: of the conversations' first turns, which nothing can be known of.
        later_s: of all turns after those.
        close_s: of closing the cache.
        asked, cached: prompt tokens of the later turns, and how many of them were found.
        replies: of each request in the order of the requests.
    """

    first_s: float
    later_s: float
    close_s: float
    asked: int
    cached: int
    replies: list[list[int]]

    @property
    def total_s(self) -> float:
        """From the first request to the last reply."""
        return self.first_s + self.later_s


def batches(order: Sequence[int], width: int) -> list[list[int]]:
    """Numbers in order, at most `width` at a time, no number twice at a time: one that is there
    already waits for the next batch, ahead of what comes after it.
    """
    waiting = list(order)
    made = []
    while waiting:
        batch: list[int] = []
        rest: list[int] = []
        for number in waiting:
            take = len(batch) < width and number not in batch
            (batch if take else rest).append(number)
        made.append(batch)
        waiting = rest
    return made


class Script:
    """What users say: the same in every run."""

    def __init__(self, setting: Setting) -> None:
        text = Text(0)
        count = setting.conversations
        self.histories = text.pieces(count, setting.history).tolist()
        self.says = [text.pieces(count, setting.user).tolist() for _ in range(setting.turns)]
        dice = random.Random(0)
        first = dice.sample(range(count), count)
        later = [number for number in range(count) for _ in range(1, setting.turns)]
        dice.shuffle(later)
        self.first = batches(first, setting.width)
        self.later = batches(later, setting.width)
        self.prompts = text.pieces(setting.prompts, setting.prompt).tolist()


def play(generator: Generator, script: Script, setting: Setting) -> Played:
    """All conversations to their ends; `close_s` is for the caller to fill in."""
    histories = [list(history) for history in script.histories]
    turns = [0] * setting.conversations
    params = SamplingParams(max_new_tokens=setting.reply, ignore_eos=True)
    replies: list[list[int]] = []
    asked = cached = 0

    def run(groups: Sequence[Sequence[int]]) -> float:
        nonlocal asked, cached
        asked = cached = 0
        start = common.clock()
        for group in groups:
            for number in group:
                histories[number] += script.says[turns[number]][number]
                turns[number] += 1
            for number, done in zip(
                group, generator.generate([histories[n] for n in group], params), strict=True
            ):
                done.raise_for_error()
                histories[number] += done.tokens
                replies.append(done.tokens)
                asked += done.prompt_tokens
                cached += done.cached_tokens
        return common.clock() - start

    first = run(script.first)
    later = run(script.later)
    return Played(first, later, 0.0, asked, cached, replies)


def answer(generator: Generator, script: Script, setting: Setting) -> Played:
    """Prompts nothing is known of, `width` at a time."""
    params = SamplingParams(max_new_tokens=setting.reply, ignore_eos=True)
    replies: list[list[int]] = []
    cached = 0
    start = common.clock()
    for at in range(0, len(script.prompts), setting.width):
        for done in generator.generate(script.prompts[at : at + setting.width], params):
            replies.append(done.raise_for_error().tokens)
            cached += done.cached_tokens
    first = common.clock() - start
    return Played(first, 0.0, 0.0, len(script.prompts) * setting.prompt, cached, replies)


Play = Callable[[Generator, Script, Setting], Played]


def run_case(
    case: str, model: "PreTrainedModel", script: Script, setting: Setting, played: Play
) -> Played:
    """One run over a cache of its own. The host tier is twice the pool, so that of a working set of
    four pools a part has to come from the disk.
    """
    pool = setting.pool_pages * page_bytes(model.dtype)
    memory = pool * (setting.share + 1) if case == "whole" else pool
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvpaged-tiers-"))
        tiers = make_tiers(2 * pool, folder) if case == "tiers" else []
        cache = PagedKVCache.for_model(model, memory, page_size=PAGE_SIZE, tiers=tiers)
        stack.callback(cache.close)
        with Generator(model, cache, max_batch_tokens=2048, pack_weights=True) as generator:
            generator.generate([script.prompts[-1][:8]], max_new_tokens=2)
            done = played(generator, script, setting)
        start = common.clock()
        cache.close()
        return replace(done, close_s=common.clock() - start)


def measure(
    model: "PreTrainedModel", setting: Setting, rounds: int, cases: Sequence[str], played: Play
) -> dict[str, list[Played]]:
    """Rounds of runs, all cases of a round in turn."""
    script = Script(setting)

    def tell(number: int, name: str, done: Played) -> None:
        print(
            f"{played.__name__}, round {number + 1}: {name:<6} {done.total_s:8.2f} s",
            file=sys.stderr,
        )

    return common.alternate(
        {name: partial(run_case, name, model, script, setting, played) for name in cases},
        rounds,
        done=tell,
    )


# -- the document ----------------------------------------------------------------------------------


def part_document(runs: Mapping[str, Sequence[Played]]) -> dict[str, Any]:
    """Of a part: each case's figures, and what the others take over it."""
    document: dict[str, Any] = {}
    totals = {name: [run.total_s for run in runs[name]] for name in runs}
    for name, rounds in runs.items():
        made = sum(len(reply) for reply in rounds[0].replies)
        pairs = [
            reply == other
            for run, none in zip(rounds, runs["none"], strict=True)
            for reply, other in zip(run.replies, none.replies, strict=True)
        ]
        document[name] = {
            "total_s": common.summary(totals[name]),
            "tokens_s": common.summary([made / run.total_s for run in rounds]),
            "later_s": common.summary([run.later_s for run in rounds]),
            "close_s": common.summary([run.close_s for run in rounds]),
            "found": rounds[-1].cached / rounds[-1].asked,
            "replies_as_none": sum(pairs) / len(pairs),
            "over_none": common.paired_ratio(totals["none"], totals[name]),
        }
        if rounds[0].later_s:
            document[name]["later_over_none"] = common.paired_ratio(
                [run.later_s for run in runs["none"]], [run.later_s for run in rounds]
            )
    return document


def report(document: Mapping[str, Any]) -> str:
    """The tables, and whether goals are held."""
    parts = []
    for part, title in (("working_set", "working set"), ("no_hits", "no hits")):
        rows = [
            [
                CASES[name],
                f"{entry['total_s']['median']:.1f}",
                f"{entry['tokens_s']['median']:.1f}",
                f"{entry['over_none']:.3f}x",
                f"{entry['later_over_none']:.3f}x" if "later_over_none" in entry else "",
                f"{entry['found']:.1%}",
                f"{entry['close_s']['median']:.2f}",
                f"{entry['replies_as_none']:.1%}",
            ]
            for name, entry in document[part].items()
        ]
        head = [title, "s", "tokens/s", "over no tiers", "later turns", "found", "close s", "equal"]
        ratio = document[part]["tiers"]["over_none"]
        held = "held" if ratio >= GOALS[part] else "MISSED"
        parts += [common.table(head, rows), f"goal of {GOALS[part]}x: {held}, {ratio:.3f}x"]
    same = all(document["exact_fp32"].values())
    parts.append(f"replies in fp32: {'the same in all cases' if same else 'NOT THE SAME'}")
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, end with one JSON document."""
    chosen = parse(arguments)
    setting = QUICK if chosen.quick else Setting()
    rounds = chosen.rounds or ((1, 1) if chosen.quick else (3, 5))
    where = common.environment()
    print(common.describe(where))
    print(ceiling(setting), flush=True)
    model = load_model(getattr(torch, chosen.dtype))
    runs = measure(model, setting, rounds[0], list(CASES), play)
    unique = measure(model, setting, rounds[1], ["tiers", "none"], answer)
    small = runs
    if chosen.dtype != "float32":
        small = measure(load_model(torch.float32), QUICK, 1, list(CASES), play)
    document = {
        "environment": where,
        "model": "SmolLM2-135M-Instruct",
        "dtype": chosen.dtype,
        "rounds": list(rounds),
        "page_size": PAGE_SIZE,
        "setting": {**asdict(setting), "pages": setting.pages, "pool_pages": setting.pool_pages},
        "working_set": part_document(runs),
        "no_hits": part_document(unique),
        "exact_fp32": {
            name: all(run.replies == small["none"][0].replies for run in each)
            for name, each in small.items()
        },
    }
    print(report(document))
    publish_part("working_set", document, chosen.out)


def ceiling(setting: Setting) -> str:
    """What is printed first: how many times fewer prompt tokens there are to compute where all that
    is in full pages is found; decoding is the same, so no ratio of times can reach it.
    """
    turn = setting.user + setting.reply
    lengths = [setting.history + setting.user + turn * i for i in range(setting.turns)]
    rests = [
        now - (before + setting.reply - 1) // PAGE_SIZE * PAGE_SIZE
        for before, now in itertools.pairwise(lengths)
    ]
    ratio = sum(lengths) / (lengths[0] + sum(rests))
    later = sum(lengths[1:]) / max(1, sum(rests))
    return (
        f"ceiling: {ratio:.1f}x fewer prompt tokens to compute ({later:.1f}x in later turns), "
        f"decoding aside; the case of a pool that holds all shows what is left of it"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers_working_set")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument(
        "--rounds", type=int, nargs=2, metavar=("WORKING_SET", "NO_HITS"), help="of each part"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if fast else "float32",
        help="%(default)s on this machine",
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
