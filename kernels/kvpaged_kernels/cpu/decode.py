"""One query token a sequence over its pages: one attention call a grid of pages."""

import torch
from torch import Tensor

from kvpaged_kernels.cpu.parts import apply_sinks, attend_part, merge_rows, packs_group
from kvpaged_kernels.cpu.plan import DecodePlan, cell_tokens, trunk_tokens


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

    `plan` stands for the block table, the lengths and the window. K and V are read once: the group
    is packed into the query length, or the flash kernel shares a KV head among it by itself,
    whichever is faster (`parts.packs_group`).
    """
    rows, q_heads, _ = q.shape
    kv_heads = k_pages.shape[1]
    packed = packs_group(q.dtype) or softcap is not None
    queries = q.unflatten(1, (kv_heads, -1)) if packed else q.unsqueeze(2)
    if plan.direct:
        grid = plan.grids[0]
        k, v = cell_tokens(k_pages, grid), cell_tokens(v_pages, grid)
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
        k, v = cell_tokens(k_pages, grid), cell_tokens(v_pages, grid)
        out, lse = attend_part(mine, k, v, scale=scale, softcap=softcap, bias=grid.bias)
        if grid.cells is not None:
            out, lse = out[grid.cells], lse[grid.cells]
        outs.append(out)
        lses.append(lse)
        owners.append(grid.owners)
    for trunk in plan.trunks:
        k, v = trunk_tokens(k_pages, trunk), trunk_tokens(v_pages, trunk)
        out, lse = _attend_trunk(queries[trunk.rows], k, v, scale, softcap)
        outs.append(out)
        lses.append(lse)
        owners.append(trunk.rows)
    if not outs:
        shape = (*queries.shape[:3], v_pages.shape[3])
        return queries.new_zeros(shape), torch.full(shape[:3], -torch.inf)
    return merge_rows(plan.rows, outs, lses, owners)


def _attend_trunk(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over tokens that all rows see: one call, K and V read once.

    - `q`: `[rows, heads, queries, k_dim]`, where `heads * queries` are the query heads in order;
      `k`, `v`: `[1, kv_heads, tokens, dim]`. Returns as `attend_part` does, for `q`'s shape.
    """
    rows, kv_heads = q.shape[0], k.shape[1]
    packed = q.flatten(1, 2).unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    out, lse = attend_part(packed.unsqueeze(0), k, v, scale=scale, softcap=softcap)
    out = out.squeeze(0).unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)
    lse = lse.squeeze(0).unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)
    return out.unflatten(1, q.shape[1:3]), lse.unflatten(1, q.shape[1:3])
