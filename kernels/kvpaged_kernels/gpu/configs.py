"""Launch configurations of the kernels, as data (of `paged_decode`: `decode_configs`).

Blocks are chosen by the width of an element and the padded head dimension, and the depth of the
pipeline by what then fits into the device's shared memory. The numbers come from compiling for each
target without spilling a register; none has been timed on a GPU yet.
"""

from typing import NamedTuple

from kvpaged_kernels.gpu.decode_configs import padded

MIN_SHARE_TOKENS = 128
"""The least work of a program of a decode, in tokens (and not under two pages): below that a part
costs more to write and merge than it saves."""

ITEM_COST = 1
"""What beginning and ending a row's head costs a decode, in tiles."""


class Blocks(NamedTuple):
    """Tile sizes in rows of queries (`m`) and tokens (`n`), warps, stages of the pipeline."""

    m: int
    n: int
    num_warps: int
    num_stages: int


_PREFILL = {
    (2, 64): Blocks(128, 64, 8, 3),
    (2, 128): Blocks(64, 32, 4, 3),
    (2, 256): Blocks(64, 32, 8, 3),
    (4, 64): Blocks(32, 32, 8, 1),
    (4, 128): Blocks(16, 32, 8, 1),
    (4, 256): Blocks(16, 32, 8, 1),
}
# Devices whose wide multiplications (wgmma, tcgen05) read K and V from shared memory and not from
# registers take larger tiles. They are the ones with this much shared memory.
_WIDE_SHARED_MEMORY = 200 * 1024
_PREFILL_WIDE = {
    (2, 64): Blocks(128, 128, 8, 3),
    (2, 128): Blocks(128, 64, 8, 3),
    (2, 256): Blocks(128, 32, 8, 2),
}


def _fit(blocks: Blocks, element: int, k_dim: int, v_dim: int, shared_memory: int) -> Blocks:
    """`blocks` with the stages that fit: n stages keep n - 1 tiles of K and V in shared memory.

    The queries and the probabilities take room too. (Hopper's and Blackwell's wide multiplications
    keep one tile more; there the limit is far.)
    """
    fixed = blocks.m * (padded(k_dim) + blocks.n) * element
    tile = blocks.n * (padded(k_dim) + padded(v_dim)) * element
    tiles = max(0, shared_memory - fixed) // tile
    return blocks._replace(num_stages=max(1, min(blocks.num_stages, tiles + 1)))


def prefill_blocks(element: int, k_dim: int, v_dim: int, shared_memory: int) -> Blocks:
    """Blocks of `paged_prefill` for elements of `element` bytes."""
    key = element, max(64, padded(max(k_dim, v_dim)))
    blocks = _PREFILL[key]
    if shared_memory >= _WIDE_SHARED_MEMORY:
        blocks = _PREFILL_WIDE.get(key, blocks)
    return _fit(blocks, element, k_dim, v_dim, shared_memory)


class Shipped(NamedTuple):
    """A specialisation that is compiled ahead of time for every target, at most 90 in all.

    `options` names what is on, of window, softcap, sinks, alibi and, for decode, queries (up to 8 a
    row), for seal, queries that are known; of the kernels of sealed pages, how K and V are coded
    comes first. `v_dim` 0 is a group
    without V. Blocks, warps and stages are those the launcher chooses.
    """

    kernel: str
    dtype: str
    k_dim: int = 128
    v_dim: int = 128
    page_size: int = 64
    kv_heads: int = 8
    group: int = 4
    options: tuple[str, ...] = ()


SHIPPED = (
    Shipped("append", "bfloat16"),
    Shipped("append", "float32", 64, 64, 16, 3),
    Shipped("append", "bfloat16", 64, 0, 64, 1),
    Shipped("copy", "int64"),
    Shipped("copy", "int8"),
    Shipped("checksum", "int32", 128, 128, 64),
    Shipped("transfer", "int64"),
    Shipped("plan", "int32"),
    Shipped("plan", "int32", 128, 128, 64, 8, 4, ("window", "queries")),
    Shipped("merge", "bfloat16", 128, 128),
    Shipped("merge", "float32", 256, 256, 64, 4, 4, ("window", "sinks")),
    # Plain models, by head dimension, element and page size.
    Shipped("decode", "bfloat16", 128, 128, 64, 8, 4),
    Shipped("decode", "bfloat16", 128, 128, 16, 8, 4),
    Shipped("decode", "bfloat16", 128, 128, 128, 8, 16),
    Shipped("decode", "bfloat16", 128, 128, 256, 1, 48),
    Shipped("decode", "float8_e4m3fn", 128, 128, 64, 8, 4),
    Shipped("decode", "float8_e4m3fn", 128, 128, 16, 8, 4),
    Shipped("decode", "float8_e4m3fn", 64, 64, 64, 8, 8, ("window", "sinks")),
    Shipped("decode", "bfloat16", 64, 64, 64, 3, 3),
    Shipped("decode", "bfloat16", 64, 64, 16, 3, 3),
    Shipped("decode", "bfloat16", 80, 80, 64, 32, 1),
    Shipped("decode", "bfloat16", 96, 96, 64, 32, 1),
    Shipped("decode", "bfloat16", 192, 128, 64, 16, 1),
    Shipped("decode", "bfloat16", 256, 256, 64, 1, 4),
    Shipped("decode", "float16", 128, 128, 64, 8, 4),
    Shipped("decode", "float32", 64, 64, 64, 3, 3),
    Shipped("decode", "float32", 128, 128, 64, 8, 4),
    Shipped("decode", "float32", 256, 256, 64, 1, 4),
    # Models with options: Mistral, Gemma 2 (window and full layers), Gemma 3, GPT-OSS.
    Shipped("decode", "bfloat16", 128, 128, 64, 8, 4, ("window",)),
    Shipped("decode", "bfloat16", 256, 256, 64, 4, 2, ("window", "softcap")),
    Shipped("decode", "bfloat16", 64, 64, 64, 8, 8, ("window", "sinks")),
    Shipped("decode", "bfloat16", 128, 128, 64, 32, 1, ("alibi",)),
    Shipped("decode", "bfloat16", 128, 128, 64, 8, 4, ("queries",)),
    Shipped("decode", "bfloat16", 128, 128, 16, 8, 8, ("queries",)),
    Shipped("decode", "bfloat16", 64, 64, 64, 8, 8, ("queries",)),
    Shipped("decode", "bfloat16", 256, 256, 64, 1, 8, ("queries",)),
    Shipped("decode", "float8_e4m3fn", 128, 128, 64, 8, 8, ("queries",)),
    Shipped("decode", "float32", 128, 128, 64, 8, 8, ("queries",)),
    Shipped("decode", "bfloat16", 128, 128, 64, 8, 8, ("window", "softcap", "sinks", "queries")),
    Shipped("decode", "bfloat16", 128, 128, 16, 8, 4, ("window", "softcap", "sinks", "alibi")),
    Shipped("prefill", "bfloat16", 128, 128, 64, 8, 4),
    Shipped("prefill", "bfloat16", 128, 128, 16, 8, 4),
    Shipped("prefill", "bfloat16", 64, 64, 64, 3, 3),
    Shipped("prefill", "bfloat16", 80, 80, 64, 32, 1),
    Shipped("prefill", "bfloat16", 96, 96, 64, 32, 1),
    Shipped("prefill", "bfloat16", 192, 128, 64, 16, 1),
    Shipped("prefill", "bfloat16", 256, 256, 64, 1, 4),
    Shipped("prefill", "float16", 128, 128, 64, 8, 4),
    Shipped("prefill", "float32", 64, 64, 64, 3, 3),
    Shipped("prefill", "float32", 128, 128, 64, 8, 4),
    Shipped("prefill", "float32", 256, 256, 64, 1, 4),
    Shipped("prefill", "bfloat16", 128, 128, 64, 8, 4, ("window",)),
    Shipped("prefill", "bfloat16", 256, 256, 64, 4, 2, ("window", "softcap")),
    Shipped("prefill", "bfloat16", 64, 64, 64, 8, 8, ("window", "sinks")),
    *(
        Shipped(kernel, "bfloat16", dim, dim, 64, 8, 4, codes)
        for kernel in ("seal", "mixed decode", "mixed prefill")
        for dim in (128, 64)
        for codes in (("int4", "int4"), ("int8", "int8"), ("fp8", "fp8"), ("int8", "int4"))
    ),
    Shipped("seal", "bfloat16", 128, 128, 64, 8, 4, ("int4", "int4", "queries")),
    Shipped("seal", "bfloat16", 64, 64, 64, 3, 3, ("int4", "int4", "queries")),
    Shipped("seal", "bfloat16", 256, 256, 64, 1, 4, ("int4", "int4", "queries")),
    Shipped("mixed decode", "bfloat16", 128, 128, 64, 8, 8, ("int4", "int4")),
    Shipped("mixed decode", "bfloat16", 64, 64, 64, 8, 8, ("int4", "int4", "window", "sinks")),
)
"""What is compiled ahead of time; the first of each kernel stands for it in the test suite."""
