"""Requests served together: SmolLM2-135M, greedy, by the generator, beside what others do.

    batch 1, 8, 32    short prompts, all at once
    spread            requests of 10 to 1,500 tokens, 16 to 256 new ones
    shared            requests that begin with the same 2,000 tokens

    python -m benchmarks.serving                                    # 3 rounds, 1 of the long ones
    python -m benchmarks.serving --vllm /path/to/its/bin/python     # and vLLM
    python -m benchmarks.serving --quick                            # tiny: does it run at all

bf16 where the CPU multiplies it, else fp32, for all systems. kvpaged runs with packed weights, and
compiled too; Hugging Face's `generate()` in batches of 8, padded, each as long as its longest.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common
from benchmarks.prefix_systems import VLLM
from benchmarks.systems import PAGE_SIZE, collect_results, continuous_manager
from kvpaged import Generator, PagedKVCache, SamplingParams
from kvpaged.testing import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8
"""Rows of a padded batch of `generate()` where requests are unlike."""

SYSTEMS = {
    "kvpaged": "kvpaged",
    "compiled": "kvpaged, compiled",
    "generate": "HF generate",
    "continuous": "HF continuous batching",
    "vllm": "vLLM",
}


@dataclass(frozen=True, slots=True)
class Work:
    """Requests that come at once.

    Attributes:
        name: what it is called.
        prompts: token ids of each.
        new: tokens to generate after each.
        batch: rows of a padded batch.
        rounds: how often it is measured.
    """

    name: str
    prompts: list[list[int]]
    new: list[int]
    batch: int
    rounds: int

    @property
    def generated(self) -> int:
        """Tokens of all replies."""
        return sum(self.new)


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds for all, the median until a request's first token, and the tokens."""

    total_s: float
    first_s: float
    tokens: list[list[int]]


Run = Callable[[Work], Served]


def works(ids: Sequence[int], *, quick: bool, rounds: int) -> list[Work]:
    """What is measured, of English text."""
    rng = random.Random(0)

    def some(length: int) -> list[int]:
        start = rng.randrange(len(ids) - length)
        return list(ids[start : start + length])

    short, new = (8, 4) if quick else (32, 128)
    made = [
        Work(f"batch {rows}", [some(short) for _ in range(rows)], [new] * rows, rows, rounds)
        for rows in ((1, 3) if quick else (1, 8, 32))
    ]
    few, longest, most = (4, 40, 6) if quick else (64, 1500, 256)
    lengths = [int(10 * (longest / 10) ** rng.random()) for _ in range(few)]
    news = [rng.randint(min(16, most), most) for _ in range(few)]
    slow = max(rounds // 3, 1)
    made.append(Work("spread", [some(n) for n in lengths], news, BATCH, slow))
    prefix = some(40 if quick else 2000)
    rows = 3 if quick else 32
    own = [prefix + some(short) for _ in range(rows)]
    made.append(Work("shared", own, [4 if quick else 32] * rows, BATCH, slow))
    return made


def run_ours(generator: Generator, cache: PagedKVCache) -> Run:
    """The generator over a cache that has forgotten what it computed before."""

    def run(work: Work) -> Served:
        cache.clear()
        start = common.clock()
        done = generator.generate(
            work.prompts, [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in work.new]
        )
        total = common.clock() - start
        first = statistics.median(c.raise_for_error().first_token_s or 0.0 for c in done)
        return Served(total, first, [c.tokens for c in done])

    return run


def run_generate(model: "PreTrainedModel") -> Run:
    """Unmodified `generate()`, padded on the left, batch after batch, in the order of lengths."""

    def run(work: Work) -> Served:
        tokens: list[list[int]] = [[] for _ in work.prompts]
        order = sorted(range(len(work.prompts)), key=lambda i: work.new[i])
        firsts: list[float] = []
        start = common.clock()
        for at in range(0, len(order), work.batch):
            rows = order[at : at + work.batch]
            longest = max(len(work.prompts[i]) for i in rows)
            ids = torch.zeros((len(rows), longest), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(rows):
                ids[row, longest - len(work.prompts[i]) :] = torch.tensor(work.prompts[i])
                mask[row, longest - len(work.prompts[i]) :] = 1
            new = max(work.new[i] for i in rows)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                disable_compile=True, pad_token_id=0,
            )  # fmt: skip
            firsts += [common.clock() - start] * len(rows)
            for row, i in enumerate(rows):
                tokens[i] = out[row, longest : longest + work.new[i]].tolist()
        return Served(common.clock() - start, statistics.median(firsts), tokens)

    return run


def run_continuous(model: "PreTrainedModel") -> Run:
    """Hugging Face's continuous batching with a pool sized to the work, as fast as its settings
    make it; its clock starts when its thread stands ready.
    """

    def run(work: Work) -> Served:
        count = len(work.prompts)
        blocks = sum(
            -(-(len(p) + n) // PAGE_SIZE) + 1 for p, n in zip(work.prompts, work.new, strict=True)
        )
        with continuous_manager(
            model, new=max(work.new), blocks=blocks, requests=count, sharing=work.name == "shared"
        ) as manager:
            manager.add_requests([work.prompts[0][:1]], max_new_tokens=1)
            collect_results(manager, 1)
            start = common.clock()
            names = [
                manager.add_request(prompt, max_new_tokens=new, record_timestamps=True)
                for prompt, new in zip(work.prompts, work.new, strict=True)
            ]
            results = collect_results(manager, count)
            total = common.clock() - start
        first = statistics.median(r.timestamps[0] for r in results.values()) - start
        return Served(total, first, [list(results[name].generated_tokens) for name in names])

    return run


def run_vllm(engine: VLLM) -> Run:
    """vLLM with its prefix cache, emptied before; it takes the times."""

    def run(work: Work) -> Served:
        engine.forget()
        answer = engine.ask(work.prompts, work.new)
        return Served(answer["total_s"], answer["first_s"], answer["tokens"])

    return run


def open_systems(
    names: Sequence[str], stack: ExitStack, dtype: torch.dtype, vllm: Path | None, quick: bool
) -> tuple[dict[str, Run], dict[str, Any]]:
    """The named systems, and what is to be said of them."""
    made: dict[str, Run] = {}
    about: dict[str, Any] = {}
    for name, compiled in (("kvpaged", False), ("compiled", True)):
        if name in names:
            model, _ = models.load("smollm2", dtype)
            cache = stack.enter_context(PagedKVCache.for_model(model, "2GiB", page_size=PAGE_SIZE))
            generator = stack.enter_context(
                Generator(model, cache, max_batch_tokens=2048, compile=compiled, pack_weights=True)
            )
            made[name] = run_ours(generator, cache)
            if compiled:
                about["compile_s"] = round(generator.compile_s or 0, 1)
    if {"generate", "continuous"} & set(names):
        model, _ = models.load("smollm2", dtype)
        if "generate" in names:
            made["generate"] = run_generate(model)
        if "continuous" in names:
            made["continuous"] = run_continuous(model)
    if "vllm" in names and vllm is not None:
        engine = VLLM(vllm, dtype, rows=64, length=4096)
        stack.callback(engine.close)
        about["vllm"] = engine.about
        made["vllm"] = run_vllm(engine)
    return made, about


def measure(systems: dict[str, Run], work: Work) -> dict[str, Any]:
    """Every system in turn, `work.rounds` times."""
    cases = {name: (lambda run=run: run(work)) for name, run in systems.items()}
    results = common.alternate(
        cases, work.rounds,
        done=lambda n, name, got: print(
            f"  {work.name}: {name} {work.generated / got.total_s:.1f} tokens/s", flush=True
        ),
    )  # fmt: skip
    ours = [name for name in ("kvpaged", "compiled") if name in results]
    entry: dict[str, Any] = {"requests": len(work.prompts), "generated": work.generated}
    for name, rounds in results.items():
        rates = [work.generated / got.total_s for got in rounds]
        entry[name] = {
            "tokens_per_s": common.summary(rates),
            "first_s": common.summary([got.first_s for got in rounds]),
            "same_tokens_as_generate": _same(rounds[0], results.get("generate", rounds)[0]),
            "over": {
                other: round(
                    common.paired_ratio(
                        rates, [work.generated / got.total_s for got in results[other]]
                    ), 3,
                )
                for other in results if other != name and name in ours
            },
        }  # fmt: skip
    return entry


def _same(a: Served, b: Served) -> float:
    """Of the requests, how many have the same tokens."""
    pairs = list(zip(a.tokens, b.tokens, strict=True))
    return round(sum(x == y for x, y in pairs) / len(pairs), 3)


def report(document: dict[str, Any]) -> None:
    """Tables for people."""
    names = [name for name in SYSTEMS if name in next(iter(document["works"].values()))]
    rows = []
    for work, entry in document["works"].items():
        best = max(
            (n for n in ("kvpaged", "compiled") if n in entry),
            key=lambda n: entry[n]["tokens_per_s"]["median"],
        )
        rows.append(
            [work]
            + [f"{entry[name]['tokens_per_s']['median']:.1f}" for name in names]
            + [
                f"{entry[best]['over'].get(n, 1):.2f}x"
                for n in names
                if n not in ("kvpaged", "compiled")
            ]
        )
    others = [n for n in names if n not in ("kvpaged", "compiled")]
    print(common.table(
        ["tokens/s", *(SYSTEMS[n] for n in names), *(f"best over {SYSTEMS[n]}" for n in others)],
        rows,
    ))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, end with one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="of each; a third of the long ones")
    parser.add_argument("--works", nargs="+", help="only these, by the first word")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--vllm", type=Path, help="an interpreter that has vLLM")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    dtype = torch.bfloat16 if fast else torch.float32
    _, tokenizer = models.load("smollm2")
    from pydoc_data.topics import topics

    ids = tokenizer("\n".join(topics.values())[:400_000])["input_ids"]
    document: dict[str, Any] = {
        "benchmark": "serving",
        "environment": common.environment(),
        "dtype": str(dtype).removeprefix("torch."),
        "works": {},
    }
    with ExitStack() as stack:
        systems, document["about"] = open_systems(
            chosen.systems, stack, dtype, chosen.vllm, chosen.quick
        )
        for work in works(ids, quick=chosen.quick, rounds=chosen.rounds):
            if not chosen.works or work.name.split()[0] in chosen.works:
                document["works"][work.name] = measure(systems, work)
    print(common.describe(document["environment"]))
    report(document)
    common.publish("serving", document, chosen.out)


if __name__ == "__main__":
    main()
