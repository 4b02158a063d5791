"""What sharing a prefix saves: SmolLM2-135M over English text, greedy, beside what others do.

    first token   one request with a prefix that is there already, and with an empty cache
    shared        many requests that begin alike, as one batch; computing the prefix counts
    chat          turns, each with all of the conversation before it

    python -m benchmarks.prefix                                    # 5 rounds
    python -m benchmarks.prefix --vllm /path/to/its/bin/python     # and vLLM
    python -m benchmarks.prefix --quick                            # tiny: does it run at all

bf16 where the CPU multiplies it, else fp32, for all systems: bf16 products are many times slower
without instructions for them, which would hide everything else.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common
from benchmarks.prefix_report import report, report_ceiling
from benchmarks.prefix_systems import SYSTEMS, Served, System, Work, open_systems
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.testing import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much of everything, in tokens, rows and turns.

    Attributes:
        prefix, rest: tokens of a prompt that are shared, and its own.
        rows, new: requests that share the prefix; tokens generated after each.
        turns, user, reply: of a chat; tokens a turn that come from the user, and of the answer.
    """

    prefix: int = 2000
    rest: int = 32
    rows: int = 32
    new: int = 32
    turns: int = 6
    user: int = 60
    reply: int = 64

    @property
    def longest(self) -> int:
        """Tokens of the longest row at its end."""
        return max(self.prefix + self.rest + self.new, self.turns * (self.user + self.reply))

    @property
    def tokens(self) -> int:
        """Tokens of a row of the batch that have K and V at its end."""
        return self.prefix + self.rest + self.new - 1


QUICK = Setting(prefix=100, rest=8, rows=2, new=4, turns=2, user=10, reply=6)


class Text:
    """English tokens (the help texts of Python itself): one prefix, and any number of other pieces,
    each from where the last one ended.
    """

    def __init__(self, prefix: int) -> None:
        from pydoc_data.topics import topics

        _, tokenizer = models.load("smollm2")
        words = " ".join(topics.values())
        ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids[0]
        self._ids: torch.Tensor = ids
        self._at = prefix
        self.prefix = self._ids[None, :prefix]

    def pieces(self, rows: int, size: int) -> torch.Tensor:
        """`[rows, size]`, all new until the text begins again."""
        if self._at + rows * size > len(self._ids):
            self._at = self.prefix.shape[1]
        begin, self._at = self._at, self._at + rows * size
        return self._ids[begin : self._at].reshape(rows, size).clone()

    def prompts(self, rows: int, rest: int) -> torch.Tensor:
        """`[rows, prefix + rest]`: the prefix, and a piece after it."""
        return torch.cat([self.prefix.expand(rows, -1), self.pieces(rows, rest)], dim=1)


def products(model: "PreTrainedModel", tokens: int, scored: int, *, repeat: int) -> float:
    """Seconds of the matrix products of a pass of `tokens` tokens of which `scored` are scored."""
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings()
    inputs = {
        (linear.in_features, linear is head): torch.randn(
            scored if linear is head else tokens, linear.in_features, dtype=model.dtype
        )
        for linear in linears
    }

    def run() -> None:
        with torch.inference_mode():
            for linear in linears:
                linear(inputs[linear.in_features, linear is head])

    return common.seconds(run, repeat=repeat)


def ceiling(model: "PreTrainedModel", setting: Setting, *, repeat: int) -> dict[str, float]:
    """What no cache can beat: the matrix products alone, of each token once where it is shared."""
    timed = partial(products, model, repeat=repeat)
    whole = timed(setting.prefix + setting.rest, 1)
    rests = timed(setting.rows * setting.rest, setting.rows)
    step = timed(setting.rows, setting.rows)
    shared = timed(setting.prefix, 1) + rests + (setting.new - 1) * step
    return {
        "cold_s": whole,
        "warm_s": timed(setting.rest, 1),
        "shared_s": shared,
        "shared_tokens_s": setting.rows * setting.new / shared,
        "turn_s": timed(setting.user + 1, 1),  # a reply's last token is computed a turn later
    }


# -- measuring -------------------------------------------------------------------------------------


def cold(system: System, text: Text, setting: Setting) -> Served:
    """The first token of a prompt nothing is known of."""
    system.forget()
    return system.generate(text.prompts(1, setting.rest), 1)


def warm(system: System, text: Text, setting: Setting) -> Served:
    """The first token after a prefix that was computed before."""
    system.forget()
    system.prepare(text.prefix)
    return system.generate(text.prompts(1, setting.rest), 1)


@dataclass(frozen=True, slots=True)
class Shared:
    """A batch: seconds before it, in which the prefix was computed, and the batch."""

    prefix_s: float
    batch: Served

    @property
    def total_s(self) -> float:
        """From an empty cache to the last token."""
        return self.prefix_s + self.batch.total_s


def prefix_first(system: System, text: Text, prompts: torch.Tensor, new: int) -> Shared:
    """The prefix, then all rows at once; systems that share nothing have no use for the first."""
    system.forget()
    return Shared(
        system.prepare(text.prefix) if system.shares else 0.0, system.generate(prompts, new)
    )


def at_once(system: System, prompts: torch.Tensor, new: int) -> Shared:
    """All rows at once, on an empty cache."""
    system.forget()
    return Shared(0.0, system.generate(prompts, new))


def chat(system: System, says: Sequence[torch.Tensor], reply: int) -> list[Served]:
    """A conversation: the user says these, each `[1, tokens]`, and the model answers."""
    system.forget()
    history = says[0][:, :0]
    turns = []
    for words in says:
        history = torch.cat([history, words], dim=1)
        turns.append(system.converse(history, reply))
        history = torch.cat([history, turns[-1].tokens.to(history.dtype)], dim=1)
    return turns


@dataclass(frozen=True, slots=True)
class Measured:
    """All rounds: name of a case to its measurements."""

    first: dict[str, list[Served]]
    shared: dict[str, list[Shared]]
    chat: dict[str, list[list[Served]]]


def measure(
    systems: Mapping[str, System], text: Text, setting: Setting, rounds: tuple[int, int, int]
) -> Measured:
    """The three parts, `rounds` of each, all cases of a part in turn."""

    def tell(part: str) -> Any:
        def done(number: int, name: str, measured: Served | Shared | list[Served]) -> None:
            of = measured if isinstance(measured, list) else [measured]
            total = sum(one.total_s for one in of)
            print(f"{part}, round {number + 1}: {name:<16} {total:8.2f} s", file=sys.stderr)

        return done

    for system in systems.values():  # first calls: kernels chosen, memory mapped
        system.forget()
        for rows in (1, setting.rows):
            system.generate(text.pieces(rows, 16), 2)
    firsts = {f"{name} cold": partial(cold, s, text, setting) for name, s in systems.items()}
    for name, system in systems.items():
        if system.shares:
            firsts[f"{name} warm"] = partial(warm, system, text, setting)
    prompts = text.prompts(setting.rows, setting.rest)
    batches = {
        name: partial(prefix_first, system, text, prompts, setting.new)
        for name, system in systems.items()
    }
    for name, system in systems.items():
        if system.shares_within:
            batches[f"{name} at once"] = partial(at_once, system, prompts, setting.new)
    says = list(text.pieces(setting.turns, setting.user)[:, None])
    chats = {name: partial(chat, system, says, setting.reply) for name, system in systems.items()}
    return Measured(
        common.alternate(firsts, rounds[0], done=tell("first token")),
        common.alternate(batches, rounds[1], done=tell("shared")),
        common.alternate(chats, rounds[2], done=tell("chat")),
    )


# -- the document ----------------------------------------------------------------------------------


def first_document(runs: Mapping[str, list[Served]], systems: Mapping[str, System]) -> Any:
    """Time to first token, for each system cold and warm, and the ratio of the two."""
    document: dict[str, Any] = {}
    for name, system in systems.items():
        before = [run.first_s for run in runs[f"{name} cold"]]
        document[name] = {"cold_s": common.summary(before)}
        if system.shares:
            after = runs[f"{name} warm"]
            document[name] |= {
                "warm_s": common.summary([run.first_s for run in after]),
                "warm_of_cold": common.paired_ratio([run.first_s for run in after], before),
                "computed_warm": after[-1].computed,
            }
    return document


def shared_document(
    runs: Mapping[str, list[Shared]], setting: Setting, token_bytes: int, limit: float
) -> Any:
    """The batch that shares: seconds with and without the prefix, memory, tokens that agree."""
    made = setting.rows * setting.new
    own = setting.rows * (setting.tokens - setting.prefix)
    cases: dict[str, Any] = {}
    for name, measured in runs.items():
        case: dict[str, Any] = {
            "total_s": common.summary([run.total_s for run in measured]),
            "tokens_s": common.summary([made / run.total_s for run in measured]),
            "of_ceiling": made
            / common.summary([run.total_s for run in measured])["median"]
            / limit,
            "computed_tokens": measured[-1].batch.computed,
            "kv_bytes": measured[-1].batch.kv_bytes,
        }
        if measured[-1].prefix_s:
            case["prefix_s"] = common.summary([run.prefix_s for run in measured])
            case["batch_s"] = common.summary([run.batch.total_s for run in measured])
        if "dynamic" in runs:
            same = measured[-1].batch.tokens == runs["dynamic"][-1].batch.tokens
            case["rows_as_dynamic"] = int(same.all(dim=1).sum())
            case["tokens_as_dynamic"] = same.float().mean().item()
        if "paged" in runs and name != "paged":
            case["paged_over"] = common.paired_ratio(
                [run.total_s for run in measured], [run.total_s for run in runs["paged"]]
            )
        cases[name] = case
    return {
        "kv_bytes_dense": setting.rows * setting.tokens * token_bytes,
        "kv_bytes_shared": (setting.prefix + own) * token_bytes,
        "cases": cases,
    }


def chat_document(runs: Mapping[str, list[list[Served]]], setting: Setting) -> Any:
    """For each turn the time to first token and the prompt's tokens computed."""
    document: dict[str, Any] = {}
    for name, rounds in runs.items():
        turns = list(zip(*rounds, strict=True))
        document[name] = {
            "first_token_s": [common.summary([run.first_s for run in turn]) for turn in turns],
            "computed_tokens": [turn[-1].computed for turn in turns],
            "total_s": common.summary([sum(run.total_s for run in turn) for turn in rounds]),
        }
        if "paged" in runs and name != "paged":
            document[name]["paged_over_first_token"] = [
                common.paired_ratio(
                    [r[i].first_s for r in rounds], [r[i].first_s for r in runs["paged"]]
                )
                for i in range(setting.turns)
            ]
    return document


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, end with one JSON document."""
    chosen = parse(arguments)
    setting = QUICK if chosen.quick else Setting()
    rounds = chosen.rounds or ((1, 1, 1) if chosen.quick else (5, 3, 3))
    dtype = getattr(torch, chosen.dtype)
    new = max(setting.new, setting.reply)
    work = Work(dtype=dtype, rows=setting.rows, length=setting.longest, new=new)
    where = common.environment()
    print(common.describe(where))
    with ExitStack() as stack:
        systems, plain = open_systems(chosen.systems, stack, work, vllm=chosen.vllm)
        limits = ceiling(plain, setting, repeat=1 if chosen.quick else 5)
        config = plain.config
        print(report_ceiling(limits), flush=True)
        measured = measure(systems, Text(setting.prefix), setting, tuple(rounds))
        about = getattr(systems.get("vllm"), "about", None)
    numbers = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    document = {
        "benchmark": "prefix",
        "environment": where,
        "model": "SmolLM2-135M-Instruct",
        "dtype": chosen.dtype,
        "rounds": list(rounds),
        "page_size": PAGE_SIZE,
        "setting": asdict(setting),
        "vllm": about,
        "left_out": [name for name in SYSTEMS if name not in systems],
        "ceiling": limits,
        "first_token": first_document(measured.first, systems),
        "shared": shared_document(
            measured.shared, setting, 2 * numbers * dtype.itemsize, limits["shared_tokens_s"]
        ),
        "chat": chat_document(measured.chat, setting),
    }
    print(report(document))
    chosen.out.mkdir(parents=True, exist_ok=True)
    common.publish("prefix", document, chosen.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefix")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument(
        "--rounds", type=int, nargs=3, metavar=("FIRST", "SHARED", "CHAT"), help="of each part"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if fast else "float32",
        help="%(default)s on this machine",
    )
    parser.add_argument("--vllm", type=Path, help="a Python interpreter that has vLLM")
    parser.add_argument(
        "--systems",
        type=lambda names: names.split(","),
        default=list(SYSTEMS),
        help="some of " + ",".join(SYSTEMS),
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.systems) - set(SYSTEMS):
        parser.error(f"no such systems: {', '.join(sorted(unknown))}")
    return chosen


if __name__ == "__main__":
    main()
