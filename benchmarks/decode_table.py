"""Choose launch configurations of `paged_decode` by what the compiler says of them.

    python -m benchmarks.decode_table [--write] [--elements 1 2 4]

For each architecture, element, head dimension, rows of queries and page size the candidates are
compiled, with and without options, for as many programs a multiprocessor (up to four) as shared
memory holds, and for fewer until nothing is spilled. Those with two programs or more (one computes
while the other waits) and 64 KiB on the way come first, then the fewest lane operations a byte.
Entries that were measured on a device (`make gpu`) are kept. Every figure of every candidate goes,
as JSON, to the last line of the output.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import PTXASError

from benchmarks.aot_binary import main_loop, programs_per_sm, resources
from benchmarks.aot_launches import TARGETS, decode_on_meta, source_of
from kvpaged_kernels.gpu.decode_configs import (
    DecodeConfig,
    Entry,
    most_rows,
    shared_bytes,
    table,
    write_table,
)
from kvpaged_kernels.gpu.plan import Shape

IN_FLIGHT = 64 * 1024
"""Bytes on the way to a multiprocessor that hide the latency of memory: 3 TB/s over 132 of them
times a microsecond is 23 KiB; a pipeline also waits for its own products."""

LARGEST_TILE = 32 * 1024
"""Bytes of K and V in a tile at most: larger ones cut a small batch into too few pieces."""

MOST_PROGRAMS = 4


class Key(NamedTuple):
    """What an entry is for."""

    arch: str
    element: int
    head_dim: int
    rows: int
    page_size: int


def keys(elements: list[int]) -> list[Key]:
    """The entries there are to be, of elements of these bytes."""
    archs = ("sm_80", "sm_90", "sm_100", "sm_120")
    dims, pages = (64, 128, 256), (16, 64)
    halves = itertools.product(archs, (2,), dims, (16, 32, 64), pages)
    fp8 = itertools.product(archs, (1,), dims, (16, 32), (64,))
    single = itertools.product(("sm_80", "sm_90"), (4,), dims, (16,), (64,))
    return [
        Key(*key)
        for key in (*halves, *fp8, *single)
        if key[1] in elements and key[3] <= most_rows(key[1], key[2])
    ]


def candidates(key: Key) -> list[DecodeConfig]:
    """What is tried for an entry: the two largest tiles; fp32 has no registers for a pipeline."""
    widest = LARGEST_TILE // (2 * key.head_dim * key.element)
    tiles = [n for n in (widest, widest // 2) if n <= 128]
    warps = (4,) if key.rows == 16 and key.element != 4 else (4, 8)
    stages = 1 if key.element == 4 else 3
    return [DecodeConfig(key.rows, n, w, stages, 1) for n in tiles for w in warps]


def evaluate(job: tuple[Key, DecodeConfig]) -> dict[str, Any]:
    """What the compiler says of a candidate: the loop without options, spills with and without."""
    key, config = job
    target = TARGETS[key.arch]
    tile = config.block_n * 2 * key.head_dim * key.element
    least = shared_bytes(config.block_n, config.num_stages, key.rows, 2 * key.head_dim, key.element)
    found: dict[str, Any] = {}
    for programs in range(max(1, min(MOST_PROGRAMS, target.shared_of_all // least)), 0, -1):
        try:
            found = _compiled(key, config._replace(programs_per_sm=programs))
        except PTXASError:  # wide multiplications refuse to be short of registers
            continue
        if not found["spills"]:
            break
    if not found:
        return {**key._asdict(), **config._asdict(), "held": 0, "in_flight": 0, "spills": 1,
                "operations_per_byte": 0.0}  # fmt: skip
    held = min(found["programs_per_sm"], found["held"])
    found["in_flight"] = held * max(1, config.num_stages - 1) * tile
    return found


def _compiled(key: Key, config: DecodeConfig) -> dict[str, Any]:
    target = TARGETS[key.arch]
    dtype = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}[key.element]
    found: dict[str, Any] = {**key._asdict(), **config._asdict()}
    for window, softcap in ((4096, 50.0), (None, None)):
        shape = Shape(8, 8, key.rows, key.head_dim, key.head_dim, key.page_size, 1, window, dtype)
        launch = decode_on_meta(shape, target.device, config=config, softcap=softcap)
        compiled = triton.compile(source_of(launch), target=target.target, options=launch.options)
        spilled = found.get("spills", 0)
        found |= resources(compiled, "cuda")
        found["spills"] += spilled
    found["held"] = programs_per_sm(found, target, config.num_warps)
    tile = config.block_n * 2 * key.head_dim * key.element
    return found | main_loop(compiled.asm["cubin"], num_warps=config.num_warps, tile_bytes=tile)


def rank(found: dict[str, Any]) -> tuple[float, ...]:
    """Smaller is better: see the module's text."""
    programs = min(found["programs_per_sm"], found["held"])
    hides = programs >= 2 and found["in_flight"] >= IN_FLIGHT
    return (programs == 0, found["spills"] > 0, not hides, found["operations_per_byte"])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="replace the table's compiled entries")
    parser.add_argument("--elements", nargs="+", type=int, default=[1, 2, 4], help="bytes")
    options = parser.parse_args()
    wanted = keys(options.elements)
    jobs = [(key, config) for key in wanted for config in candidates(key)]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            found = []
            for result in pool.map(evaluate, jobs):
                found.append(result)
                print(f"{len(found)} of {len(jobs)}", file=sys.stderr, flush=True)
    chosen = []
    for key in wanted:
        mine = [f for f in found if all(f[name] == value for name, value in key._asdict().items())]
        best = min(mine, key=rank)
        programs = max(1, min(best["programs_per_sm"], best["held"]))
        chosen.append(
            Entry(
                **key._asdict(),
                block_n=best["block_n"],
                num_warps=best["num_warps"],
                num_stages=best["num_stages"],
                programs_per_sm=programs,
                origin="compiled",
            )
        )
        print(f"{key}: {best}")
    if options.write:
        # What was measured stays, and what this run was not asked for.
        kept = [e for e in table() if e.origin != "compiled" or Key(*e[:5]) not in wanted]
        taken = {entry[:5] for entry in kept}
        write_table(kept + [entry for entry in chosen if entry[:5] not in taken])
    print(json.dumps({"benchmark": "decode_table", "candidates": found}))


if __name__ == "__main__":
    main()
