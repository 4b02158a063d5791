"""Compile every shipped kernel configuration for every target, without a GPU.

    python -m benchmarks.aot [--changed] [--one-per-kernel] [--targets sm_80 sm_90 ...]
    python -m benchmarks.aot --vllm FOLDER --sglang FOLDER      # their decode kernels too

Each configuration of `kvpaged_kernels.gpu.configs.SHIPPED` becomes the launch that its launcher
would make (from tensors on `device="meta"`), and is compiled with the specialisation that launch
would get. What the binary says of itself goes to docs/kernels.md (whole runs only) and, as one JSON
document, to the last line of the output. `--changed` takes unchanged kernels from a cache keyed by
a hash of their source, the configuration, the target and Triton's version. The folders are unpacked
wheels of the peers (`benchmarks.triton_peers`); what they gave is kept in
benchmarks/results/aot_peers.json, from where a run without them takes it.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompilationError

from benchmarks import triton_peers
from benchmarks.aot_binary import (
    main_loop,
    narrow_products,
    programs_per_sm,
    resources,
    wide_products,
)
from benchmarks.aot_launches import TARGETS, launch_of, sealed_layout, source_of
from benchmarks.aot_report import DOCUMENT, document
from benchmarks.aot_sources import PEER_RESULTS, ROOT, digest
from benchmarks.int4_loop import GROUP, int4_launch
from kvpaged_kernels.gpu.configs import SHIPPED, Shipped
from kvpaged_kernels.gpu.launch import INTERPRETED, Launch

_PEER_PAGES = (16, 64)
_PEER_SHAPE = {"q_heads": 32, "kv_heads": 8, "dim": 128}
_CODED_BYTES = {"model": 2.0, "fp8": 1.0, "int4": 0.5}


class Job(NamedTuple):
    """One compilation of ours."""

    shipped: Shipped
    target: str
    changed_only: bool


class PeerJob(NamedTuple):
    """One compilation of a peer's decode kernel."""

    peer: str
    folder: Path
    page_size: int
    coding: triton_peers.Coding
    target: str


def _cache_file(key: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvpaged" / "aot" / f"{key}.json"


def _compile(launch: Launch, target_name: str, tile: tuple[float, float] | None) -> dict[str, Any]:
    """Compile a launch; resources and, where tiles of K and V are read, the main loop.

    `tile`: bytes of K and V in one, without and with what its loads mask out.
    """
    target = TARGETS[target_name]
    started = time.perf_counter()
    compiled = triton.compile(source_of(launch), target=target.target, options=launch.options)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 2)}
    found |= resources(compiled, target.target.backend)
    if target.target.backend == "cuda":
        found["programs_per_sm"] = programs_per_sm(found, target, launch.num_warps)
        if tile:
            found |= main_loop(
                compiled.asm["cubin"],
                num_warps=launch.num_warps,
                tile_bytes=tile[0],
                padded_bytes=tile[1],
            )
    signature = compiled.src.signature
    named = [p.name for p in launch.kernel.params if signature[p.name] != "constexpr"]
    found["narrow_products"] = narrow_products(compiled.asm["ttir"], named)
    if "STRIDE_K_ENTRY" in launch.arguments:
        stride = launch.arguments["STRIDE_K_ENTRY"]
        found["wide_products"], narrow = wide_products(compiled.asm["ttir"], stride)
        found["narrow_products"] += [f"{narrow} int32 products by {stride}"] if narrow else []
    return found


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one configuration for one target, or take it from the cache if `changed_only`."""
    target = TARGETS[job.target]
    launch = launch_of(job.shipped, target.device)
    tools = [f.read_bytes() for f in sorted((ROOT / "benchmarks").glob("aot_[bl]*.py"))]
    tools.append((ROOT / "benchmarks" / "sass.py").read_bytes())
    inputs = (source_of(launch).hash(), target, launch.options, triton.__version__, tools)
    cached = _cache_file(hashlib.sha256(repr(inputs).encode()).hexdigest())
    if job.changed_only and cached.exists():
        return {**json.loads(cached.read_text()), "cached": True}
    blocks = {k: v for k, v in launch.arguments.items() if k in ("BLOCK_M", "BLOCK_N")}
    tile: tuple[float, float] | None = None
    if job.shipped.kernel == "mixed prefill":
        pass  # its warps read the same codes: what a turn loads does not tell how many tiles it has
    elif job.shipped.kernel == "mixed decode":
        layout = sealed_layout(job.shipped)
        bytes_ = blocks["BLOCK_N"] * layout.head_bytes / layout.page_size
        tile = bytes_, math.inf  # a turn is a tile, whatever lanes load twice
    elif "BLOCK_N" in blocks:
        slots = blocks["BLOCK_N"] * getattr(torch, job.shipped.dtype).itemsize
        padded = launch.arguments["BLOCK_K"] + launch.arguments["BLOCK_V"]
        tile = slots * (job.shipped.k_dim + job.shipped.v_dim), slots * padded
    result = {
        **job.shipped._asdict(),
        "target": job.target,
        **blocks,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "shared_limit": target.device.shared_memory,
        **_compile(launch, job.target, tile),
    }
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(result))
    partial.replace(cached)
    return {**result, "cached": False}


def compile_peer(job: PeerJob) -> dict[str, Any]:
    """Compile a peer's decode kernel as its own launcher would launch it."""
    head = {"peer": job.peer, "page_size": job.page_size, "coding": job.coding, **_PEER_SHAPE}
    head["target"] = job.target
    try:
        work = triton_peers.decode_on_meta(
            rows=8, page_size=job.page_size, coding=job.coding, **_PEER_SHAPE
        )
        with triton_peers.recorded() as launches:
            triton_peers.PEERS[job.peer](job.folder, work)()
    except triton_peers.NotThere as reason:
        return {**head, "skipped": str(reason)}
    launch = launches[0]
    tile = launch.arguments.get("TILE_SIZE") or launch.arguments["BLOCK_N"]
    tile_bytes = tile * 2 * _PEER_SHAPE["dim"] * _CODED_BYTES[job.coding]
    try:
        found = _compile(launch, job.target, (tile_bytes, tile_bytes))
    except CompilationError as refusal:  # sm_80 has no e4m3 for it
        return {**head, "skipped": str(refusal).splitlines()[-1]}
    for unneeded in ("seconds", "narrow_products", "wide_products"):
        found.pop(unneeded, None)
    shape = {"BLOCK_N": tile, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return {**head, **shape, **found}


def compile_study(target: str) -> dict[str, Any]:
    """Compile the 4-bit design study; a row for the table of peers."""
    dim, pages = _PEER_SHAPE["dim"], 4096
    q = torch.empty(8, 16, dim, dtype=torch.bfloat16, device="meta")
    k, v = (torch.empty(pages, GROUP, dim // 4, dtype=torch.int16, device="meta") for _ in range(2))
    launch = int4_launch(
        q, k, v,
        torch.empty(pages, dim, dtype=torch.float16, device="meta"),
        torch.empty(pages, GROUP, dtype=torch.float16, device="meta"),
        torch.empty(8, 64, dtype=torch.int32, device="meta"),
        torch.empty(9, dtype=torch.int32, device="meta"),
        torch.empty(8, 16, dim, device="meta"),
    )  # fmt: skip
    tile_bytes = float(GROUP * dim)
    found = _compile(launch, target, (tile_bytes, tile_bytes))
    for unneeded in ("seconds", "narrow_products", "wide_products"):
        found.pop(unneeded, None)
    head = {"peer": "kvpaged (study)", "page_size": GROUP, "coding": "int4", **_PEER_SHAPE}
    return {**head, "target": target, "BLOCK_N": GROUP, "num_warps": launch.num_warps, **found}


def one_per_kernel() -> tuple[Shipped, ...]:
    """The first shipped configuration of each kernel."""
    return tuple({s.kernel: s for s in reversed(SHIPPED)}.values())[::-1]


def compile_all(jobs: list[Job], peers: list[PeerJob]) -> tuple[list[Any], list[Any]]:
    """Compile in order, in two processes; progress goes to stderr."""
    results = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        theirs = list(pool.map(compile_peer, peers))
        if peers:
            theirs += pool.map(compile_study, dict.fromkeys(peer.target for peer in peers))
        for done, result in enumerate(pool.map(compile_job, jobs), start=1):
            results.append(result)
            name = f"{result['kernel']} {result['dtype']} {result['k_dim']} {result['target']}"
            if sys.stderr.isatty():
                print(f"\r{done}/{len(jobs)} {name:40}", end="", file=sys.stderr, flush=True)
    print(f"{len(jobs) + len(peers)} compilations", file=sys.stderr)
    return results, theirs


def _peer_jobs(folders: dict[str, Path | None], targets: list[str]) -> list[PeerJob]:
    codings: tuple[triton_peers.Coding, ...] = ("model", "fp8", "int4")
    return [
        PeerJob(peer, folder, page_size, coding, target)
        for peer, folder in folders.items()
        if folder is not None
        for target in targets
        if target.startswith("sm_")
        for page_size in _PEER_PAGES
        for coding in codings
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--changed", action="store_true", help="take unchanged kernels from cache")
    parser.add_argument("--one-per-kernel", action="store_true", help="only the first of each")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    for peer in triton_peers.PEERS:
        parser.add_argument(f"--{peer}", type=Path, metavar="FOLDER", help=f"{peer}'s kernels too")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    chosen = one_per_kernel() if options.one_per_kernel else SHIPPED
    jobs = [Job(s, target, options.changed) for s in chosen for target in options.targets]
    peers = _peer_jobs({p: getattr(options, p) for p in triton_peers.PEERS}, options.targets)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        # Triton's own cache would answer for a compiler that no longer takes the source.
        os.environ["TRITON_CACHE_DIR"] = cache
        results, theirs = compile_all(jobs, peers)
    if theirs:
        PEER_RESULTS.write_text(
            json.dumps({"triton": triton.__version__, "rows": theirs}, indent=1)
        )
    if len(results) == len(SHIPPED) * len(TARGETS):
        kept = json.loads(PEER_RESULTS.read_text()) if PEER_RESULTS.exists() else {"rows": []}
        DOCUMENT.write_text(document(results, kept["rows"], digest()))
    report = {
        "benchmark": "aot",
        "triton": triton.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "compiled": sum(not r["cached"] for r in results),
        "spilling": [r for r in results if r["spills"] and r["target"].startswith("sm_")],
        "too_large": [r for r in results if r["shared"] > r["shared_limit"]],
        "narrow": [r for r in results if r["narrow_products"]],
        "results": results,
        "peers": theirs,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
