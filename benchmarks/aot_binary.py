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


_VALUE = re.compile(r"\s*(%\S+) = (\S+) (.*) : (\S.*)$")
_CONSTANT = re.compile(r"dense<(-?\d+)>|^(-?\d+)$")


def _operations(ttir: str) -> list[tuple[str, str, str, str]]:
    """Result, operation, operands and type of each line that has them."""
    lines = (re.sub(r" loc\(.*\)$", "", line) for line in ttir.splitlines())
    found = (_VALUE.match(line) for line in lines)
    return [(m[1], m[2], m[3], m[4]) for m in found if m is not None]


def narrow_products(ttir: str, arguments: list[str]) -> list[str]:
    """Products with an entry stride that are not int64: each would overflow on a large pool.

    `arguments`: names of the kernel's arguments in order, constants left out. Strides that are
    constants are looked for by `wide_products`.
    """
    strides = {f"%{n}" for n in arguments if n.endswith("_entry")}
    strides |= {f"%arg{i}" for i, n in enumerate(arguments) if n.endswith("_entry")}
    found = []
    for result, operation, operands, kind in _operations(ttir):
        if not strides & set(re.findall(r"%[\w#]+", operands)):
            continue
        if operation in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi"):
            strides.add(result)
        elif operation == "arith.muli" and "i32" in kind:
            found.append(f"{result} = {operation} {operands} : {kind}")
    return found


def wide_products(ttir: str, stride: int) -> tuple[int, int]:
    """How many products by a constant entry stride are int64, and how many int32.

    The stride must be a number that nothing else in the kernel is multiplied by.
    """
    constants = set()
    wide = narrow = 0
    for result, operation, operands, kind in _operations(ttir):
        if operation == "arith.constant":
            value = _CONSTANT.search(operands.strip())
            if value and int(value[1] or value[2]) == stride:
                constants.add(result)
        elif operation == "arith.muli" and constants & set(re.findall(r"%[\w#]+", operands)):
            wide += "i64" in kind
            narrow += "i32" in kind
    return wide, narrow


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
