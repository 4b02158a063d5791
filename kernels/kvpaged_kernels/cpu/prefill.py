"""Ragged queries over their paged history: a causal call for the new part, plain ones before it."""

import torch
from torch import Tensor

from kvpaged_kernels.cpu.parts import apply_sinks, attend_general, attend_part, merge_pair
from kvpaged_kernels.cpu.plan import (
    RowSpan,
    Run,
    SpanPlan,
    Trunk,
    Uniform,
    trunk_tokens,
    uniform_tokens,
)

WINDOW_BLOCK = 256
"""Queries of one masked call where a window cuts into the history."""

FLASH_BLOCK = 512
"""Tokens that the flash kernel takes at a time."""

QUERY_BLOCK = 256
MASK_ELEMENTS = 2**22
"""Queries and elements of the mask of one call: it skips nothing of what the last query sees."""

NO_WINDOW = 2**31 - 1
"""A window over everything: plans made with one have no trunks."""

BLIND = -1e30
"""Log-sum-exp of a part a query sees nothing of; finite: merging two such parts is not NaN."""


def _tokens(pages: Tensor, run: Run, first: int, last: int) -> Tensor:
    """Positions `[first, last)` of a run, `[1, kv_heads, tokens, dim]`, as a view."""
    stride_entry, stride_head, stride_slot, _ = pages.stride()
    _, heads, page_size, dim = pages.shape
    entry, slot = divmod(run.slot, page_size)
    offset = entry * stride_entry + (slot + first - run.first) * stride_slot
    return pages.as_strided(
        (1, heads, last - first, dim),
        (0, stride_head, stride_slot, 1),
        pages.storage_offset() + offset,
    )


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: SpanPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged queries, as `reference.attention.paged_prefill` defines it.

    `plan` stands for the block table, the lengths and `cu_q`; the new tokens are in the pages. With
    `alibi_slopes` it is one made with a window (`NO_WINDOW` if there is none).
    """
    head_sinks = None if sinks is None else sinks.unsqueeze(-1)
    if alibi_slopes is not None:
        assert not plan.trunks
        window = NO_WINDOW if window is None else window
    elif plan.trunks:
        part = _own_parts(q, k_pages, v_pages, plan, scale, softcap)
        for trunk, queries in zip(plan.trunks, plan.trunk_queries, strict=True):
            _merge_trunk(part, q, k_pages, v_pages, trunk, queries, scale, softcap)
        out = part[0] if sinks is None else apply_sinks(*part, sinks)
        return out.to(q.dtype)
    uniform = plan.uniform
    simple = uniform is not None and (window is None or uniform.tokens <= window)
    if uniform is not None and simple and alibi_slopes is None:
        part = _uniform_part(q, k_pages, v_pages, uniform, scale, softcap)
        out = part[0] if head_sinks is None else apply_sinks(*part, head_sinks)
        return out.transpose(1, 2).flatten(0, 1).to(q.dtype)
    result = q.new_zeros(q.shape[0], q.shape[1], v_pages.shape[3])
    for span in plan.rows:
        if span.q_last == span.q_first or not span.length:
            continue
        blocks = [(span.q_first, span.q_last)]
        if window is not None and (span.length > window or alibi_slopes is not None):
            firsts = range(span.q_first, span.q_last, WINDOW_BLOCK)
            blocks = [(a, min(a + WINDOW_BLOCK, span.q_last)) for a in firsts]
        for a, b in blocks:
            start = span.length - (span.q_last - a)
            queries = q[a:b].transpose(0, 1).unsqueeze(0)
            if window is None or (start + (b - a) <= window and alibi_slopes is None):
                part = _causal(queries, start, k_pages, v_pages, span.runs, scale, softcap)
            else:
                part = _windowed(
                    queries, start, k_pages, v_pages, span, window, scale, softcap, alibi_slopes
                )
            out = part[0] if head_sinks is None else apply_sinks(*part, head_sinks)
            result[a:b] = out.squeeze(0).transpose(0, 1)
    return result


def _uniform_part(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    uniform: Uniform,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """New tokens over one another, all rows in one call: `[rows, heads, tokens, dim]`."""
    k, v = (uniform_tokens(pages, uniform) for pages in (k_pages, v_pages))
    queries = q.unflatten(0, (uniform.rows, uniform.tokens)).transpose(1, 2)
    return attend_part(queries, k, v, scale=scale, softcap=softcap, causal=True)


def _own_parts(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: SpanPlan,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Each row's queries over what only it has: fp32 `[tokens, heads, dim]`, `[tokens, heads]`."""
    if plan.uniform is not None:
        out, lse = _uniform_part(q, k_pages, v_pages, plan.uniform, scale, softcap)
        return out.transpose(1, 2).flatten(0, 1).float(), lse.transpose(1, 2).flatten(0, 1)
    outs = torch.zeros(q.shape[0], q.shape[1], v_pages.shape[3])
    lses = torch.empty(q.shape[:2])
    for span in plan.rows:
        if span.q_last == span.q_first:
            continue
        queries = q[span.q_first : span.q_last].transpose(0, 1).unsqueeze(0)
        start = span.length - (span.q_last - span.q_first)
        out, lse = _causal(queries, start, k_pages, v_pages, span.runs, scale, softcap)
        outs[span.q_first : span.q_last] = out.squeeze(0).transpose(0, 1)
        lses[span.q_first : span.q_last] = lse.squeeze(0).transpose(0, 1)
    return outs, lses


def _merge_trunk(
    part: tuple[Tensor, Tensor],
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    trunk: Trunk,
    queries: Tensor,
    scale: float,
    softcap: float | None,
) -> None:
    """Add to `part` (as `_own_parts` gives it) what `queries` see of a trunk: all of it, one
    call.
    """
    k, v = trunk_tokens(k_pages, trunk), trunk_tokens(v_pages, trunk)
    mine = q[queries].transpose(0, 1).unsqueeze(0)
    out, lse = (
        x.squeeze(0).transpose(0, 1) for x in attend_part(mine, k, v, scale=scale, softcap=softcap)
    )
    merged = merge_pair((part[0][queries], part[1][queries]), (out, lse))
    part[0][queries], part[1][queries] = merged


def _causal(
    q: Tensor,
    start: int,
    k_pages: Tensor,
    v_pages: Tensor,
    runs: tuple[Run, ...],
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Queries at positions `start..` over the tokens of `runs` up to their own, as one softmax.

    What torch makes of the same tokens in one tensor: the flash kernel takes a query's tokens in
    blocks counted from the first, whatever other queries there are, so after a hit, or in chunks
    that end at blocks, a prompt as a rule has the bits of one in one go. Parts of half precision,
    one a run or one before `start`, would be rounded one by one before they are merged. Runs that
    aren't adjacent are copied side by side to that end.
    """
    stop = start + q.shape[2]
    runs = tuple(run for run in runs if run.first < stop)
    k, v = (
        torch.cat([_tokens(pages, run, run.first, min(run.last, stop)) for run in runs], dim=2)
        if len(runs) > 1
        else _tokens(pages, runs[0], runs[0].first, min(runs[0].last, stop))
        for pages in (k_pages, v_pages)
    )
    before = k.shape[2] - q.shape[2]
    if not before:
        return attend_part(q, k, v, scale=scale, softcap=softcap, causal=True)
    step = max(32, min(QUERY_BLOCK, MASK_ELEMENTS // k.shape[2]))
    parts = []
    for a in range(0, q.shape[2], step):
        b = min(a + step, q.shape[2])
        seen = -(-(before + b) // FLASH_BLOCK) * FLASH_BLOCK
        some_k, some_v = k[:, :, :seen], v[:, :, :seen]
        bias = q.new_full((1, 1, b - a, some_k.shape[2]), -torch.inf).triu_(before + a + 1)
        parts.append(
            attend_part(q[:, :, a:b], some_k, some_v, scale=scale, softcap=softcap, bias=bias)
        )
    if len(parts) == 1:
        return parts[0]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)


def _windowed(
    q: Tensor,
    start: int,
    k_pages: Tensor,
    v_pages: Tensor,
    span: RowSpan,
    window: int,
    scale: float,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Queries at positions `start..` over the last `window` tokens of each, by explicit masks.

    A slope's bias grows with the distance: it is added in fp32, whatever the dtype of `q`.
    """
    stop = start + q.shape[2]
    seen = max(0, start - window + 1)
    position = torch.arange(start, stop).unsqueeze(1)
    merged: tuple[Tensor, Tensor] | None = None
    for run in span.runs:
        first, last = max(run.first, seen), min(run.last, stop)
        if last <= first:
            continue
        token = torch.arange(first, last)
        hidden = (token > position) | (token <= position - window)
        bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        k = _tokens(k_pages, run, first, last)
        v = _tokens(v_pages, run, first, last)
        if alibi_slopes is None:
            out, lse = attend_part(q, k, v, scale=scale, softcap=softcap, bias=bias[None, None])
        else:
            slopes = alibi_slopes.float().view(1, -1, 1, 1)
            bias = bias.float() + slopes * (token - position)
            out, lse = attend_general(q, k, v, scale, softcap, bias, False)
        blind = hidden.all(dim=1)
        if bool(blind.any()):
            out = out.float().masked_fill(blind.unsqueeze(-1), 0.0)
            lse = lse.masked_fill(blind, BLIND)
        merged = (out, lse) if merged is None else merge_pair(merged, (out, lse))
    assert merged is not None
    return merged
