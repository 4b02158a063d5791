"""The generator beside Hugging Face's loops, on random weights of 1 and 8 billion parameters.

Tokens/s of `generate()`, of continuous batching, and of ours: compiled, with graphs and lookahead;
then without one of these, so that what each brings is seen. A step's time is set against the least
it could take: reading the weights and all K and V once at the measured copy bandwidth.
"""

import functools
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_common import Record, Setting, ceilings
from benchmarks.gpu_end_to_end import bytes_read, make_model
from kvpaged import Generator, PagedKVCache
from kvpaged.bench import common
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.systems import run_continuous, run_generate, run_ours
from kvpaged.bench.works import Run, Served, Work

PROMPT, NEW = 128, 128
BATCHES = {"1B": (64, 1, 256), "8B": (64, 1, 256), "tiny": (1, 3)}
OURS: dict[str, dict[str, Any]] = {
    "compiled": {"compile": True},
    "eager": {},
    "no graphs": {"graphs": False},
    "no lookahead": {"lookahead": False},
}
QUICK = ("eager", "no graphs", "no lookahead")
"""Ours at the tiny size, where compiling would take longer than everything else."""


def work_of(batch: int, vocabulary: int, *, quick: bool) -> Work:
    """Prompts of random ids."""
    rng = random.Random(batch)
    prompt, new = (6, 4) if quick else (PROMPT, NEW)
    prompts = [[rng.randrange(2, vocabulary) for _ in range(prompt)] for _ in range(batch)]
    return Work(f"batch {batch}", prompts, [new] * batch, batch, 1, {})


def step_floor_s(work: Work, weights: int, token_bytes: int, copy_gb_s: float) -> float:
    """Seconds of a step in the middle of the run that only reads weights, K and V."""
    held = len(work.prompts) * (len(work.prompts[0]) + work.new[0] // 2) * token_bytes
    return (weights + held) / (copy_gb_s * 1e9)


def step_s(served: Served, new: int) -> float:
    """Seconds of a decode step: what is left after half of the requests had their first token."""
    return (served.total_s - served.first_s) / (new - 1)


def measure(
    work: Work, systems: dict[str, Run], rounds: int, wanted: list[list[int]] | None
) -> dict[str, Any]:
    """Tokens/s and seconds a step of each system, medians of rounds in turn, and how many tokens
    are those of `generate()` (or `wanted`).
    """
    failures, ready = {}, {}
    for name, run in systems.items():
        try:
            run(work)
            ready[name] = run
        except Exception as error:  # the others can still be measured
            failures[name] = f"{type(error).__name__}: {error}"[:300]
    if not ready:
        raise RuntimeError(f"{work.name}: no system ran: {failures}")
    cases = {name: functools.partial(run, work) for name, run in ready.items()}
    served = common.alternate(cases, rounds)
    if "generate" in served:
        wanted = served["generate"][0].tokens

    def medians(of: Callable[[Served], float]) -> dict[str, float]:
        return {name: statistics.median(map(of, runs)) for name, runs in served.items()}

    return {
        "tokens_s": medians(lambda each: work.generated / each.total_s),
        "first_s": medians(lambda each: each.first_s),
        "step_s": medians(lambda each: step_s(each, work.new[0])),
        "same_tokens": {
            name: same_tokens(runs[0].tokens, wanted)
            for name, runs in served.items()
            if wanted is not None
        },
        "failures": failures,
        "wanted": wanted,
    }


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that are the same."""
    pairs = [
        a == b
        for mine, his in zip(ours, theirs, strict=True)
        for a, b in zip(mine, his, strict=True)
    ]
    return sum(pairs) / len(pairs)


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """One row for each model, way of ours, and batch size."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    for name in ("tiny",) if setting.quick else ("1B", "8B"):
        if record.late():
            continue
        of_model(record, setting, name, limits["copy_gb_s"])
    return record.finish()


def of_model(record: Record, setting: Setting, name: str, copy_gb_s: float) -> None:
    """The rows of one model; the first way of ours runs beside Hugging Face's loops."""
    plain, prepared = make_model(setting, name), make_model(setting, name)
    weights, token_bytes = bytes_read(plain)
    works = [work_of(n, plain.config.vocab_size, quick=setting.quick) for n in BATCHES[name]]
    most = max(BATCHES[name])
    tokens = most * (PROMPT + NEW + 2 * PAGE_SIZE)
    wanted: dict[str, list[list[int]] | None] = {}
    ways = {each: options for each, options in OURS.items() if not setting.quick or each in QUICK}
    with PagedKVCache.for_model(
        prepared, tokens * token_bytes + 2**22, page_size=PAGE_SIZE, backend="triton"
    ) as cache:
        for number, (way, options) in enumerate(ways.items()):
            if record.late():
                continue
            with Generator(prepared, cache, max_running=most, **options) as generator:
                starts = {
                    "compile_s": generator._packed.compile_s,
                    "capture_s": generator._packed.graphs and generator._packed.graphs.capture_s,
                }
                for work in works:
                    if record.late():
                        continue
                    systems: dict[str, Run] = {way: run_ours(generator, cache)}
                    if number == 0:
                        systems["generate"] = run_generate(plain)
                        systems["continuous"] = run_continuous(plain)
                    row = measure(work, systems, 1 if setting.quick else 3, wanted.get(work.name))
                    wanted[work.name] = row.pop("wanted")
                    if way in row["failures"]:
                        raise RuntimeError(row["failures"][way])
                    floor = step_floor_s(work, weights, token_bytes, copy_gb_s)
                    row |= {"model": name, "system": way, "batch": len(work.prompts), **starts}
                    add_row(record, row, work, floor)
    del plain, prepared
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def add_row(record: Record, row: dict[str, Any], work: Work, floor: float) -> None:
    """Set a row's figures against the floor and against ours, and keep it."""
    way = row["system"]
    rate = row["tokens_s"][way]
    row |= {"prompt_tokens": len(work.prompts[0]), "new_tokens": work.new[0]}
    row |= {"step_floor_s": floor}
    row["of_roofline"] = {each: floor / s for each, s in row["step_s"].items()}
    row["over"] = {each: rate / r for each, r in row["tokens_s"].items() if each != way}
    over = ", ".join(f"{r:.2f}x {each}" for each, r in row["over"].items())
    record.add(
        row,
        f"{row['model']}, batch {row['batch']}, {way}: {rate:.0f} tokens/s, a step "
        f"{row['step_s'][way] * 1e3:.2f} ms, {row['of_roofline'][way]:.0%} of its floor; "
        f"tokens as generate's {row['same_tokens'].get(way, 0):.0%}; {over}",
    )
