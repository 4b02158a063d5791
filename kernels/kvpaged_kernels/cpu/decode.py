"""One query token a sequence over its pages: one attention call a grid of pages."""

from torch import Tensor

from kvpaged_kernels.cpu.parts import apply_sinks, attend_part, merge_rows
from kvpaged_kernels.cpu.plan import DecodePlan, Grid


def _cells(pages: Tensor, grid: Grid) -> Tensor:
    """The tokens of a grid's cells, `[count, kv_heads, tokens, dim]`, as a view."""
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

    The group of query heads that shares a KV head is packed into the query length, so K and V are
    read once. `plan` stands for the block table, the lengths and the window.
    """
    rows, q_heads, _ = q.shape
    kv_heads = k_pages.shape[1]
    packed = q.unflatten(1, (kv_heads, q_heads // kv_heads))
    outs, lses, owners = [], [], []
    for grid in plan.grids:
        queries = packed if grid.rows is None else packed[grid.rows]
        bias = grid.bias
        if bias is not None:
            bias = bias.expand(-1, 1, packed.shape[2], -1)
        k, v = _cells(k_pages, grid), _cells(v_pages, grid)
        out, lse = attend_part(queries, k, v, scale=scale, softcap=softcap, bias=bias)
        if grid.cells is not None:
            out, lse = out[grid.cells], lse[grid.cells]
        outs.append(out)
        lses.append(lse)
        owners.append(grid.owners)
    if not outs:
        return q.new_zeros(rows, q_heads, v_pages.shape[3])
    out, lse = (outs[0], lses[0]) if plan.direct else merge_rows(rows, outs, lses, owners)
    if sinks is not None:
        out = apply_sinks(out, lse, sinks.unflatten(0, (kv_heads, -1)))
    return out.flatten(1, 2).to(q.dtype)
