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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common
from kvpaged.testing import models
from kvpaged.testing.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAGE_SIZE = 64
MEMORY = "1GiB"

# What each system is called on the command line, in tables and in documents.
SYSTEMS = {
    "paged": "kvpaged",
    "dynamic": "HF DynamicCache",
    "static": "HF StaticCache",
    "continuous": "HF continuous batching",
}


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


@dataclass(frozen=True, slots=True)
class Run:
    """One generation.

    Attributes:
        total_s: from the call to the last token of the last sequence.
        first_s: until a sequence has its first token, the median over sequences.
        decode_s: from when every sequence has its first token to the last token of the last.
        decode_tokens: generated in `decode_s`.
        kv_bytes: held for K and V at the end.
        tokens: [batch, new] generated.
    """

    total_s: float
    first_s: float
    decode_s: float
    decode_tokens: int
    kv_bytes: int
    tokens: torch.Tensor


Runner = Callable[[torch.Tensor, int], Run]


class TokenClock:
    """A streamer for `generate()` that notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """One step's tokens, of all sequences."""
        self.times.append(common.clock())

    def end(self) -> None:
        """Nothing is held back."""


def generate_with(
    model: "PreTrainedModel", past: Any, ids: torch.Tensor, new: int, start: float
) -> Run:
    """Unmodified `generate()` over `past`; the bytes of `past` are for the caller to fill in."""
    ticks = TokenClock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=past,
        max_new_tokens=new,
        do_sample=False,
        streamer=ticks,
        disable_compile=True,
    )
    end = common.clock()
    first = ticks.times[1]
    tokens = out[:, ids.shape[1] :]
    return Run(end - start, first - start, end - first, tokens[:, 1:].numel(), 0, tokens)


def with_bytes(run: Run, kv_bytes: int) -> Run:
    """`run` with its memory, which is read after the clock has stopped."""
    return replace(run, kv_bytes=kv_bytes)


def run_dynamic(model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Hugging Face's default: one tensor per layer, grown by concatenation."""
    from transformers import DynamicCache

    start = common.clock()
    past = DynamicCache(config=model.config)
    return with_bytes(generate_with(model, past, ids, new, start), layer_bytes(past))


def run_static(model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Preallocated to exactly what is needed: its best case in memory and in time.

    Not by `cache_implementation="static"`, which allocates at least as much as any earlier call
    did. On a CPU generate() does not compile by itself; this asks it not to, to be plain.
    """
    from transformers import StaticCache

    start = common.clock()
    past = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    return with_bytes(generate_with(model, past, ids, new, start), layer_bytes(past))


def run_continuous(model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Hugging Face's own paged cache, as fast and as small as its settings make it on a CPU.

    The clock starts when its thread stands ready, since starting takes a second. The pool is sized
    to the work (by default it takes 60 % of the machine's memory and seconds to clear it), prefill
    goes in chunks of 2,048 tokens (128 and 512 were slower, 16 or 256 tokens a page no faster),
    prefix sharing is off because all rounds have the same prompts.
    """
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    batch, prompt = ids.shape
    generation = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=model.generation_config.pad_token_id,
    )
    settings = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=batch * -(-(prompt + new) // PAGE_SIZE),
        max_batch_tokens=max(2048, batch),
        max_requests_per_batch=batch,
        allow_block_sharing=False,
    )
    prompts = ids.tolist()
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, warmup=False
    ) as manager:
        manager.add_requests([prompts[0][:1]], max_new_tokens=1)
        collect_results(manager, 1)
        start = common.clock()
        order = manager.add_requests(prompts, max_new_tokens=new, record_timestamps=True)
        results = collect_results(manager, batch)
        end = common.clock()
        kv_bytes = manager.batch_processor.cache.cache_tensor.nbytes
    times = [result.timestamps for result in results.values()]
    firsts = [ticks[0] for ticks in times]
    # Prompts are taken in chunks, so early sequences already generate while late ones wait.
    all_started = max(firsts)
    return Run(
        total_s=end - start,
        first_s=statistics.median(firsts) - start,
        decode_s=end - all_started,
        decode_tokens=sum(tick > all_started for ticks in times for tick in ticks),
        kv_bytes=kv_bytes,
        tokens=torch.tensor([results[request].generated_tokens for request in order]),
    )


def collect_results(manager: Any, count: int) -> dict[str, Any]:
    """Wait for `count` finished requests of a continuous-batching manager, by request id."""
    results: dict[str, Any] = {}
    while len(results) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            results[result.request_id] = result
        elif result is None and not manager.is_running():
            raise RuntimeError("the continuous batching thread ended before its requests")
    return results


def run_paged(cache: Any, model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Ours: unmodified `generate()` over a session of the paged cache."""
    start = common.clock()
    with cache.session(ids, attention_mask=torch.ones_like(ids)) as past:
        run = generate_with(model, past, ids, new, start)
        return with_bytes(run, past.memory_bytes())


def layer_bytes(past: Any) -> int:
    """Bytes of all K and V tensors of a Hugging Face cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)


def runners(names: Sequence[str], stack: ExitStack) -> dict[str, Runner]:
    """The named systems, over two instances of the same weights: one is left as it was loaded."""
    made: dict[str, Runner] = {}
    peers = {"dynamic": run_dynamic, "static": run_static, "continuous": run_continuous}
    with phase("loading SmolLM2-135M in bf16"):
        plain = load_model() if set(names) & set(peers) else None
        prepared = load_model() if "paged" in names else None
    for name in names:
        if name == "paged":
            from kvpaged import PagedKVCache

            cache = PagedKVCache.for_model(prepared, memory=MEMORY, page_size=PAGE_SIZE)
            stack.callback(cache.close)
            made[name] = functools.partial(run_paged, cache, prepared)
        else:
            made[name] = functools.partial(peers[name], plain)
    return made


def load_model() -> "PreTrainedModel":
    """SmolLM2 in bf16, which never stops by itself: every system generates to the last token."""
    model, _ = models.load("smollm2", dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model


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
