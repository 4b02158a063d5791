"""A layer's part of a step: new keys and values into pages, attention over them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpaged import ops
from kvpaged.config import Backend
from kvpaged.ops import LayerPages, Options
from kvpaged.step import GroupStep
from kvpaged_kernels.checks import MAX_DECODE_QUERIES
from kvpaged_kernels.cpu.lane import attend_lane, fits_lane, write_lane
from kvpaged_kernels.cpu.plan import DecodePlan

if TYPE_CHECKING:
    from kvpaged_kernels.gpu.plan import DecodePlan as SharePlan


def write_layer(
    group: GroupStep,
    layers: Sequence[LayerPages],
    place: int,
    k: Tensor,
    v: Tensor | None,
    *,
    backend: Backend,
    window: int | None,
) -> None:
    """Put a layer's new K and V (`[tokens, kv_heads, width]`) into the pages of a step."""
    pages = layers[place]
    if backend == "cpu" and not torch.compiler.is_compiling():
        if group.parts:
            start = 0
            for part in group.parts:
                mine = slice(start, start := start + part.total)
                values = None if v is None else v[mine]
                write_layer(part, layers, place, k[mine], values, backend=backend, window=window)
            return
        plan_layers(group, layers, window)
        if group.lanes is not None and v is not None:
            lane, rows = group.lanes[place], group.rows
            k_rows, v_rows = _by_rows(k, rows), _by_rows(v, rows)
            if fits_lane(lane, k_rows, v_rows):
                write_lane(lane, k_rows, v_rows)
                return
    ops.append(pages, k, v, group.slots, backend=backend, spans=group.spans)


def _by_rows(tokens: Tensor, rows: int) -> Tensor:
    """`[tokens, heads, dim]` of rows with equally many tokens as `[rows, heads, new, dim]`."""
    by_rows: Tensor = tokens.unflatten(0, (rows, -1)).transpose(1, 2)
    return by_rows


def attend_layer(
    group: GroupStep,
    layers: Sequence[LayerPages],
    place: int,
    q: Tensor,
    options: Options,
    *,
    backend: Backend,
) -> Tensor:
    """Attention of a step's queries (`[tokens, q_heads, width]`) over what is in the pages by
    now.
    """
    pages = layers[place]
    check_queries(group, pages, q)
    if group.parts:
        start, outs = 0, []
        for part in group.parts:
            mine = q[start : (start := start + part.total)]
            outs.append(attend_layer(part, layers, place, mine, options, backend=backend))
        return torch.cat(outs)
    plain = options.softcap is None and options.sinks is None and options.alibi_slopes is None
    if group.lanes is not None and plain:
        out = attend_lane(_by_rows(q, group.rows), group.lanes[place], options.scale)
        return out.transpose(1, 2).flatten(0, 1)
    few = backend != "cpu" and 0 < group.max_q <= MAX_DECODE_QUERIES
    if group.decode or few:
        cu_q = None if group.decode else group.cu_q
        plan: DecodePlan | SharePlan | None = group.decode_plan
        if backend == "triton":
            plan = group.shares.get(q.shape[1])
            if plan is None and not torch.compiler.is_compiling():
                plan = _shares(group, pages, q.shape[1], options.window)
        return ops.decode(
            pages, q, group.table, group.lengths, options,
            backend=backend, cu_q=cu_q, max_q=group.max_q, plan=plan,
        )  # fmt: skip
    return ops.prefill(
        pages, q, group.table, group.cu_q, group.lengths, options,
        max_q=group.max_q, max_len=group.max_len, backend=backend, spans=group.spans,
    )  # fmt: skip


def _shares(group: GroupStep, pages: LayerPages, q_heads: int, window: int | None) -> "SharePlan":
    """The plan of a step for layers of these heads, made for the first of them."""
    cu_q = None if group.decode else group.cu_q
    plan = ops.plan_shares(pages, q_heads, group.lengths, window, cu_q=cu_q, max_q=group.max_q)
    group.shares[q_heads] = plan
    return plan


def check_queries(group: GroupStep, pages: LayerPages, q: Tensor) -> None:
    """Raise ValueError unless queries are one for each new token, and fit the keys."""
    kv_heads, width = pages.k_pages.shape[1], pages.k_pages.shape[3]
    fits = q.ndim == 3 and q.shape[2] == width and q.dtype == pages.flat.dtype
    if not fits or q.shape[0] != group.total or not q.shape[1] or q.shape[1] % kv_heads:
        raise ValueError(
            f"queries must be [{group.total} tokens, a multiple of {kv_heads} heads, {width}] of "
            f"{pages.flat.dtype}, got {tuple(q.shape)} of {q.dtype}"
        )


def plan_layers(group: GroupStep, layers: Sequence[LayerPages], window: int | None) -> None:
    """Plan a step on a CPU, once for all layers of its group; its lanes too, if it has some."""
    if group.decode_plan is not None or group.spans is not None:
        return
    whole = window is None or group.max_len <= window
    if group.decode:
        hint = group.hint
        if hint is not None and hint.has_lane and whole:
            plan = hint.one_token_on()
        else:
            plan = ops.plan_decode(layers[0], group.table, group.lengths, window)
        group.decode_plan = plan
        lanes = [ops.decode_lane(pages, plan) for pages in layers]
    else:
        spans = ops.plan_spans(layers[0], group.table, group.cu_q, group.lengths, window)
        group.spans = spans
        lanes = [ops.prefill_lane(pages, spans) for pages in layers] if whole else []
    group.lanes = [lane for lane in lanes if lane is not None] or None
    if not layers[0].joined and group.spans is None:
        group.spans = ops.plan_spans(layers[0], group.table, group.cu_q, group.lengths, window)
