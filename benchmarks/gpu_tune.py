"""Choose the launch configurations of `paged_decode` on this device and write the table.

For each key of the table (element, head dimension, rows of queries, page size) the candidates are
compiled by several processes at once, then timed in turn on three pieces of work: 32 MiB of K and
V, 512 MiB, and one long row among short ones. The one with the least geometric mean wins; a
candidate whose result differs from that of the table's present configuration (which the part
`correctness` has checked) by more than rounding, or that doesn't launch, is out. Only what the
table's rules leave as it is, is tried: what is timed is what will run. The new table replaces the
one in the tree (not when `quick`) and lies in the results, so that it can be committed.
"""

import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from benchmarks.gpu_common import (
    Record,
    Sequences,
    Setting,
    dtype_on,
    finite,
    geometry,
    median_seconds,
    random_sequences,
    time_peers,
)
from kvpaged_kernels.gpu.decode import paged_decode
from kvpaged_kernels.gpu.decode_configs import (
    DecodeConfig,
    Entry,
    most_rows,
    shared_bytes,
    table,
    table_text,
    write_table,
)
from kvpaged_kernels.gpu.launch import INTERPRETED, Device, device_of
from kvpaged_kernels.gpu.plan import Shape, config_of, plan_launch

KV_HEADS = 8
PROGRAMS = (1, 2, 3, 4)
KEYS = (
    *itertools.product((2,), (128, 64, 256), (16, 32, 64), (16, 64)),
    (4, 64, 16, 64),
    (4, 128, 16, 64),
)
MIB = 2**20
COMPILE_S = 200.0
"""How long is compiled ahead."""


class Key(NamedTuple):
    """What an entry is for, apart from the device."""

    element: int
    head_dim: int
    rows: int
    page_size: int


class Work(NamedTuple):
    """Sequences of some lengths, and the queries on them."""

    q: torch.Tensor
    found: Sequences
    shape: Shape


def candidates(key: Key, device: Device, *, quick: bool) -> list[DecodeConfig]:
    """What is tried: tiles, warps, stages, and programs on a multiprocessor, as far as they fit."""
    if quick:
        return [DecodeConfig(key.rows, n, 4, 2, 1) for n in (16, 32)]
    tiles = (16, 32, 64) if key.element == 4 else (32, 64, 128)
    stages = (1, 2) if key.element == 4 else (2, 3, 4, 5)
    warps = (4,) if key.rows == 16 and key.element != 4 else (4, 8)
    found = []
    for n, w, deep in itertools.product(tiles, warps, stages):
        least = shared_bytes(n, deep, key.rows, 2 * key.head_dim, key.element)
        for programs in PROGRAMS:
            if programs * least <= device.shared_memory:
                found.append(DecodeConfig(key.rows, n, w, deep, programs))
    return found


def works(key: Key, setting: Setting) -> Iterator[tuple[str, list[int]]]:
    """Lengths of the pieces of work by name."""
    if setting.quick:
        yield "small", [40, 7]
        return
    token = 2 * KV_HEADS * key.head_dim * key.element
    yield "32 MiB", [32 * MIB // token]
    yield "512 MiB", [512 * MIB // token // 32] * 32
    short = 512 * MIB // token // 63
    yield "mixed", [32 * short, *[short] * 31]


def work_of(key: Key, lengths: list[int], setting: Setting) -> Work:
    """A piece of work; the group is as many rows as the key says."""
    dtype = torch.float32 if key.element == 4 else dtype_on(setting.device)
    kv_heads = 1 if setting.quick else KV_HEADS
    pages = geometry(
        layers=1, kv_heads=kv_heads, dim=key.head_dim, page_size=key.page_size, dtype=dtype,
        layout="page-major",
    )  # fmt: skip
    found = random_sequences(lengths, pages, setting.device)
    q = torch.randn(len(lengths), kv_heads * key.rows, key.head_dim, device=setting.device)
    dim = key.head_dim
    shape = Shape(len(lengths), kv_heads, key.rows, dim, dim, key.page_size, 1, None, dtype)
    return Work(q.to(dtype), found, shape)


def call_of(work: Work, config: DecodeConfig) -> Any:
    """A decode with a configuration, its plan made before."""
    plan, planning = plan_launch(work.shape, work.found.seq_lens, None, device_of(work.q), config)
    planning.run(work.q.device)
    k_pages, v_pages = work.found.pages.k_pages, work.found.pages.v_pages
    assert v_pages is not None

    def call() -> torch.Tensor:
        return paged_decode(
            work.q, k_pages, v_pages, work.found.block_table, work.found.seq_lens,
            scale=work.shape.k_dim**-0.5, plan=plan,
        )  # fmt: skip

    return call


def _warm(job: tuple[Key, DecodeConfig]) -> None:
    """Compile a candidate in a process of its own, into Triton's cache on disk."""
    key, config = job
    setting = Setting(device=torch.device("cuda"), quick=False, out=Path())
    try:
        call_of(work_of(key, [64], setting), config)()
    except Exception as fault:  # what cannot be launched is out, and said so when it is timed
        print(f"{key} {config}: {type(fault).__name__}", file=sys.stderr)


def compile_ahead(jobs: list[tuple[Key, DecodeConfig]]) -> None:
    """Fill Triton's cache with all cores, for as long as `COMPILE_S`; the rest compile later.

    Only what the launch is specialised by matters, so short rows do.
    """
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    started = time.perf_counter()
    pool = ProcessPoolExecutor(workers, mp_context=context)
    for _ in pool.map(_warm, jobs):
        if time.perf_counter() - started > COMPILE_S:
            break
    pool.shutdown(wait=True, cancel_futures=True)


def _measure_work(
    key: Key, lengths: list[int], setting: Setting, refused: dict[str, str]
) -> dict[DecodeConfig, float]:
    """Seconds of each candidate on one piece of work; why the others are out goes to `refused`."""
    work = work_of(key, lengths, setting)
    device = device_of(work.q)
    expected = call_of(work, config_of(work.shape, device))()
    tolerance = 4 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    calls = {}
    for config in candidates(key, device, quick=setting.quick):
        try:
            call = call_of(work, config)
            got = call()
            error = finite((got - expected).abs().max().item())
        except Exception as fault:  # it does not compile or run here: out, and said why
            refused[str(tuple(config))] = f"{type(fault).__name__}: {fault}"[:200]
            continue
        if error is None or error > tolerance:
            refused[str(tuple(config))] = f"differs by {error}, {tolerance} allowed"
            continue
        calls[config] = call
    if not calls:
        return {}
    found = median_seconds(time_peers({str(tuple(c)): f for c, f in calls.items()}, setting))
    return {config: found[str(tuple(config))] for config in calls}


def measure(key: Key, setting: Setting) -> dict[str, Any]:
    """Times of all candidates on all work, and the best one (None if none did it all)."""
    times: dict[DecodeConfig, dict[str, float]] = {}
    refused: dict[str, str] = {}
    names = []
    for name, lengths in works(key, setting):
        names.append(name)
        for config, seconds in _measure_work(key, lengths, setting, refused).items():
            times.setdefault(config, {})[name] = seconds
    whole = {c: t for c, t in times.items() if len(t) == len(names)}
    best = min(whole, key=lambda c: math.prod(whole[c].values())) if whole else None
    return {
        **key._asdict(),
        "best": best and best._asdict(),
        "seconds": whole[best] if best else {},
        "candidates": [{**c._asdict(), "seconds": t} for c, t in times.items()],
        "refused": refused,
    }


def origin(setting: Setting) -> str:
    """Where an entry was measured."""
    device = "the interpreter"
    if setting.device.type == "cuda":
        device = torch.cuda.get_device_name(setting.device)
    day = datetime.now(UTC).date().isoformat()
    return f"{device}, {day}, torch {torch.__version__}, Triton {triton.__version__}"


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """One row a key; the table is written after each, so that a run cut off leaves its part."""
    keys = [Key(*key) for key in KEYS if key[2] <= most_rows(*key[:2])]
    if setting.quick:
        keys = [Key(2, 64, 16, 16)]
    where = device_of(torch.empty(0, device=setting.device))
    if not INTERPRETED:
        compile_ahead([(key, c) for key in keys for c in candidates(key, where, quick=False)])
    for key in keys:
        if record.late():
            continue
        row = measure(key, setting)
        shown = "nothing ran"
        if row["best"]:
            best = DecodeConfig(**row["best"])
            entry = Entry(where.arch, *key, *best[1:], origin(setting))
            entries = [e for e in table() if e[:5] != entry[:5]] + [entry]
            setting.out.joinpath("decode_configs.json").write_text(table_text(entries))
            if not setting.quick:
                write_table(entries)
            shown = f"{tuple(best)} of {len(row['candidates'])}: " + ", ".join(
                f"{name} {s * 1e6:.1f} us" for name, s in row["seconds"].items()
            )
        record.add(row, f"{tuple(key)}: {shown}")
    return record.finish(table=json.loads(table_text(list(table()))))
