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
from kvpaged_kernels.gpu.launch import Device, Launch, device_of
from kvpaged_kernels.gpu.primitives import window_begin

_BLOCK_ROWS = 256
_BLOCK_BOUNDARIES = 32


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
def _item_cost(
    row, mask, seq_lens, cu_q, window,
    TILE: tl.constexpr, ALIGN: tl.constexpr, ITEM_COST: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Units of one item of a row, and what beginning and ending it costs; 0 where not `mask`."""
    length, queries, begin = row_tokens(row, mask, seq_lens, cu_q, window, ALIGN, HAS_WINDOW)
    units = tl.where(queries > 0, tl.cdiv(tl.maximum(length - begin, 0), TILE), 0)
    return tl.where(mask, units + ITEM_COST, 0).to(tl.int64)


@triton.jit
def _plan(
    seq_lens,
    cu_q,
    records,
    rows,
    programs,
    window,
    HEADS: tl.constexpr,
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
        cost = _item_cost(
            row, row < rows, seq_lens, cu_q, window, TILE, ALIGN, ITEM_COST, HAS_WINDOW
        )
        total += tl.sum(cost, 0) * HEADS

    share = tl.maximum(tl.cdiv(total, programs), MIN_SHARE)
    boundary = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    at = boundary * share
    row_at = boundary * 0
    row_start = at * 0
    before = total * 0
    for first in range(0, rows, BLOCK_R):
        row = first + index
        cost = _item_cost(
            row, row < rows, seq_lens, cu_q, window, TILE, ALIGN, ITEM_COST, HAS_WINDOW
        )
        ends = before + tl.cumsum(cost, 0) * HEADS
        done = (ends[None, :] <= at[:, None]) & (row < rows)[None, :]
        row_at += tl.sum(done.to(tl.int32), 1)
        row_start = tl.maximum(row_start, tl.max(tl.where(done, ends[None, :], 0), 1))
        before += tl.sum(cost, 0) * HEADS

    inside = row_at < rows
    cost = tl.maximum(
        _item_cost(row_at, inside, seq_lens, cu_q, window, TILE, ALIGN, ITEM_COST, HAS_WINDOW), 1
    )
    head = tl.where(inside, (at - row_start) // cost, 0)
    unit = tl.maximum(at - row_start - head * cost - ITEM_COST, 0)
    last = tl.minimum(tl.cdiv(row_start + (head + 1) * cost, share), programs) - 1
    record = records + boundary * 4
    mask = boundary <= programs
    tl.store(record, (row_at * HEADS + head).to(tl.int32), mask=mask)
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
    heads = shape.kv_heads * triton.cdiv(shape.group * shape.max_q, config.block_m)
    programs = device.multiprocessors * config.programs_per_sm
    records = torch.empty(programs + 1, 4, dtype=torch.int32, device=seq_lens.device)
    least = triton.cdiv(max(MIN_SHARE_TOKENS, 2 * shape.page_size), config.block_n)
    arguments: dict[str, Any] = {
        "seq_lens": seq_lens,
        "cu_q": cu_q,
        "records": records,
        "rows": shape.rows,
        "programs": programs,
        "window": shape.window or 0,
        "HEADS": heads,
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
        require(
            records.shape == plan.records.shape,
            f"records of a plan of {shape} must be {tuple(plan.records.shape)}, got "
            f"{tuple(records.shape)}",
        )
        return plan._replace(records=records)
    launch.run(seq_lens.device)
    return plan
