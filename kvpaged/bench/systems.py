"""The systems that serve: ours, Hugging Face's `generate()` and continuous batching, and vLLM.

Each is a call that serves a `Work` and returns what it took by the one timer of `common`.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpaged import Generator, PagedKVCache, SamplingParams
from kvpaged.bench import common
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.hf import TokenClock, collect_results, continuous_manager
from kvpaged.bench.vllm_engine import VLLMEngine
from kvpaged.bench.works import Run, Served, Work
from kvpaged.testing import models
from kvpaged.testing.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What each system is called on the command line, in tables and in documents.
SYSTEMS = {
    "kvpaged": "kvpaged",
    "compiled": "kvpaged, compiled",
    "generate": "HF generate",
    "continuous": "HF continuous batching",
    "vllm": "vLLM",
}
OURS = ("kvpaged", "compiled")


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
            ticks = TokenClock()
            ids, mask = ids.to(model.device), mask.to(model.device)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                disable_compile=True, pad_token_id=0, streamer=ticks,
            )  # fmt: skip
            firsts += [ticks.times[1] - start] * len(rows)
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
            model, new=max(work.new), blocks=blocks, requests=count, sharing=work.kind == "shared"
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


def run_vllm(engine: VLLMEngine) -> Run:
    """vLLM with its prefix cache, emptied before; it takes the times."""

    def run(work: Work) -> Served:
        engine.forget()
        answer = engine.ask(work.prompts, work.new)
        return Served(answer["total_s"], answer["first_s"], answer["tokens"])

    return run


@dataclass(slots=True)
class Opened:
    """Systems that stand ready.

    Attributes:
        runs: each by its name.
        about: what is to be said of them: versions, seconds of compilation.
        failures: of those that could not be opened: `system`, `work` (`None`) and `error`.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str | None]] = field(default_factory=list)


def open_systems(
    names: Sequence[str], stack: ExitStack, dtype: torch.dtype, vllm: Path | None
) -> Opened:
    """The named systems, closed by `stack`; one that fails is among the failures and in nobody's
    way. vLLM runs by the interpreter `vllm`, which must be given if it is named.
    """
    opened = Opened()

    @functools.cache
    def plain() -> "PreTrainedModel":
        return models.load("smollm2", dtype)[0]

    def open_vllm(mine: ExitStack) -> Run:
        assert vllm is not None
        engine = VLLMEngine(vllm, dtype, rows=64, length=4096)
        mine.callback(engine.close)
        opened.about["vllm"] = engine.about
        return run_vllm(engine)

    openers: dict[str, Callable[[ExitStack], Run]] = {
        "kvpaged": lambda mine: _open_ours(mine, dtype, compiled=False, about=opened.about),
        "compiled": lambda mine: _open_ours(mine, dtype, compiled=True, about=opened.about),
        "generate": lambda mine: run_generate(plain()),
        "continuous": lambda mine: run_continuous(plain()),
        "vllm": open_vllm,
    }
    for name in names:
        with ExitStack() as mine, phase(f"starting {SYSTEMS[name]}"):
            try:
                opened.runs[name] = openers[name](mine)
            except Exception as error:  # whatever it is, the others can still be measured
                opened.failures.append(failure(name, None, error))
            if name in opened.runs:
                stack.enter_context(mine.pop_all())
    return opened


def failure(system: str, work: str | None, error: Exception) -> dict[str, str | None]:
    """What a document says of it: the error's type and the first 300 characters of its message."""
    return {"system": system, "work": work, "error": f"{type(error).__name__}: {error}"[:300]}


def _open_ours(
    mine: ExitStack, dtype: torch.dtype, *, compiled: bool, about: dict[str, Any]
) -> Run:
    model, _ = models.load("smollm2", dtype)
    cache = mine.enter_context(PagedKVCache.for_model(model, "2GiB", page_size=PAGE_SIZE))
    generator = mine.enter_context(
        Generator(model, cache, max_batch_tokens=2048, compile=compiled, pack_weights=True)
    )
    if compiled:
        about["compile_s"] = round(generator.compile_s or 0, 1)
    return run_ours(generator, cache)
