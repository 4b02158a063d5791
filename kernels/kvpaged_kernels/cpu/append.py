"""Write new K and V into their slots on a CPU."""

import torch
from torch import Tensor

from kvpaged_kernels.checks import check_append
from kvpaged_kernels.cpu.plan import RowSpan, SpanPlan, uniform_tokens


def _joined(pages: Tensor) -> bool:
    """Whether all slots of a head are one run, so that slots can be indexed flat."""
    return pages.stride(0) == pages.shape[2] * pages.stride(2)


def _fit(tokens: Tensor | None, pages: Tensor | None, slots: Tensor) -> bool:
    """Whether tokens plainly fit their pages: a look at what `check_append` checks in full, which
    takes 30 microseconds, as long as a small attention call.
    """
    if tokens is None or pages is None:
        return tokens is pages
    return (
        tokens.shape == (slots.shape[0], pages.shape[1], pages.shape[3])
        and tokens.dtype == pages.dtype
        and tokens.stride(2) == 1
        and slots.dtype == torch.int64
    )


def _write_slots(tokens: Tensor, pages: Tensor, slots: Tensor) -> None:
    entries, heads, page_size, dim = pages.shape
    flat = pages.as_strided(
        (heads, entries * page_size, dim), (pages.stride(1), pages.stride(2), 1)
    )
    flat.index_copy_(1, slots, tokens.transpose(0, 1))


def _write_runs(tokens: Tensor, pages: Tensor, spans: tuple[RowSpan, ...]) -> None:
    stride_entry, stride_head, stride_slot, _ = pages.stride()
    _, heads, page_size, dim = pages.shape
    for span in spans:
        start = span.length - (span.q_last - span.q_first)
        for run in span.runs:
            first = max(run.first, start)
            if first >= run.last:
                continue
            entry, slot = divmod(run.slot, page_size)
            offset = entry * stride_entry + (slot + first - run.first) * stride_slot
            place = pages.as_strided(
                (run.last - first, heads, dim),
                (stride_slot, stride_head, 1),
                pages.storage_offset() + offset,
            )
            token = span.q_first + first - start
            place.copy_(tokens[token : token + run.last - first])


def append(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slots: Tensor,
    plan: SpanPlan | None = None,
) -> None:
    """Write the K and V of new tokens into their slots, as `reference.append.append` defines it.

    `plan`: where each row's new tokens go, as runs; worth it from a few tokens a row on, and
    needed where a head's slots are not one run (page-major). None: token by token by `slots`.
    """
    pairs = ((k, k_pages), (v, v_pages))
    if not all(_fit(tokens, pages, slots) for tokens, pages in pairs):
        check_append(k, v, k_pages, v_pages, slots)  # says what is wrong, or that all is well
    for tokens, pages in pairs:
        if tokens is None or pages is None or not tokens.shape[0]:
            continue
        if plan is not None and plan.uniform is not None:
            place = uniform_tokens(pages, plan.uniform)
            place.copy_(tokens.unflatten(0, (plan.uniform.rows, -1)).transpose(1, 2))
        elif plan is not None:
            _write_runs(tokens, pages, plan.rows)
        elif _joined(pages):
            _write_slots(tokens, pages, slots)
        else:
            page_size = pages.shape[2]
            for token, place in enumerate(slots.tolist()):
                pages[place // page_size, :, place % page_size].copy_(tokens[token])
