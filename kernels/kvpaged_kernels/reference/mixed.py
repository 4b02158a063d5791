"""The oracles of attention over sealed and exact pages: unsealed, gathered, then in fp64."""

import torch
from torch import Tensor

from kvpaged_kernels.reference.attention import attend_tokens
from kvpaged_kernels.reference.seal import unseal
from kvpaged_kernels.sealed import SliceLayout
from kvpaged_kernels.sealed_checks import check_mixed_decode, check_mixed_prefill


def mixed_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slices: Tensor,
    layout: SliceLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    keep: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of one query token a sequence over its own page and the sealed form of those
    before it.

    - `slices`: uint8 `[entries, slice_bytes]`, this layer of the sealed pages, coded as `layout`
      says; every stride but the last, and the offset, a multiple of 16.
    - `block_table`: int32 `[rows, width]`. Of a row of `n` tokens, logical page `p` is an entry of
      `slices` where `keep <= p < (n - 1) // page_size`, else one of `k_pages` and `v_pages`.
    - `keep`: logical pages from the first on that stay exact when they are full.
    - all else as for `reference.attention.paged_decode`.

    Returns `[rows, q_heads, v_dim]`, contiguous, in `q`'s dtype; zeros for rows of length 0. Raises
    ValueError where shapes, strides or dtypes disagree.
    """
    options = (scale, window, softcap, sinks, alibi_slopes)
    check_mixed_decode(
        q, k_pages, v_pages, slices, layout, block_table, seq_lens, keep=keep, scale=scale,
        window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out = q.new_zeros(q.shape[0], q.shape[1], layout.v_dim)
    for row, length in enumerate(seq_lens.tolist()):
        if not length:
            continue
        place = (length - 1) // layout.page_size
        entry = block_table[row, place].long()
        own = k_pages[entry], v_pages[entry]
        first = _first_seen(length - 1, window)
        k, v = _before(k_pages, v_pages, slices, layout, block_table[row], first, place, keep)
        out[row] = _attend_page(q[row : row + 1], k, v, own, first, length, options)[0].to(q.dtype)
    return out


def mixed_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slices: Tensor,
    layout: SliceLayout,
    own_k: Tensor,
    own_v: Tensor,
    cu_own: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    *,
    keep: int,
    max_q: int,
    max_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of ragged new tokens, each over its own page up to itself and over the sealed form
    of those before it, which may be pages that the new tokens have filled.

    - `own_k`, `own_v`: `[n, kv_heads, page_size, k_dim or v_dim]` of the layout's dtype, last
      stride 1: the pages that have new tokens, exact, tokens before the new ones included; slots
      behind a row's last token may hold anything.
    - `cu_own`: int32 `[rows + 1]`: those of row i are `[cu_own[i], cu_own[i + 1])`, in order; none
      where it has no new tokens.
    - `block_table`: as in `mixed_decode` for all pages before that of the row's last token; others
      are not used.
    - all else as for `mixed_decode` and `reference.attention.paged_prefill`.

    Returns `[tokens, q_heads, v_dim]`, contiguous, in `q`'s dtype. Raises ValueError where shapes,
    strides or dtypes disagree.
    """
    options = (scale, window, softcap, sinks, alibi_slopes)
    check_mixed_prefill(
        q, k_pages, v_pages, slices, layout, own_k, own_v, cu_own, block_table, cu_q, seq_lens,
        keep=keep, max_q=max_q, max_len=max_len, scale=scale, window=window, softcap=softcap,
        sinks=sinks, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out = q.new_zeros(q.shape[0], q.shape[1], layout.v_dim)
    size, bounds, pages = layout.page_size, cu_q.tolist(), cu_own.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        token, stop = bounds[row], bounds[row + 1]
        start = length - (stop - token)
        for number in range(pages[row + 1] - pages[row]):
            place = start // size
            end = min((place + 1) * size, length)
            own = own_k[pages[row] + number], own_v[pages[row] + number]
            first = _first_seen(start, window)
            k, v = _before(k_pages, v_pages, slices, layout, block_table[row], first, place, keep)
            queries = q[token : token + end - start]
            out[token : token + end - start] = _attend_page(
                queries, k, v, own, first, end, options
            ).to(q.dtype)
            token, start = token + end - start, end
    return out


def _first_seen(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _before(
    k_pages: Tensor, v_pages: Tensor, slices: Tensor, layout: SliceLayout, entries: Tensor,
    first: int, place: int, keep: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """K and V, `[kv_heads, tokens, dim]` in fp64, of a row's tokens from position `first` up to its
    logical page `place`, as those behind them see them. Pages before `first` are not read.
    """
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for number in range(first // layout.page_size, place):
        entry = entries[number : number + 1].long()
        sealed = number >= keep
        pair = unseal(slices[entry], layout) if sealed else (k_pages[entry], v_pages[entry])
        for kind, page in zip(found, pair, strict=True):
            kind.append(page[0].double())
    skip = first % layout.page_size if first // layout.page_size < place else 0
    empty = k_pages.new_zeros(layout.kv_heads, 0, layout.k_dim, dtype=torch.float64)
    nothing = v_pages.new_zeros(layout.kv_heads, 0, layout.v_dim, dtype=torch.float64)
    return torch.cat([empty, *found[0]], 1)[:, skip:], torch.cat([nothing, *found[1]], 1)[:, skip:]


def _attend_page(
    q: Tensor, k: Tensor, v: Tensor, own: tuple[Tensor, Tensor], first: int, end: int,
    options: tuple[float, int | None, float | None, Tensor | None, Tensor | None],
) -> Tensor:  # fmt: skip
    """Queries of one page, the last tokens before position `end`, over `k` and `v`, which begin at
    position `first`, and their own page.
    """
    size = own[0].shape[1]
    begin = (end - 1) // size * size
    skip, stop = max(first - begin, 0), end - begin
    own_k, own_v = (page[:, skip:stop].double() for page in own)
    return attend_tokens(
        q, torch.cat([k, own_k], 1), torch.cat([v, own_v], 1), first, *options
    )  # fmt: skip
