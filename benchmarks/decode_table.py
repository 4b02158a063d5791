"""Choose launch configurations of `paged_decode` by what the compiler says of them.

    python -m benchmarks.decode_table [--write]

For each architecture, element, head dimension, rows of queries and page size the candidates are
compiled. Of those that spill nothing, the ones that a multiprocessor holds two programs of (one
computes while the other waits) with 64 KiB on the way come first, then the one with the fewest lane
operations a byte. Entries that were measured on a device (`make gpu`) are kept. Every figure of
every candidate goes, as JSON, to the last line of the output.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.aot_binary import main_loop, programs_per_sm, resources
from benchmarks.aot_launches import TARGETS, decode_on_meta, source_of
from kvpaged_kernels.gpu.decode_configs import DecodeConfig, Entry, table, write_table
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
    halves = itertools.product(
        ("sm_80", "sm_90", "sm_100", "sm_120"), (2,), (64, 128, 256), (16, 32, 64), (16, 64)
    )
    fp8 = itertools.product(("sm_80", "sm_90", "sm_120"), (1,), (64, 128, 256), (16, 64), (16, 64))
    single = itertools.product(("sm_80", "sm_90"), (4,), (64, 128, 256), (16, 64), (64,))
    return [Key(*key) for key in (*halves, *fp8, *single) if key[1] in elements]


def candidates(key: Key) -> list[DecodeConfig]:
    """What is tried for an entry: with fp32 also no pipeline, which takes fewest registers."""
    found = []
    for block_n, warps in itertools.product((16, 32, 64, 128), (4, 8)):
        tile = block_n * 2 * key.head_dim * key.element
        if LARGEST_TILE // 4 <= tile <= LARGEST_TILE:
            stages = (1, 2) if key.element == 4 else (3,)
            found += [DecodeConfig(key.rows, block_n, warps, n, 1) for n in stages]
    return found


def evaluate(job: tuple[Key, DecodeConfig]) -> dict[str, Any]:
    """What the compiler says of a candidate: the loop without options, spills with and without."""
    key, config = job
    target = TARGETS[key.arch]
    dtype = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}[key.element]
    tile = config.block_n * 2 * key.head_dim * key.element
    found: dict[str, Any] = {**key._asdict(), **config._asdict()}
    for window, softcap in ((4096, 50.0), (None, None)):
        shape = Shape(8, 8, key.rows, key.head_dim, key.head_dim, key.page_size, 1, window, dtype)
        launch = decode_on_meta(shape, target.device, config=config, softcap=softcap)
        compiled = triton.compile(source_of(launch), target=target.target, options=launch.options)
        spilled = found.get("spills", 0)
        found |= resources(compiled, "cuda")
        found["spills"] += spilled
    found["programs_per_sm"] = programs_per_sm(found, target, config.num_warps)
    found["in_flight"] = found["programs_per_sm"] * max(1, config.num_stages - 1) * tile
    return found | main_loop(compiled.asm["cubin"], num_warps=config.num_warps, tile_bytes=tile)


def rank(found: dict[str, Any]) -> tuple[float, ...]:
    """Smaller is better: see the module's text."""
    hides = found["programs_per_sm"] >= 2 and found["in_flight"] >= IN_FLIGHT
    fits = found["programs_per_sm"] > 0
    return (not fits, found["spills"] > 0, not hides, found["operations_per_byte"])


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
            found = list(pool.map(evaluate, jobs, chunksize=4))
    chosen = []
    for key in wanted:
        mine = [f for f in found if all(f[name] == value for name, value in key._asdict().items())]
        best = min(mine, key=rank)
        programs = max(1, min(MOST_PROGRAMS, best["programs_per_sm"]))
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
