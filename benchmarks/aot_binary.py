"""What a compiled kernel says of itself: resources, occupancy, its main loop."""

import re
import subprocess
import tempfile
from typing import Any

import triton

from benchmarks import sass
from benchmarks.aot_launches import Target

_REGISTERS = 65536
"""32-bit registers of a multiprocessor, on all CUDA targets."""

_RESERVED_SHARED = 1024
"""Bytes of shared memory that the system takes of each block (compute capability 8.0 and up)."""


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


def resources(compiled: Any, backend: str) -> dict[str, int]:
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


def programs_per_sm(found: dict[str, int], target: Target, num_warps: int) -> int:
    """Blocks of a CUDA kernel that a multiprocessor holds, by registers, shared memory and warps.

    Registers are given out in units of 256 a warp (8 a thread).
    """
    registers = -(-found["registers"] // 8) * 8 * sass.LANES * num_warps
    return min(
        _REGISTERS // registers,
        target.shared_of_all // (found["shared"] + _RESERVED_SHARED),
        target.warps // num_warps,
    )


def main_loop(
    cubin: bytes, *, num_warps: int, tile_bytes: float, padded_bytes: float | None = None
) -> dict[str, Any]:
    """The main loop of a kernel over tiles of `tile_bytes` of K and V (with what loads mask out:
    `padded_bytes`), or nothing.
    """
    loop = sass.main_loop(sass.disassemble(cubin))
    if loop is None:
        return {}
    return {
        "instructions": loop.instructions,
        "load_bits": 8 * loop.widest,
        "products": loop.products,
        "barriers": loop.classes.get("BAR", 0),
        "operations_per_byte": round(
            loop.lane_operations(warps=num_warps, tile_bytes=tile_bytes, padded_bytes=padded_bytes),
            2,
        ),
    }
