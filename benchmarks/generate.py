"""End to end: one real model generates through our pages and through Hugging Face's caches.

SmolLM2-135M in bf16, greedy, no end of sequence, so that every system computes the same number of
tokens. Measured for each batch and prompt length: tokens/s, time to first token, bytes of KV held.

    python -m benchmarks.generate            # 5 rounds
    python -m benchmarks.generate --full     # 9 rounds
    python -m benchmarks.generate --quick    # tiny: does it run at all
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common
from benchmarks.systems import SYSTEMS, Run, Runner, load_model, runners
from kvpaged.bench.common import PAGE_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Point:
    """One setting: `batch` prompts of `prompt` tokens each, `new` tokens generated for each."""

    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prompt}"

    @property
    def kv_tokens(self) -> int:
        """Tokens with K and V at the end; the last token generated is never fed to the model."""
        return self.batch * (self.prompt + self.new - 1)


POINTS = (
    Point(1, 64, 64),
    Point(8, 64, 64),
    Point(32, 64, 64),
    Point(1, 1500, 32),
    Point(8, 1500, 32),
)
QUICK_POINTS = (Point(1, 16, 4), Point(2, 16, 4))


def prompts_of(point: Point, vocabulary: int) -> torch.Tensor:
    """Random ordinary tokens, [batch, prompt], the same for every system and round."""
    generator = torch.Generator().manual_seed(point.batch * 10_000 + point.prompt)
    return torch.randint(100, vocabulary, (point.batch, point.prompt), generator=generator)


def ceiling(model: "PreTrainedModel", batches: Sequence[int], *, repeat: int) -> dict[str, Any]:
    """What no cache can beat: the time of one decode step's matrix products alone.

    Every linear layer runs once with one token a sequence; attention, norms and Python cost
    nothing. Copy bandwidth is there to judge it by.
    """
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(linear.weight.nbytes for linear in linears)
    steps = {}
    for batch in batches:
        inputs = {
            width: torch.randn(batch, 1, width, dtype=model.dtype)
            for width in {linear.in_features for linear in linears}
        }

        def step(inputs: dict[int, torch.Tensor] = inputs) -> None:
            with torch.inference_mode():
                for linear in linears:
                    linear(inputs[linear.in_features])

        steps[batch] = common.seconds(step, repeat=repeat, warmup=2)
    return {
        "copy_gb_s": common.copy_bandwidth() / 1e9,
        "weight_bytes": weights,
        "step_s": {str(batch): time for batch, time in steps.items()},
        "tokens_s": {str(batch): batch / time for batch, time in steps.items()},
    }


def measure(
    points: Sequence[Point], systems: Mapping[str, Runner], rounds: int, vocabulary: int
) -> dict[Point, dict[str, list[Run]]]:
    """All points, systems in turn, with a line on stderr after each generation."""
    results = {}
    for point in points:
        ids = prompts_of(point, vocabulary)
        for run in systems.values():
            run(ids[:, :16], 2)  # first calls at this batch size: kernels chosen, memory mapped

        def done(number: int, name: str, run: Run, point: Point = point) -> None:
            rate = point.batch * point.new / run.total_s
            print(
                f"{point!s:>9}  round {number + 1}/{rounds}  {SYSTEMS[name]:<22}  "
                f"{rate:7.1f} tokens/s  first {run.first_s * 1e3:7.0f} ms",
                file=sys.stderr,
                flush=True,
            )

        cases = {name: functools.partial(run, ids, point.new) for name, run in systems.items()}
        results[point] = common.alternate(cases, rounds, done=done)
    return results


def point_document(
    point: Point, runs: Mapping[str, list[Run]], limit: float, bytes_per_token: int
) -> dict[str, Any]:
    """The figures of one point: per system, and for ours the ratio to each peer."""
    needed = point.kv_tokens * bytes_per_token
    systems: dict[str, Any] = {}
    for name, measured in runs.items():
        rates = [point.batch * point.new / run.total_s for run in measured]
        decode = [run.decode_tokens / run.decode_s for run in measured]
        systems[name] = {
            "tokens_s": common.summary(rates),
            "decode_tokens_s": common.summary(decode),
            "decode_of_ceiling": statistics.median(decode) / limit,
            "first_token_s": common.summary([run.first_s for run in measured]),
            "kv_bytes": measured[-1].kv_bytes,
            "kv_of_needed": measured[-1].kv_bytes / needed,
            "tokens_as_dynamic": same_tokens(runs, name),
        }
    document: dict[str, Any] = {
        "batch": point.batch,
        "prompt_tokens": point.prompt,
        "new_tokens": point.new,
        "kv_bytes_needed": needed,
        "systems": systems,
    }
    if "paged" in runs:
        half_pages = point.batch * PAGE_SIZE * bytes_per_token / 2
        document["kv_bytes_allowed"] = 1.03 * needed + half_pages
        document["kv_within_allowed"] = systems["paged"]["kv_bytes"] <= document["kv_bytes_allowed"]
        document["paged_over"] = {
            name: ratios(runs["paged"], measured)
            for name, measured in runs.items()
            if name != "paged"
        }
    return document


def ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float]:
    """Round by round, above one where ours is better: rate and time to first token."""
    return {
        "tokens_s": common.paired_ratio([r.total_s for r in theirs], [r.total_s for r in ours]),
        "decode_tokens_s": common.paired_ratio(
            [r.decode_tokens / r.decode_s for r in ours],
            [r.decode_tokens / r.decode_s for r in theirs],
        ),
        "first_token": common.paired_ratio([r.first_s for r in theirs], [r.first_s for r in ours]),
    }


def same_tokens(runs: Mapping[str, list[Run]], name: str) -> float | None:
    """Share of tokens equal to DynamicCache's; in bf16, rounding makes some sequences part ways."""
    if "dynamic" not in runs:
        return None
    equal = runs[name][-1].tokens == runs["dynamic"][-1].tokens
    return equal.float().mean().item()


def report(document: Mapping[str, Any]) -> str:
    """The tables for people."""
    rows = []
    for point in document["points"]:
        for name, figures in point["systems"].items():
            over = point.get("paged_over", {}).get(name)
            rows.append(
                [
                    f"{point['batch']} x {point['prompt_tokens']} + {point['new_tokens']}",
                    SYSTEMS[name],
                    f"{figures['tokens_s']['median']:.1f}",
                    f"{over['tokens_s']:.2f}x" if over else "",
                    f"{figures['decode_tokens_s']['median']:.1f}",
                    f"{figures['decode_of_ceiling']:.0%}",
                    f"{figures['first_token_s']['median'] * 1e3:.0f}",
                    f"{over['first_token']:.2f}x" if over else "",
                    f"{figures['kv_bytes'] / 1e6:.1f}",
                    f"{figures['kv_of_needed']:.3f}",
                ]
            )
    headers = ["batch x prompt + new", "system", "tokens/s", "ours", "decode/s", "of ceiling"]
    headers += ["first ms", "ours", "KV MB", "of needed"]
    lines = [common.table(headers, rows)]
    lines.append("ours: how many times better kvpaged is than this row, median of paired rounds")
    for point in document["points"]:
        if "kv_bytes_allowed" in point:
            ours = point["systems"]["paged"]["kv_bytes"]
            lines.append(
                f"KV at {point['batch']} x {point['prompt_tokens']}: {ours / 1e6:.2f} MB; needed "
                f"{point['kv_bytes_needed'] / 1e6:.2f}; 3 % and half a page a sequence allow "
                f"{point['kv_bytes_allowed'] / 1e6:.2f}: "
                f"{'within' if point['kv_within_allowed'] else 'OVER'}"
            )
    return "\n".join(lines)


def report_ceiling(document: Mapping[str, Any]) -> str:
    """The ceiling, printed before anything is measured."""
    lines = [
        f"ceiling: the linear layers of one decode step, {document['weight_bytes'] / 1e6:.0f} MB "
        f"of weights, nothing else (copy bandwidth {document['copy_gb_s']:.1f} GB/s)"
    ]
    for batch, step in document["step_s"].items():
        rate = document["tokens_s"][batch]
        lines.append(f"  batch {batch:>2}: {step * 1e3:6.1f} ms a step, {rate:6.0f} tokens/s")
    return "\n".join(lines)


def plot(document: Mapping[str, Any], file: Path) -> None:
    """Three panels over the points: tokens/s, time to first token, KV memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = document["points"]
    names = list(points[0]["systems"])
    colors = {
        "paged": "#0b6e4f",
        "dynamic": "#8da0b6",
        "static": "#c2b280",
        "continuous": "#b5838d",
    }
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("tokens/s", lambda figures: figures["tokens_s"]["median"]),
        ("time to first token, ms", lambda figures: figures["first_token_s"]["median"] * 1e3),
        ("KV memory, MB", lambda figures: figures["kv_bytes"] / 1e6),
    ]
    width = 0.8 / len(names)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        for index, name in enumerate(names):
            places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(points))]
            heights = [value(point["systems"][name]) for point in points]
            axis.bar(places, heights, width, label=SYSTEMS[name], color=colors[name])
        axis.set_title(title)
        axis.set_yscale("log")
        axis.set_xticks(
            range(len(points)), [f"{p['batch']} x {p['prompt_tokens']}" for p in points]
        )
        axis.set_xlabel("sequences x prompt tokens")
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(
        f"SmolLM2-135M, bf16, greedy; {common.describe(document['environment'])}", fontsize=9
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, draw the plot, end with one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate")
    parser.add_argument("--full", action="store_true", help="9 rounds instead of 5")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--rounds", type=int, help="how many times each system runs at each point")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="some of %(default)s")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    names = chosen.systems.split(",")
    if unknown := set(names) - set(SYSTEMS):
        parser.error(f"no such systems: {', '.join(sorted(unknown))}")
    rounds = chosen.rounds or (1 if chosen.quick else 9 if chosen.full else 5)
    points = QUICK_POINTS if chosen.quick else POINTS

    where = common.environment()
    print(common.describe(where))
    with ExitStack() as stack:
        systems = runners(names, stack)
        reference = load_model()
        limits = ceiling(
            reference, sorted({p.batch for p in points}), repeat=1 if chosen.quick else 10
        )
        config = reference.config
        del reference
        print(report_ceiling(limits), flush=True)
        results = measure(points, systems, rounds, config.vocab_size)

    bytes_per_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    )
    document = {
        "benchmark": "generate",
        "environment": where,
        "model": "SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        "rounds": rounds,
        "page_size": PAGE_SIZE,
        "ceiling": limits,
        "points": [
            point_document(point, runs, limits["tokens_s"][str(point.batch)], bytes_per_token)
            for point, runs in results.items()
        ],
    }
    print(report(document))
    chosen.out.mkdir(parents=True, exist_ok=True)
    plot(document, chosen.out / "generate.png")
    common.publish("generate", document, chosen.out)


if __name__ == "__main__":
    main()
