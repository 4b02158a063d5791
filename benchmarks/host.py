"""What the books cost on the host: `python -m benchmarks.host [--quick] [--out FOLDER]`.

The allocator, nanoseconds a page, at calls of 1 and of 1,024 pages; a decode step of 256 sequences,
microseconds, without any layer: pages, tables, lengths, and the seal's bookkeeping. The keys of a
long prompt's pages and its search in the prefix index, beside bare hashing.
"""

import argparse
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from kvpaged import PagedKVCache, PageGeometry
from kvpaged.batch import Batch
from kvpaged.generate.engine import Engine
from kvpaged.generate.pages import PageNeeds
from kvpaged.generate.params import Completion, SamplingParams
from kvpaged.generate.requests import Reply, Request
from kvpaged.keys import KEY_BYTES, TOKEN_BYTES, encode_tokens
from kvpaged.pages.allocator import SEALED, PageAllocator
from kvpaged.pages.frames import FrameBudget
from kvpaged.pages.prefix import PrefixIndex
from kvpaged.pages.trail import Node, Trail
from kvpaged.slot_batch import SlotBatch

PROMPT = 50_000
PROMPT_GOALS_MS = {64: 1.5, 16: 4.0}  # keys and search of that many tokens, by page size


def allocator_times(pages: int, calls: int) -> dict[str, float]:
    """Nanoseconds a page of taking and giving back `pages` pages a call, `calls` times each."""
    total = pages * calls
    allocator = PageAllocator(frames=FrameBudget(1), pages_per_frame=max(2 * total, 4096), extent=4)
    took, gave = [], []
    for _ in range(7):
        held = []
        last: int | None = None
        start = common.clock()
        for _ in range(calls):
            ids = allocator.alloc(pages, last)
            last = int(ids[-1])
            held.append(ids)
        took.append((common.clock() - start) / total * 1e9)
        start = common.clock()
        for ids in held:
            allocator.release(ids)
        gave.append((common.clock() - start) / total * 1e9)
    return {"alloc_ns": float(np.median(took)), "release_ns": float(np.median(gave))}


def step_times(rows: int, page_size: int, steps: int) -> dict[str, float]:
    """Microseconds of `begin` and `commit` of a decode step without checksums, median and mean.

    The mean has the steps in which rows enter a page: ragged lengths, `rows / page_size` a step.
    """
    geometry = PageGeometry(
        layers=1, kv_heads=1, head_dim=64, page_size=page_size, dtype=torch.bfloat16
    )
    cache = PagedKVCache(geometry, "512MiB", checksums=False)
    batch = Batch(cache, rows)
    batch.begin(np.arange(rows) % page_size + 1)
    batch.commit()
    one = np.ones(rows, np.int64)
    begun, committed = [], []
    for _ in range(steps):
        start = common.clock()
        batch.begin(one)
        middle = common.clock()
        batch.commit()
        begun.append((middle - start) * 1e6)
        committed.append((common.clock() - middle) * 1e6)
    cache.check_integrity()
    batch.close()
    cache.close()
    return {
        "begin_us": float(np.median(begun)),
        "begin_mean_us": float(np.mean(begun)),
        "commit_us": float(np.median(committed)),
        "commit_mean_us": float(np.mean(committed)),
    }


def engine_times(rows: int, *, steps: int) -> dict[str, float]:
    """Microseconds of a whole step of the generator with `rows` replies of ragged lengths, the
    model and the choice of tokens stubbed: scheduler, pages, tables, lengths, ends, and the prefix
    index every `PUBLISH_EVERY` steps. Median and mean; pages of 64, no checksums.
    """
    geometry = PageGeometry(layers=1, kv_heads=1, head_dim=64, page_size=64, dtype=torch.bfloat16)
    cache = PagedKVCache(geometry, "600MiB", checksums=False, namespace=b"benchmark")
    batch = SlotBatch(cache, rows)
    logits = torch.zeros(rows, 8)
    engine = Engine(
        batch, lambda ids, positions, take, every: logits[: len(take)], PageNeeds(cache),
        budget=10**6, chunk=10**6, eos=(7,),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for number in range(rows):
        ids = rng.integers(0, 40_000, int(rng.integers(1, 200)))
        request = Request(
            number=number, prompt=ids, params=SamplingParams(max_new_tokens=10**4), salt=None,
            rank=number, submitted=0.0, deadline=float("inf"), seed=number,
        )  # fmt: skip
        completion = Completion(number, 0, len(ids))
        request.replies.append(
            Reply(request=request, index=0, seed=number, ids=ids, completion=completion)
        )
        engine.add(request)
    while engine.line:
        engine.step()
    for _ in range(64):
        engine.step()
    times = []
    for _ in range(steps):
        before = engine.stats.host_s
        engine.step()
        times.append((engine.stats.host_s - before) * 1e6)
    cache.check_integrity()
    batch.close()
    cache.close()
    return {"step_us": float(np.median(times)), "step_mean_us": float(np.mean(times))}


def prompt_times(tokens: int, page_size: int, repeat: int) -> dict[str, float]:
    """Milliseconds for a prompt given as int64 numbers, all of which is in the index; medians of
    calls in turn.

    `blake2b_ms`: keyed BLAKE2b of pages that are cut already, not chained: the ceiling of `keys`.
    `keys_ms`: encoding and the keys of all pages. `find_ms`: encoding and search. `both_ms`: all.
    `enter_us`: microseconds a page, when pages enter one by one.
    """
    ids = np.random.default_rng(0).integers(0, 49_152, tokens)
    index, root, enter_us = filled_index(ids, page_size)
    width = page_size * TOKEN_BYTES
    encoded = encode_tokens(ids)
    cut = [encoded[i : i + width] for i in range(0, len(encoded) - width + 1, width)]
    hasher = blake2b(digest_size=KEY_BYTES, key=bytes(32))

    def bare() -> object:
        key = b""
        for page in cut:
            one = hasher.copy()
            one.update(page)
            key = one.digest()
        return key

    def keys() -> object:
        return list(root.region.page_keys(encode_tokens(ids), page_size))

    def find() -> object:
        return index.find(Trail(root), encode_tokens(ids), tokens - 1)

    def both() -> object:
        here = encode_tokens(ids)
        return list(root.region.page_keys(here, page_size)), index.find(
            Trail(root), here, tokens - 1
        )

    found = index.find(Trail(root), encoded, tokens - 1)
    assert found.tokens // page_size == (tokens - 1) // page_size, found.tokens
    cases = {"blake2b_ms": bare, "keys_ms": keys, "find_ms": find, "both_ms": both}
    times = common.alternate({name: _timed(call) for name, call in cases.items()}, repeat)
    figures = {name: float(np.median(measured)) * 1e3 for name, measured in times.items()}
    return {**figures, "enter_us": enter_us}


def filled_index(ids: np.ndarray, page_size: int) -> tuple[PrefixIndex, Node, float]:
    """An index of all full pages of these tokens, the start of their region, and microseconds that
    a page took to enter, as it does when a sequence fills it: encoding, key and tree.
    """
    count = len(ids) // page_size
    allocator = PageAllocator(frames=FrameBudget(1), pages_per_frame=count, extent=4)
    held = allocator.alloc(count)
    allocator.states[held] = SEALED
    index = PrefixIndex([allocator], [None], page_size)
    root = index.root(b"benchmark")
    trail = Trail(root)
    times = []
    for place, page in enumerate(held.tolist()):
        mine = ids[place * page_size : (place + 1) * page_size]
        start = common.clock()
        index.enter(trail, encode_tokens(mine), [page])
        times.append((common.clock() - start) * 1e6)
    index.check_integrity()
    return index, root, float(np.median(times))


def _timed(call: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        start = common.clock()
        call()
        return common.clock() - start

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, end with one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    few = chosen.quick
    allocator = {
        pages: allocator_times(pages, calls)
        for pages, calls in ((1, 50 if few else 5000), (1024, 2 if few else 50))
    }
    steps = {rows: step_times(rows, 64, 10 if few else 300) for rows in (1, 32, 256)}
    engines = {rows: engine_times(rows, steps=10 if few else 320) for rows in (32, 256, 1024)}
    tokens = 1_000 if few else PROMPT
    prompts = {size: prompt_times(tokens, size, 3 if few else 51) for size in PROMPT_GOALS_MS}
    document: dict[str, Any] = {
        "benchmark": "host",
        "environment": common.environment(),
        "allocator": {str(pages): times for pages, times in allocator.items()},
        "step": {str(rows): times for rows, times in steps.items()},
        "engine": {str(rows): times for rows, times in engines.items()},
        "prompt_tokens": tokens,
        "prompt": {str(size): times for size, times in prompts.items()},
    }
    print(common.describe(document["environment"]))
    rows = [
        [f"{pages} pages a call", f"{t['alloc_ns']:.0f}", f"{t['release_ns']:.0f}"]
        for pages, t in allocator.items()
    ]
    print(common.table(["allocator, ns a page", "alloc", "release"], rows))
    rows = [[f"{count} sequences", *(f"{t[key]:.0f}" for key in t)] for count, t in steps.items()]
    names = ["begin", "mean", "commit", "mean"]
    print(common.table(["decode step on the host, us", *names], rows))
    rows = [[f"{count} running", *(f"{t[key]:.0f}" for key in t)] for count, t in engines.items()]
    print(common.table(["step of the generator on the host, us", "median", "mean"], rows))
    names = ["BLAKE2b alone", "keys", "find", "both", "goal", "enter, us a page"]
    rows = [
        [
            f"pages of {size}",
            *(f"{t[key]:.2f}" for key in ("blake2b_ms", "keys_ms", "find_ms", "both_ms")),
            f"{PROMPT_GOALS_MS[size]:.1f}",
            f"{t['enter_us']:.1f}",
        ]
        for size, t in prompts.items()
    ]
    print(common.table([f"a prompt of {tokens:,} tokens, ms", *names], rows))
    chosen.out.mkdir(parents=True, exist_ok=True)
    common.publish("host", document, chosen.out)


if __name__ == "__main__":
    main()
