"""Requests served together, by every system in turn; one document, and its tables for people."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kvpaged.bench import common
from kvpaged.bench.systems import OURS, SYSTEMS, failure, open_systems
from kvpaged.bench.works import Run, Served, Work, works
from kvpaged.testing import models

Failures = list[dict[str, str | None]]


def serve(
    names: Sequence[str], kinds: Sequence[str], *, vllm: Path | None, rounds: int, quick: bool,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The document: every work of these kinds served by every named system. Systems and works that
    fail are among its `failures`.

    Args:
        names: keys of `SYSTEMS`; vLLM is left out, and said to be, if `vllm` is `None`.
        kinds: keys of `works.GOALS`.
        vllm: an interpreter that has vLLM.
        rounds: how often batches are measured; a third of it the long works, at least once.
        quick: tiny works, to see that everything runs.
        dtype: of weights and keys; `None`: bf16 where the CPU multiplies it, else fp32.

    Raises:
        ModelError: the model could not be fetched.
    """
    ids = _text()
    if dtype is None:
        fast = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        dtype = torch.bfloat16 if fast else torch.float32
    left_out = [name for name in names if name == "vllm" and vllm is None]
    document: dict[str, Any] = {
        "benchmark": "serving",
        "environment": common.environment(),
        "model": models.SOURCES["smollm2"].title,
        "dtype": str(dtype).removeprefix("torch."),
        "quick": quick,
        "works": {},
        "left_out": left_out,
    }
    with ExitStack() as stack:
        opened = open_systems([n for n in names if n not in left_out], stack, dtype, vllm)
        document["about"] = opened.about
        document["failures"] = opened.failures
        for work in works(ids, quick=quick, rounds=rounds):
            if work.kind in kinds and opened.runs:
                document["works"][work.name] = measure(opened.runs, work, opened.failures)
    return document


def _text() -> list[int]:
    """English, as tokens: what Python's help says of its topics."""
    folder = models.path("smollm2")
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids: list[int] = tokenizer("\n".join(topics.values())[:400_000])["input_ids"]
    return ids


def measure(systems: Mapping[str, Run], work: Work, failures: Failures) -> dict[str, Any]:
    """Every system in turn, `work.rounds` times; one that fails is not asked again for this work,
    has no figures, and is added to `failures`.
    """
    failed: set[str] = set()

    def attempt(name: str, run: Run) -> Served | None:
        if name in failed:
            return None
        try:
            return run(work)
        except Exception as error:  # whatever it is, the others can still be measured
            failed.add(name)
            failures.append(failure(name, work.name, error))
            return None

    def tell(number: int, name: str, got: Served | None) -> None:
        rate = f"{work.generated / got.total_s:.1f} tokens/s" if got else "failed"
        print(f"  {work.name}, round {number + 1} of {work.rounds}: {name} {rate}", flush=True)

    cases: dict[str, Callable[[], Served | None]] = {
        name: functools.partial(attempt, name, run) for name, run in systems.items()
    }
    results = common.alternate(cases, work.rounds, done=tell)
    served = {
        name: [got for got in rounds if got is not None]
        for name, rounds in results.items()
        if name not in failed
    }
    return {
        "requests": len(work.prompts),
        "generated": work.generated,
        "rounds": work.rounds,
        "goals": dict(work.goals),
        **{name: _figures(name, served, work) for name in served},
    }


def _figures(name: str, served: Mapping[str, list[Served]], work: Work) -> dict[str, Any]:
    """Of one system: rates and first tokens over the rounds; for ours, ratios round by round."""
    rates = {
        other: [work.generated / got.total_s for got in rounds] for other, rounds in served.items()
    }
    reference = served.get("generate")
    return {
        "tokens_per_s": common.summary(rates[name]),
        "first_s": common.summary([got.first_s for got in served[name]]),
        "same_tokens_as_generate": _same(served[name][0], reference[0]) if reference else None,
        "over": {
            other: round(common.paired_ratio(rates[name], rates[other]), 3)
            for other in served
            if other != name and name in OURS
        },
    }


def _same(a: Served, b: Served) -> float:
    """Of the requests, how many have the same tokens."""
    pairs = list(zip(a.tokens, b.tokens, strict=True))
    return round(sum(x == y for x, y in pairs) / len(pairs), 3)


def best_of_ours(entry: Mapping[str, Any]) -> str | None:
    """Which of kvpaged's own has the better median in a work's entry; `None`: neither ran."""
    ours = [name for name in OURS if name in entry]
    return max(ours, key=lambda n: float(entry[n]["tokens_per_s"]["median"]), default=None)


def measured(document: Mapping[str, Any]) -> list[str]:
    """Systems that served a work, in the order of `SYSTEMS`."""
    entries = document["works"].values()
    return [name for name in SYSTEMS if any(name in entry for entry in entries)]


def report(document: Mapping[str, Any]) -> str:
    """Tables of tokens/s, ratios and first tokens; what failed, and what was left out."""
    names = measured(document)
    others = [name for name in names if name not in OURS]
    rates, firsts = [], []
    for work, entry in document["works"].items():
        best = best_of_ours(entry)
        over = entry[best]["over"] if best else {}
        cells = [f"{entry[n]['tokens_per_s']['median']:.1f}" if n in entry else "" for n in names]
        ratios = [
            f"{over[n]:.2f}x" + (f", goal {goal:g}x" if (goal := entry["goals"].get(n)) else "")
            if n in over else ""
            for n in others
        ]  # fmt: skip
        rates.append([work, *cells, *ratios])
        firsts.append(
            [work] + [f"{entry[n]['first_s']['median']:.2f}" if n in entry else "" for n in names]
        )
    titles = [SYSTEMS[name] for name in names]
    lines = [common.table(["tokens/s", *titles, *(f"over {SYSTEMS[n]}" for n in others)], rates)]
    if others:
        lines.append("over: the better of kvpaged's, median of paired rounds")
    lines += ["", common.table(["first token, s", *titles], firsts)]
    lines += [
        f"failed: {SYSTEMS[f['system']]}, {f['work'] or 'at its start'}: {f['error']}"
        for f in document["failures"]
    ]
    lines += [f"not run: {SYSTEMS[name]} (no interpreter)" for name in document["left_out"]]
    return "\n".join(lines)
