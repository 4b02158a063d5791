"""The launch configurations of `paged_decode`: a table, and how it is read.

`decode_configs.json` holds one entry for each (architecture, element, head dimension, page size,
rows of queries) that was compiled or measured, with where it comes from; `make gpu` writes it anew
for the device it runs on. Where nothing fits exactly the nearest entry is taken:

1. the same bytes an element;
2. the same maker: of its architectures the highest that isn't above the device's, else the lowest
   (a kernel that suits an older device suits a newer one better than the reverse);
3. the nearest head dimension, then the nearest number of rows, then the nearest page size, each by
   the difference of logarithms, the larger one on a tie (larger tiles are shrunk, below).

Then tiles and stages are reduced to what fits into the device's shared memory.
"""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("decode_configs.json")
MAX_ROWS = 64
"""Queries times group in one tile; more take several tiles, which read K and V again."""


def most_rows(element: int, head_dim: int) -> int:
    """The same for elements of these bytes and a padded head dimension: what spills nothing.

    e4m3 has two operands and two results, a head of 256 a wide one, and without tensor cores (fp32)
    a result lies in registers twice.
    """
    return {1: 32, 4: 16}.get(element, 32 if head_dim >= 256 else MAX_ROWS)


class DecodeConfig(NamedTuple):
    """How `paged_decode` is launched.

    Attributes:
        block_m: rows of queries in a tile, padded.
        block_n: tokens in a tile.
        num_warps, num_stages: of a program, of its pipeline.
        programs_per_sm: programs of the persistent grid on each multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    @property
    def max_registers(self) -> int:
        """Registers a thread may have on NVIDIA if so many programs are to fit: of 65,536 a
        multiprocessor, given out in eights. All there are for the widest tile, whose
        multiplications (wgmma) refuse to be short of them.
        """
        if self.block_m >= MAX_ROWS:
            return 255
        share = 65536 // (self.programs_per_sm * self.num_warps * 32)
        return max(128, min(255, share // 8 * 8))


class Entry(NamedTuple):
    """One line of the table.

    Attributes:
        arch: `sm_90`, `gfx942`.
        element: bytes of an element of K and V.
        head_dim: the wider of K's and V's dimension, padded to a power of two.
        rows: `block_m`.
        page_size: token slots a page.
        block_n, num_warps, num_stages, programs_per_sm: as in `DecodeConfig`.
        origin: `compiled` (chosen by what the compiler says) or the device it was measured on.
    """

    arch: str
    element: int
    head_dim: int
    rows: int
    page_size: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    origin: str


def padded(dim: int) -> int:
    """The tile width of a dimension: a power of two, at least 16 as `tl.dot` needs."""
    return max(16, 1 << (dim - 1).bit_length())


@cache
def table() -> tuple[Entry, ...]:
    """All entries."""
    return tuple(Entry(**line) for line in json.loads(TABLE.read_text()))


def table_text(entries: list[Entry]) -> str:
    """Entries as the file has them: sorted, one a line."""
    lines = ",\n".join(f" {json.dumps(entry._asdict())}" for entry in sorted(set(entries)))
    return f"[\n{lines}\n]\n"


def write_table(entries: list[Entry]) -> None:
    """Replace the table."""
    TABLE.write_text(table_text(entries))
    table.cache_clear()
    _nearest.cache_clear()


def _maker_and_number(arch: str) -> tuple[str, int]:
    found = re.fullmatch(r"(sm_|gfx)([0-9a-f]+)", arch)
    if found is None:
        raise ValueError(f"an architecture is sm_<number> or gfx<number>, got {arch!r}")
    return found[1], int(found[2], 10 if found[1] == "sm_" else 16)


@cache
def _nearest(arch: str, element: int, head_dim: int, rows: int, page_size: int) -> Entry:
    maker, number = _maker_and_number(arch)
    fitting = [e for e in table() if e.element == element]
    if not fitting:
        raise ValueError(f"{TABLE.name} has no entry for elements of {element} bytes")
    same_maker = [e for e in fitting if _maker_and_number(e.arch)[0] == maker] or fitting

    def distance(entry: Entry) -> tuple[float, ...]:
        above = _maker_and_number(entry.arch)[1] - number
        key: tuple[float, ...] = (above > 0, abs(above))
        for mine, wanted in (
            (entry.head_dim, head_dim), (entry.rows, rows), (entry.page_size, page_size),
        ):  # fmt: skip
            key = (*key, abs(math.log2(mine / wanted)), -mine)
        return key

    return min(same_maker, key=distance)


def shared_bytes(block_n: int, stages: int, rows: int, dims: int, element: int) -> int:
    """Shared memory of a program: n stages keep n - 1 tiles of K and V, beside queries and
    probabilities.

    `dims`: K's and V's padded dimensions together. What the compiler says is up to a few KiB less.
    """
    return (stages - 1) * block_n * dims * element + rows * (dims + block_n) * element


def decode_config(
    arch: str,
    shared_memory: int,
    *,
    element: int,
    k_dim: int,
    v_dim: int,
    rows: int,
    page_size: int,
) -> DecodeConfig:
    """The configuration for a device of this architecture and shared memory a block, in bytes.

    `rows`: the most queries of a row of the batch, times the group.
    """
    head_dim = max(64, padded(max(k_dim, v_dim)))
    block_m = min(most_rows(element, head_dim), padded(rows))
    entry = _nearest(arch, element, head_dim, block_m, page_size)
    block_n, stages = entry.block_n, entry.num_stages
    dims = padded(k_dim) + padded(v_dim)
    while shared_bytes(block_n, stages, block_m, dims, element) > shared_memory:
        if stages > 2:
            stages -= 1
        elif block_n > 16:
            block_n //= 2
        else:
            stages = 1
            break
    each = shared_bytes(block_n, stages, block_m, dims, element)
    programs = max(1, min(entry.programs_per_sm, shared_memory // max(1, each)))
    return DecodeConfig(block_m, block_n, entry.num_warps, stages, programs)
