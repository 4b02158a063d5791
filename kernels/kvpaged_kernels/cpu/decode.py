"""One query token a sequence over its pages: one attention call a grid of pages."""

from typing import NamedTuple

import torch
from torch import Tensor

from kvpaged_kernels.cpu.parts import apply_sinks, attend_part, merge_rows
from kvpaged_kernels.cpu.plan import DecodePlan, Grid


class Lane(NamedTuple):
    """One layer of a decode step whose rows are one grid, all of one length: views, cut beforehand.

    - `k_in`, `v_in`: where the new token's K and V go, `[rows, kv_heads, dim]`.
    - `k`, `v`: all tokens, the new one included, `[rows, kv_heads, tokens, dim]`.
    """

    k_in: Tensor
    v_in: Tensor
    k: Tensor
    v: Tensor


def lane_of(k_pages: Tensor, v_pages: Tensor, plan: DecodePlan) -> Lane:
    """The views of a layer for a plan that has a lane (`DecodePlan.has_lane`)."""
    k, v = (_cells(pages, plan.grids[0]) for pages in (k_pages, v_pages))
    return Lane(k.select(2, -1), v.select(2, -1), k, v)


def fits_lane(lane: Lane, k: Tensor, v: Tensor) -> bool:
    """Whether new K and V plainly have the lane's shape and dtype."""
    return (
        k.shape == lane.k_in.shape
        and v.shape == lane.v_in.shape
        and k.dtype == v.dtype == lane.k_in.dtype
    )


def attend_lane(q: Tensor, lane: Lane, scale: float) -> Tensor:
    """`paged_decode` over a lane, without soft cap and sinks, in the shape models have.

    - `q`: `[rows, q_heads, 1, k_dim]`. Returns `[rows, q_heads, 1, v_dim]`.
    """
    if q.dtype != torch.float32:
        return attend_part(q, lane.k, lane.v, scale=scale)[0]
    packed = q.squeeze(2).unflatten(1, (lane.k.shape[1], -1))
    return attend_part(packed, lane.k, lane.v, scale=scale)[0].flatten(1, 2).unsqueeze(2)


def _cells(pages: Tensor, grid: Grid) -> Tensor:
    stride_entry, stride_head, stride_slot, _ = pages.stride()
    _, heads, _, dim = pages.shape
    return pages.as_strided(
        (grid.count, heads, grid.tokens, dim),
        (grid.step * stride_entry, stride_head, stride_slot, 1),
        pages.storage_offset() + grid.start * stride_entry,
    )


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: DecodePlan,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query token a sequence, as `reference.attention.paged_decode` defines it.

    `plan` stands for the block table, the lengths and the window. K and V are read once: in half
    precision the flash kernel shares a KV head among its group by itself, in fp32 the group is
    packed into the query length, which is faster there (docs/log.md).
    """
    rows, q_heads, _ = q.shape
    kv_heads = k_pages.shape[1]
    packed = q.dtype == torch.float32 or softcap is not None
    queries = q.unflatten(1, (kv_heads, -1)) if packed else q.unsqueeze(2)
    if plan.direct:
        grid = plan.grids[0]
        k, v = _cells(k_pages, grid), _cells(v_pages, grid)
        out, lse = attend_part(queries, k, v, scale=scale, softcap=softcap, bias=grid.bias)
    else:
        out, lse = _merged(queries, k_pages, v_pages, plan, scale, softcap)
    if sinks is not None:
        out = apply_sinks(out, lse, sinks.view(out.shape[1:3]))
    return out.reshape(rows, q_heads, -1).to(q.dtype)


def _merged(
    queries: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: DecodePlan,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The grids of a plan, one call each, merged by row."""
    outs, lses, owners = [], [], []
    for grid in plan.grids:
        mine = queries if grid.rows is None else queries[grid.rows]
        k, v = _cells(k_pages, grid), _cells(v_pages, grid)
        out, lse = attend_part(mine, k, v, scale=scale, softcap=softcap, bias=grid.bias)
        if grid.cells is not None:
            out, lse = out[grid.cells], lse[grid.cells]
        outs.append(out)
        lses.append(lse)
        owners.append(grid.owners)
    if not outs:
        shape = (*queries.shape[:3], v_pages.shape[3])
        return queries.new_zeros(shape), torch.full(shape[:3], -torch.inf)
    return merge_rows(plan.rows, outs, lses, owners)
