"""The generator beside Hugging Face's loops, on random weights of 1 and 8 billion parameters.

Tokens/s of `generate()`, of continuous batching, and of ours: with graphs and lookahead, without
either, so that what each brings is seen. A step's time is set against the least it could take:
reading the weights and all K and V once at the measured copy bandwidth.
"""

import functools
import random
import statistics
from typing import Any

import torch

from benchmarks.gpu_common import Record, Setting, ceilings
from benchmarks.gpu_end_to_end import bytes_read, make_model
from kvpaged import Generator, PagedKVCache
from kvpaged.bench import common
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.systems import run_continuous, run_generate, run_ours
from kvpaged.bench.works import Run, Work

PROMPT, NEW = 128, 128
BATCHES = {"1B": (1, 64, 256), "8B": (1, 64, 256), "tiny": (1, 3)}
OURS: dict[str, dict[str, Any]] = {
    "kvpaged": {},
    "no graphs": {"graphs": False},
    "no lookahead": {"lookahead": False},
}


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


def measure(work: Work, systems: dict[str, Run], rounds: int) -> dict[str, Any]:
    """Tokens/s of each system, medians of rounds in turn, and how many tokens are `generate`'s."""
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
    rates = {
        name: statistics.median([work.generated / each.total_s for each in runs])
        for name, runs in served.items()
    }
    wanted = served["generate"][0].tokens if "generate" in served else None
    same = {
        name: sum(
            ours == theirs
            for mine, his in zip(runs[0].tokens, wanted, strict=True)
            for ours, theirs in zip(mine, his, strict=True)
        )
        / work.generated
        for name, runs in served.items()
        if wanted is not None
    }
    first = {
        name: statistics.median([each.first_s for each in runs]) for name, runs in served.items()
    }
    return {"tokens_s": rates, "first_s": first, "same_tokens": same, "failures": failures}


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """One row a model and batch size."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    for name in ("tiny",) if setting.quick else ("1B", "8B"):
        if record.late():
            continue
        of_model(record, setting, name, limits["copy_gb_s"])
    return record.finish()


def of_model(record: Record, setting: Setting, name: str, copy_gb_s: float) -> None:
    """The rows of one model."""
    plain, prepared = make_model(setting, name), make_model(setting, name)
    weights, token_bytes = bytes_read(plain)
    batches = BATCHES[name]
    tokens = batches[-1] * (PROMPT + NEW + 2 * PAGE_SIZE)
    with PagedKVCache.for_model(
        prepared, tokens * token_bytes + 2**22, page_size=PAGE_SIZE, backend="triton"
    ) as cache:
        for batch in batches:
            if record.late():
                continue
            work = work_of(batch, plain.config.vocab_size, quick=setting.quick)
            row = of_batch(setting, work, cache, plain, prepared)
            rate = row["tokens_s"]["kvpaged"]
            floor = step_floor_s(work, weights, token_bytes, copy_gb_s)
            row |= {"model": name, "batch": batch, "prompt_tokens": len(work.prompts[0])}
            row |= {"new_tokens": work.new[0], "step_floor_s": floor}
            row["of_roofline"] = {each: floor * r / batch for each, r in row["tokens_s"].items()}
            row["over"] = {each: rate / r for each, r in row["tokens_s"].items()}
            over = ", ".join(f"{r:.2f}x {each}" for each, r in row["over"].items())
            record.add(
                row,
                f"{name}, batch {batch}: {rate:.0f} tokens/s, {row['of_roofline']['kvpaged']:.0%} "
                f"of the floor (prompts included); {over}",
            )
    del plain, prepared
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def of_batch(
    setting: Setting, work: Work, cache: PagedKVCache, plain: Any, prepared: Any
) -> dict[str, Any]:
    """All systems on one work; ours one after another, each with its rows to itself."""
    rounds = 1 if setting.quick else 3
    document: dict[str, Any] = {}
    starts: dict[str, float | None] = {}
    for name, options in OURS.items():
        with Generator(prepared, cache, max_running=len(work.prompts), **options) as generator:
            graphs = generator._packed.graphs
            starts[name] = None if graphs is None else graphs.capture_s
            systems: dict[str, Run] = {name: run_ours(generator, cache)}
            if name == "kvpaged":
                systems["generate"] = run_generate(plain)
                systems["continuous"] = run_continuous(plain)
            row = measure(work, systems, rounds)
            if name in row["failures"]:
                raise RuntimeError(row["failures"][name])
        for key, value in row.items():
            document.setdefault(key, {}).update(value)
    return {**document, "capture_s": starts}
