"""Compile every shipped kernel configuration for every target, without a GPU.

    python -m benchmarks.aot [--changed] [--one-per-kernel] [--targets sm_80 sm_90 ...]

Each configuration of `kvpaged_kernels.gpu.configs.SHIPPED` becomes the launch that its launcher
would make (from tensors on `device="meta"`), and is compiled with the specialisation that launch
would get. What the binary says of itself goes to docs/kernels.md (whole runs only) and, as one JSON
document, to the last line of the output. `--changed` takes unchanged kernels from a cache keyed by
a hash of their source, the configuration, the target and Triton's version.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvpaged_kernels.gpu.append import append_launch
from kvpaged_kernels.gpu.checksum import checksum_launch
from kvpaged_kernels.gpu.configs import SHIPPED, Shipped
from kvpaged_kernels.gpu.copy import copy_launch
from kvpaged_kernels.gpu.decode import decode_launches
from kvpaged_kernels.gpu.launch import INTERPRETED, Device, Launch
from kvpaged_kernels.gpu.prefill import prefill_launch

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"


class Target(NamedTuple):
    """What is compiled for, and the device facts that size its launches."""

    target: GPUTarget
    device: Device


# Multiprocessors and opt-in shared memory: CUDA C++ programming guide, table of compute
# capabilities, and the product data sheets; gfx942: AMD CDNA 3 white paper.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Device(108, 163 * 1024)),
    "sm_90": Target(GPUTarget("cuda", 90, 32), Device(132, 227 * 1024)),
    "sm_100": Target(GPUTarget("cuda", 100, 32), Device(148, 227 * 1024)),
    "sm_120": Target(GPUTarget("cuda", 120, 32), Device(170, 99 * 1024)),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Device(304, 64 * 1024)),
}

_UNIT = 256
_ENTRIES = 2**24
_LAYERS = 32
_ROWS = 8
_TOKENS = 4096
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _pages(shipped: Shipped, dtype: torch.dtype, dim: int) -> Tensor:
    """A page-major view: pages of all layers back to back, entries in units of 256 bytes."""
    unit = _UNIT // dtype.itemsize
    shape = (_ENTRIES, shipped.kv_heads, shipped.page_size, dim)
    strides = (unit, shipped.page_size * dim, dim, 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _attention_launch(shipped: Shipped, device: Device) -> Launch:
    dtype = getattr(torch, shipped.dtype)
    q_heads = shipped.kv_heads * shipped.group
    rows = _ROWS if shipped.kernel == "prefill" or "split" not in shipped.options else 1
    if shipped.kernel == "merge":
        rows = 1
    elif shipped.kernel == "decode" and rows > 1:
        rows = 4 * device.multiprocessors
    tokens = _TOKENS if shipped.kernel == "prefill" else rows
    arguments: dict[str, Any] = {
        "q": _meta(tokens, q_heads, shipped.k_dim, dtype=dtype),
        "k_pages": _pages(shipped, dtype, shipped.k_dim),
        "v_pages": _pages(shipped, dtype, shipped.v_dim),
        "block_table": _meta(rows, 1024, dtype=torch.int32),
        "seq_lens": _meta(rows, dtype=torch.int32),
        "out": _meta(tokens, q_heads, shipped.v_dim, dtype=dtype),
        "scale": shipped.k_dim**-0.5,
        "window": 4096 if "window" in shipped.options else None,
        "softcap": 50.0 if "softcap" in shipped.options else None,
        "sinks": _meta(q_heads, dtype=dtype) if "sinks" in shipped.options else None,
        "device": device,
    }
    if shipped.kernel == "prefill":
        cu_q = _meta(rows + 1, dtype=torch.int32)
        return prefill_launch(**arguments, cu_q=cu_q, max_q=_TOKENS)
    launches = decode_launches(**arguments, max_len=2**16)
    assert (len(launches) == 2) == ("split" in shipped.options or shipped.kernel == "merge")
    return launches[1] if shipped.kernel == "merge" else launches[0]


def launch_of(shipped: Shipped, device: Device) -> Launch:
    """The launch of a shipped configuration on a device, over tensors on `device="meta"`."""
    dtype = getattr(torch, shipped.dtype)
    entries = _meta(_ROWS, dtype=torch.int32)
    if shipped.kernel == "append":
        k = _meta(_TOKENS, shipped.kv_heads, shipped.k_dim, dtype=dtype)
        v, v_pages = None, None
        if shipped.v_dim:
            v = _meta(_TOKENS, shipped.kv_heads, shipped.v_dim, dtype=dtype)
            v_pages = _pages(shipped, dtype, shipped.v_dim)
        slots = _meta(_TOKENS, dtype=torch.int64)
        return append_launch(k, v, _pages(shipped, dtype, shipped.k_dim), v_pages, slots)
    if shipped.kernel == "copy":
        shape = (_ENTRIES, 1, 2**20 // dtype.itemsize)
        strides = (_UNIT // dtype.itemsize, shape[2], 1)
        if shipped.dtype == "int8":  # a length that no wider word divides
            shape = (_ENTRIES, 1, 2**20 + 1)
        pages = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return copy_launch(pages, entries, entries)
    if shipped.kernel == "checksum":
        words = shipped.page_size * shipped.k_dim // 2
        pieces = 2 * shipped.kv_heads
        tensor = torch.empty_strided(
            (_ENTRIES, _LAYERS, pieces, words),
            (_UNIT // 4, pieces * words, words, 1),
            dtype=dtype,
            device="meta",
        )
        return checksum_launch(tensor, entries, _meta(_ROWS, _LAYERS, dtype=torch.int64), 0)
    return _attention_launch(shipped, device)


def source_of(launch: Launch) -> ASTSource:
    """What Triton's launcher would compile: pointers aligned, integers specialised by value."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name.isupper() or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16:
                continue
        attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def narrow_products(ttir: str, arguments: list[str]) -> list[str]:
    """Products with an entry stride that are not int64: each would overflow on a large pool.

    `arguments`: names of the kernel's arguments in order, constants left out.
    """
    strides = {f"%{n}" for n in arguments if n.endswith("_entry")}
    strides |= {f"%arg{i}" for i, n in enumerate(arguments) if n.endswith("_entry")}
    found = []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%\S+) = (\S+) (.*) : (\S.*)$", re.sub(r" loc\(.*\)$", "", line))
        if match is None:
            continue
        result, operation, operands, kind = match.groups()
        if not strides & set(re.findall(r"%[\w#]+", operands)):
            continue
        if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"):
            strides.add(result)
        elif operation == "arith.muli" and "i32" in kind:
            found.append(line.strip())
    return found


def _resources(compiled: Any, backend: str) -> dict[str, int]:
    """Registers a thread, bytes (on AMD: registers) spilled, bytes of shared memory a block."""
    shared = int(compiled.metadata.shared)
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        vgprs, spilled = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return {"registers": vgprs, "spills": spilled, "shared": shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    # A kernel without calls or local arrays has a stack only for what it spills.
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "spills": stack + local, "shared": shared}


def _cache_file(key: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvpaged" / "aot" / f"{key}.json"


class Job(NamedTuple):
    """One compilation."""

    shipped: Shipped
    target: str
    changed_only: bool


def compile_job(job: Job) -> dict[str, Any]:
    """Compile one configuration for one target, or take it from the cache if `changed_only`."""
    target, device = TARGETS[job.target]
    launch = launch_of(job.shipped, device)
    source = source_of(launch)
    options = launch.options
    inputs = (source.hash(), target, options, triton.__version__, Path(__file__).read_bytes())
    cached = _cache_file(hashlib.sha256(repr(inputs).encode()).hexdigest())
    if job.changed_only and cached.exists():
        return {**json.loads(cached.read_text()), "cached": True}
    started = time.perf_counter()
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - started
    named = [n for n in launch.kernel.arg_names if source.signature[n] != "constexpr"]
    blocks = {k: v for k, v in launch.arguments.items() if k in ("BLOCK_M", "BLOCK_N")}
    result = {
        **job.shipped._asdict(),
        "target": job.target,
        **blocks,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **_resources(compiled, target.backend),
        "shared_limit": device.shared_memory,
        "narrow_products": narrow_products(compiled.asm["ttir"], named),
        "seconds": round(seconds, 2),
    }
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(result))
    partial.replace(cached)
    return {**result, "cached": False}


def one_per_kernel() -> tuple[Shipped, ...]:
    """The first shipped configuration of each kernel."""
    return tuple({s.kernel: s for s in reversed(SHIPPED)}.values())[::-1]


def compile_all(jobs: list[Job], processes: int = 2) -> list[dict[str, Any]]:
    """Compile `jobs` in order, in several processes; progress goes to stderr."""
    results = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for done, result in enumerate(pool.map(compile_job, jobs), start=1):
            results.append(result)
            name = f"{result['kernel']} {result['dtype']} {result['k_dim']} {result['target']}"
            if sys.stderr.isatty():
                print(f"\r{done}/{len(jobs)} {name:40}", end="", file=sys.stderr, flush=True)
    print(f"{len(jobs)} compilations", file=sys.stderr)
    return results


def _title(shipped: Shipped) -> str:
    parts = [shipped.dtype]
    if shipped.kernel in ("append", "decode", "prefill"):
        dims = {shipped.k_dim, shipped.v_dim}
        parts.append("dim " + "/".join(map(str, sorted(dims, reverse=True))))
        parts.append(f"page {shipped.page_size}")
    if shipped.kernel in ("decode", "prefill"):
        parts.append(f"group {shipped.group}")
    if shipped.kernel == "merge":
        parts.append(f"dim {shipped.v_dim}")
    return ", ".join((*parts, *shipped.options))


def _cell(result: dict[str, Any]) -> str:
    tile = "x".join(str(result[k]) for k in ("BLOCK_M", "BLOCK_N") if k in result)
    launch = f"{result['num_warps']}w {result['num_stages']}s"
    shared = f"{result['shared'] / 1024:.0f} K" if result["shared"] >= 1024 else "0"
    usage = f"{result['registers']} / {result['spills']} / {shared}"
    return f"{tile} {launch}: {usage}" if "BLOCK_M" in result else usage


def document(results: list[dict[str, Any]]) -> str:
    """docs/kernels.md: what the compiler says of each configuration on each target."""
    by_key = {(Shipped(*(r[f] for f in Shipped._fields)), r["target"]): r for r in results}
    lines = [
        "# Kernels as compiled",
        "",
        "Written by `python -m benchmarks.aot` (`make aot`); not edited by hand. Every shipped",
        f"configuration is compiled for every target by Triton {triton.__version__} without a GPU:",
        "that it compiles and what it takes is known, how fast it is isn't.",
        "",
        "A cell is *registers a thread / bytes spilled (gfx942: registers) / shared memory of a",
        "block*; for the attention kernels the tile (queries x tokens), warps and pipeline stages",
        "stand before it. Pools are page-major in units of 256 bytes.",
        "",
        "Configurations that spill: "
        + ", ".join(
            f"{sum(bool(r['spills']) for r in results if r['target'] == t)} on {t}" for t in TARGETS
        )
        + f"; of {len(SHIPPED)}.",
        "",
    ]
    for kernel in dict.fromkeys(s.kernel for s in SHIPPED):
        lines += [f"## {kernel}", "", "| configuration | " + " | ".join(TARGETS) + " |"]
        lines.append("|---" * (len(TARGETS) + 1) + "|")
        for shipped in (s for s in SHIPPED if s.kernel == kernel):
            cells = [_cell(by_key[shipped, target]) for target in TARGETS]
            lines.append(f"| {_title(shipped)} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--changed", action="store_true", help="take unchanged kernels from cache")
    parser.add_argument("--one-per-kernel", action="store_true", help="only the first of each")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    chosen = one_per_kernel() if options.one_per_kernel else SHIPPED
    jobs = [Job(s, target, options.changed) for s in chosen for target in options.targets]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        # Triton's own cache would answer for a compiler that no longer takes the source.
        os.environ["TRITON_CACHE_DIR"] = cache
        results = compile_all(jobs)
    if len(results) == len(SHIPPED) * len(TARGETS):
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(results))
    report = {
        "benchmark": "aot",
        "triton": triton.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "compiled": sum(not r["cached"] for r in results),
        "spilling": [r for r in results if r["spills"] and r["target"].startswith("sm_")],
        "too_large": [r for r in results if r["shared"] > r["shared_limit"]],
        "narrow": [r for r in results if r["narrow_products"]],
        "results": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
