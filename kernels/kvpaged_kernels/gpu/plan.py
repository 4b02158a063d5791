"""How a step's decode attention is dealt out to the programs of a persistent grid.

The work of a step is a line: for each row and each KV head of it an *item*, whose tokens are cut
into *units* of one tile. The line is dealt in equal shares to as many programs as the device holds
at a time, wherever that cuts an item; so a long row among short ones keeps no program waiting, and
the grid does not depend on the lengths, which CUDA graphs need. An item that is cut is merged
from its parts; there are at most as many of those as programs, whatever the batch.

The plan is computed on the device from lengths that lie there, once a step, and serves all layers
of a group.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import check_plan, require
from kvpaged_kernels.gpu.configs import ITEM_COST, MIN_SHARE_TOKENS
from kvpaged_kernels.gpu.decode_configs import DecodeConfig, decode_config
from kvpaged_kernels.gpu.launch import Device, Launch, bounded, device_of
from kvpaged_kernels.gpu.primitives import window_begin

_BLOCK_ROWS = 256
_BLOCK_BOUNDARIES = 8


class Shape(NamedTuple):
    """What of a decode decides how it is dealt out.

    Attributes:
        rows: sequences.
        kv_heads, group: KV heads, and query heads on each.
        k_dim, v_dim: widths.
        page_size: token slots a page.
        max_q: the most queries a row has.
        window: tokens a query sees, itself included; `None`: all.
        dtype: of pages.
    """

    rows: int
    kv_heads: int
    group: int
    k_dim: int
    v_dim: int
    page_size: int
    max_q: int
    window: int | None
    dtype: torch.dtype


class DecodePlan(NamedTuple):
    """The shares of a step's decode.

    Attributes:
        records: int32 `[programs + 1, 4]`: where each program's share begins, as item (row times
            `heads` plus head), unit in the item, and the last program with a part of that item;
            the fourth is unused. The last record is where the last program's share ends.
        heads: items of a row: KV heads times tiles of queries.
        config: the launch configuration, which fixes the size of a unit.
        shape: what it was made for.
        arch: the device's architecture.
    """

    records: Tensor
    heads: int
    config: DecodeConfig
    shape: Shape
    arch: str

    @property
    def programs(self) -> int:
        """Programs of the persistent grid."""
        return self.records.shape[0] - 1


@triton.jit
def row_tokens(row, mask, seq_lens, cu_q, window, ALIGN: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Length of a row, its queries, and the first token that they read; all 0 where not `mask`."""
    length = tl.load(seq_lens + row, mask=mask, other=0)
    queries = length * 0 + 1
    if cu_q is not None:
        after = tl.load(cu_q + row + 1, mask=mask, other=0)
        queries = after - tl.load(cu_q + row, mask=mask, other=0)
    begin = length * 0
    if HAS_WINDOW:
        begin = window_begin(length - queries, window, ALIGN)
    return length, queries, begin


@triton.jit
def _row_costs(
    row, mask, seq_lens, cu_q, window,
    GROUP: tl.constexpr, TILES_M: tl.constexpr, TILE_M: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr, ITEM_COST: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Of a row: the cost of an item that reads (its units, and what beginning and ending it costs),
    how many of a KV head's tiles of queries do, and the cost of all of that KV head's; 0 where not
    `mask`. A tile without queries reads nothing and costs `ITEM_COST`.
    """
    length, queries, begin = row_tokens(row, mask, seq_lens, cu_q, window, ALIGN, HAS_WINDOW)
    reading = tl.minimum(tl.cdiv(queries * GROUP, TILE_M), TILES_M)
    item = tl.cdiv(tl.maximum(length - begin, 0), TILE) + ITEM_COST
    of_head = reading * item.to(tl.int64) + (TILES_M - reading) * ITEM_COST
    return item, reading, tl.where(mask, of_head, 0)


@triton.jit(do_not_specialize=["rows", "programs", "window"])
def _plan(
    seq_lens,
    cu_q,
    records,
    rows,
    programs,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILES_M: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
    ITEM_COST: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Find the item and unit at each multiple of a share; each program does `BLOCK_P` of them.

    Every program sums all costs itself: cheaper than a second launch to hand sums over.
    """
    index = tl.arange(0, BLOCK_R)
    total = tl.sum(index.to(tl.int64) * 0, 0)
    for first in range(0, rows, BLOCK_R):
        row = first + index
        _, _, cost = _row_costs(
            row, row < rows, seq_lens, cu_q, window,
            GROUP, TILES_M, TILE_M, TILE, ALIGN, ITEM_COST, HAS_WINDOW,
        )  # fmt: skip
        total += tl.sum(cost, 0) * KV_HEADS

    share = tl.maximum(tl.cdiv(total, programs), MIN_SHARE)
    boundary = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    at = boundary * share
    row_at = boundary * 0
    row_start = at * 0
    before = total * 0
    for first in range(0, rows, BLOCK_R):
        row = first + index
        _, _, cost = _row_costs(
            row, row < rows, seq_lens, cu_q, window,
            GROUP, TILES_M, TILE_M, TILE, ALIGN, ITEM_COST, HAS_WINDOW,
        )  # fmt: skip
        ends = before + tl.cumsum(cost, 0) * KV_HEADS
        done = (ends[None, :] <= at[:, None]) & (row < rows)[None, :]
        row_at += tl.sum(done.to(tl.int32), 1)
        row_start = tl.maximum(row_start, tl.max(tl.where(done, ends[None, :], 0), 1))
        before += tl.sum(cost, 0) * KV_HEADS

    inside = row_at < rows
    item, reading, of_head = _row_costs(
        row_at, inside, seq_lens, cu_q, window,
        GROUP, TILES_M, TILE_M, TILE, ALIGN, ITEM_COST, HAS_WINDOW,
    )  # fmt: skip
    of_head = tl.maximum(of_head, 1)
    head = tl.where(inside, (at - row_start) // of_head, 0)
    rest = at - row_start - head * of_head
    # Tiles that read come first; a boundary among the others is at the beginning of one.
    idle = tl.maximum(rest - reading * item.to(tl.int64), 0) // ITEM_COST
    tile = tl.where(rest < reading * item.to(tl.int64), rest // item, reading + idle)
    begun = rest - tl.minimum(tile, reading) * item.to(tl.int64)
    unit = tl.where(tile < reading, tl.maximum(begun - ITEM_COST, 0), 0)
    end = row_start + head * of_head + (tile + 1) * item
    last = tl.minimum(tl.cdiv(end, share), programs) - 1
    record = records + boundary * 4
    mask = boundary <= programs
    tile = tl.where(inside, tile, 0)
    number = row_at * (KV_HEADS * TILES_M) + head * TILES_M + tile
    tl.store(record, number.to(tl.int32), mask=mask)
    tl.store(record + 1, tl.where(inside, unit, 0).to(tl.int32), mask=mask)
    tl.store(record + 2, last.to(tl.int32), mask=mask)
    tl.store(record + 3, boundary * 0, mask=mask)


def config_of(shape: Shape, device: Device) -> DecodeConfig:
    """The table's configuration for a decode on a device."""
    return decode_config(
        device.arch, device.shared_memory, element=shape.dtype.itemsize, k_dim=shape.k_dim,
        v_dim=shape.v_dim, rows=shape.group * shape.max_q, page_size=shape.page_size,
    )  # fmt: skip


def plan_launch(
    shape: Shape,
    seq_lens: Tensor,
    cu_q: Tensor | None,
    device: Device,
    config: DecodeConfig | None = None,
) -> tuple[DecodePlan, Launch]:
    """The plan of a step, and the launch that fills it in; `config` takes the table's place."""
    config = config or config_of(shape, device)
    tiles_m = triton.cdiv(shape.group * shape.max_q, config.block_m)
    heads = shape.kv_heads * tiles_m
    programs = device.multiprocessors * config.programs_per_sm
    records = torch.empty(programs + 1, 4, dtype=torch.int32, device=seq_lens.device)
    least = triton.cdiv(max(MIN_SHARE_TOKENS, 2 * shape.page_size), config.block_n)
    arguments: dict[str, Any] = {
        "seq_lens": seq_lens,
        "cu_q": cu_q,
        "records": records,
        "rows": shape.rows,
        "programs": programs,
        "window": bounded(shape.window),
        "KV_HEADS": shape.kv_heads,
        "GROUP": shape.group,
        "TILES_M": tiles_m,
        "TILE_M": config.block_m,
        "TILE": config.block_n,
        "ALIGN": min(shape.page_size, config.block_n),
        "ITEM_COST": ITEM_COST,
        "MIN_SHARE": least + ITEM_COST,
        "HAS_WINDOW": shape.window is not None,
        "BLOCK_R": min(_BLOCK_ROWS, max(16, triton.next_power_of_2(shape.rows))),
        "BLOCK_P": _BLOCK_BOUNDARIES,
    }
    grid = (triton.cdiv(programs + 1, _BLOCK_BOUNDARIES),)
    launch = Launch(kernel=_plan, grid=grid, arguments=arguments)
    return DecodePlan(records, heads, config, shape, device.arch), launch


def plan_decode(
    shape: Shape, seq_lens: Tensor, cu_q: Tensor | None = None, *, records: Tensor | None = None
) -> DecodePlan:
    """Deal the decode attention of a step out to the device, without asking the host for lengths.

    - `shape`: what is decoded.
    - `seq_lens`: int32 `[rows]`, tokens of each row with its queries' own.
    - `cu_q`: int32 `[rows + 1]`, where each row's queries begin, or None: one a row.
    - `records`: those of an earlier plan of the same lengths, which then are not worked out again.

    The plan serves every layer of this shape. Raises ValueError where shapes, dtypes or devices
    disagree.
    """
    check_plan(seq_lens, cu_q, rows=shape.rows, max_q=shape.max_q, window=shape.window)
    plan, launch = plan_launch(shape, seq_lens, cu_q, device_of(seq_lens))
    if records is not None:
        fits = records.shape == plan.records.shape and records.dtype == torch.int32
        require(
            fits and records.is_contiguous() and records.device == seq_lens.device,
            f"records of a plan of {shape} must be contiguous int32 {tuple(plan.records.shape)} "
            f"on {seq_lens.device}, got {records.dtype} {tuple(records.shape)} of strides "
            f"{records.stride()} on {records.device}",
        )
        return plan._replace(records=records)
    launch.run(seq_lens.device)
    return plan
