"""What a compiled kernel does in its main loop: instructions, loads, tensor-core products.

    python -m benchmarks.sass FILE.cubin

The machine code of a kernel is disassembled with the tools that come with Triton. Loops are
backward branches; the *main loop* is the innermost loop with the most tensor-core products, of
several with as many the one with the widest traffic from global memory, and then the one with the
fewest instructions (a kernel may hold the same loop again with masks, for the ends of a range).
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

LANES = 32
"""Threads of a warp: an instruction is this many lane operations."""

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)$")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_WIDTH = re.compile(r"\.(128|64|U8|S8|U16|S16)\b")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_PRODUCTS = ("HGMMA", "HMMA", "QGMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA")


class Instruction(NamedTuple):
    """One machine instruction: where it is, its name with modifiers, its operands."""

    address: int
    name: str
    operands: str

    @property
    def loaded_bytes(self) -> int:
        """Bytes a lane loads from global memory; 0 for every other instruction."""
        if not self.name.startswith(("LDG.", "LDGSTS")):
            return 0
        width = _WIDTH.search(self.name)
        return _BYTES[width[1]] if width else 4


class Loop(NamedTuple):
    """A loop of a kernel, as counted statically.

    Attributes:
        instructions: machine instructions of one turn, no-ops left out.
        loads: how many load instructions there are by bytes a lane.
        products: tensor-core instructions by kind.
        classes: instructions by name without modifiers.
    """

    instructions: int
    loads: dict[int, int]
    products: dict[str, int]
    classes: dict[str, int]

    @property
    def widest(self) -> int:
        """Bytes a lane of the widest load: K and V; narrower loads are page numbers and scales."""
        return max(self.loads, default=0)

    @property
    def warp_bytes(self) -> int:
        """Bytes that one warp loads from global memory in a turn by the widest loads."""
        return LANES * self.widest * self.loads.get(self.widest, 0)

    def lane_operations(
        self, *, warps: int, tile_bytes: float, padded_bytes: float | None = None
    ) -> float:
        """Lane operations a byte of K and V.

        `tile_bytes`: K and V of one tile, which the block's `warps` share; `padded_bytes`: with
        what its loads mask out. A turn may hold several tiles (the compiler unrolls): as many as
        its loads carry.
        """
        tiles = max(1, round(self.warp_bytes * warps / (padded_bytes or tile_bytes)))
        return self.instructions * LANES * warps / (tiles * tile_bytes)


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout


def loops(text: str) -> list[Loop]:
    """The innermost loops of disassembled code, in order."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            address = int(found[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            code.append(Instruction(address, found[2], found[3]))
    spans = []
    for instruction in code:
        target = _TARGET.search(instruction.operands)
        if not instruction.name.startswith("BRA") or target is None:
            continue
        begin = labels.get(target[1])
        # A branch to itself is the padding after a kernel's end.
        if begin is not None and begin < instruction.address:
            spans.append((begin, instruction.address))
    innermost = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    return [_count([i for i in code if a <= i.address <= b]) for a, b in innermost]


def _count(body: list[Instruction]) -> Loop:
    names = Counter(i.name.split(".")[0] for i in body if i.name != "NOP")
    return Loop(
        instructions=sum(names.values()),
        loads=dict(Counter(i.loaded_bytes for i in body if i.loaded_bytes)),
        products={name: names[name] for name in _PRODUCTS if names[name]},
        classes=dict(names.most_common()),
    )


def main_loop(text: str) -> Loop | None:
    """The loop that matters; `None` for straight code."""
    found = [loop for loop in loops(text) if loop.warp_bytes]
    if not found:
        return None
    return max(
        found,
        key=lambda loop: (sum(loop.products.values()), loop.warp_bytes, -loop.instructions),
    )


if __name__ == "__main__":
    print(main_loop(disassemble(Path(sys.argv[1]).read_bytes())))
