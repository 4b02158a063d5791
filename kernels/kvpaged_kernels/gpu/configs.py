"""Launch configurations of the kernels, as data.

Blocks are chosen by the width of an element and the padded head dimension, and the depth of the
pipeline by what then fits into the device's shared memory. The numbers come from compiling for each
target without spilling a register; none has been timed on a GPU yet.
"""

from typing import NamedTuple

MAX_SPLITS = 128
"""Partial results of one query that the merge reads at a time; bounds split-KV."""


class Blocks(NamedTuple):
    """Tile sizes in rows of queries (`m`) and tokens (`n`), warps, stages of the pipeline."""

    m: int
    n: int
    num_warps: int
    num_stages: int


# (bytes of an element, padded head dimension) -> blocks; `m` of decode follows the GQA group.
_DECODE = {
    (2, 64): Blocks(16, 64, 4, 4),
    (2, 128): Blocks(16, 64, 4, 4),
    (2, 256): Blocks(16, 32, 4, 4),
    (4, 64): Blocks(16, 32, 4, 2),
    (4, 128): Blocks(16, 32, 4, 2),
    (4, 256): Blocks(16, 16, 4, 2),
}
_PREFILL = {
    (2, 64): Blocks(128, 64, 4, 3),
    (2, 128): Blocks(128, 64, 8, 3),
    (2, 256): Blocks(64, 32, 4, 3),
    (4, 64): Blocks(64, 32, 8, 2),
    (4, 128): Blocks(64, 32, 8, 2),
    (4, 256): Blocks(64, 16, 8, 2),
}


def padded(dim: int) -> int:
    """The tile width of a head dimension: a power of two, at least 16 as `tl.dot` needs."""
    return max(16, 1 << (dim - 1).bit_length())


def _fit(blocks: Blocks, element: int, k_dim: int, v_dim: int, shared_memory: int) -> Blocks:
    """`blocks` with as many stages as leave room for the queries and the probabilities."""
    fixed = blocks.m * (padded(k_dim) + blocks.n) * element
    stage = blocks.n * (padded(k_dim) + padded(v_dim)) * element
    stages = (shared_memory - fixed) // stage
    return blocks._replace(num_stages=max(1, min(blocks.num_stages, stages)))


def decode_blocks(element: int, k_dim: int, v_dim: int, group: int, shared_memory: int) -> Blocks:
    """Blocks of `paged_decode` for elements of `element` bytes and a GQA group of `group`."""
    blocks = _DECODE[element, max(64, padded(max(k_dim, v_dim)))]
    rows = min(64, padded(group))
    return _fit(blocks._replace(m=rows), element, k_dim, v_dim, shared_memory)


def prefill_blocks(element: int, k_dim: int, v_dim: int, shared_memory: int) -> Blocks:
    """Blocks of `paged_prefill` for elements of `element` bytes."""
    blocks = _PREFILL[element, max(64, padded(max(k_dim, v_dim)))]
    return _fit(blocks, element, k_dim, v_dim, shared_memory)


def min_split_tokens(page_size: int) -> int:
    """The least work of a split, in tokens: two pages, and not under 128.

    Below that a split costs more in launch and merge than it saves.
    """
    return max(2 * page_size, 128)


def split_count(
    max_len: int, page_size: int, programs: int, multiprocessors: int, window: int | None
) -> int:
    """How many splits of the KV range give every multiprocessor two programs.

    `programs` is the number of programs without splitting. The count is bounded by the work there
    is for the longest row, of which a window leaves `window` tokens and the rest of a page.
    """
    tokens = max_len if window is None else min(max_len, window + page_size)
    wanted = -(-2 * multiprocessors // max(1, programs))
    possible = tokens // min_split_tokens(page_size)
    return max(1, min(wanted, possible, MAX_SPLITS))
