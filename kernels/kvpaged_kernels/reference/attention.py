"""The oracles of `paged_decode` and `paged_prefill`: gather, then attention in fp64."""

import torch
from torch import Tensor

from kvpaged_kernels.checks import ORACLE_FLOATS, check_decode, check_prefill


def _gather(pages: Tensor, entries: Tensor, first: int, length: int) -> Tensor:
    """Tokens `first..length` of a sequence as `[kv_heads, length - first, dim]` in fp64.

    Only the pages that hold these tokens are read: entries before them may be garbage.
    """
    page_size = pages.shape[2]
    first_page = first // page_size
    needed = entries[first_page : -(-length // page_size)].long()
    tokens = pages[needed].permute(1, 0, 2, 3).flatten(1, 2)
    return tokens[:, first - first_page * page_size : length - first_page * page_size].double()


def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    entries: Tensor,
    length: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Causal attention of the last `len(q)` of `length` tokens: `[n, q_heads, v_dim]` in fp64."""
    start = length - len(q)
    first = 0 if window is None else max(0, start - window + 1)
    k = _gather(k_pages, entries, first, length)
    v = _gather(v_pages, entries, first, length)
    return attend_tokens(q, k, v, first, scale, window, softcap, sinks, alibi_slopes)


def attend_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Causal attention of the queries of the last tokens over `k` and `v`, `[kv_heads, tokens,
    dim]` in fp64, of the tokens from position `first` on: `[n, q_heads, v_dim]` in fp64.
    """
    n, q_heads, _ = q.shape
    length = first + k.shape[1]
    start = length - n
    group = q_heads // k.shape[0]
    k = k.repeat_interleave(group, 0)
    v = v.repeat_interleave(group, 0)
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(start, length, device=q.device)[:, None]
    token = torch.arange(first, length, device=q.device)[None, :]
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.double()[:, None, None] * (token - position)
    hidden = token > position
    if window is not None:
        hidden |= token <= position - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, n, 1)
        probabilities = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    return (probabilities @ v).transpose(0, 1)


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    cu_q: Tensor | None = None,
    max_q: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention of one or a few query tokens a sequence over its paged history.

    - `q`: `[tokens, q_heads, k_dim]`, last stride 1: one query a row, or as `cu_q` says.
    - `k_pages`, `v_pages`: `[entries, kv_heads, page_size, k_dim or v_dim]` of `q`'s dtype;
      `q_heads` is a multiple of `kv_heads`, query head `h` reads KV head `h // group`.
    - `block_table`: int32 `[rows, width]`, last stride 1: entry of each logical page. Entries
      wholly before the window or past the length are never used.
    - `seq_lens`: int32 `[rows]`, tokens of each row *including* the queries' own, the last ones,
      already in the pages. A row of length 0 gives zeros.
    - `scale`: factor of the dot products, positive.
    - `cu_q`: int32 `[rows + 1]`: the queries of row i are `q[cu_q[i]:cu_q[i + 1]]`, its last
      tokens. A row may have none. Without it each row has one.
    - `max_q`: the most queries of a row, at most 16.
    - `window`: W, or None. A query at position p sees positions p-W < j <= p: W tokens with itself.
    - `softcap`: c, or None: scores become c*tanh(s/c), after `scale` (Gemma 2).
    - `sinks`: `[q_heads]` logits that join the softmax's denominator only (GPT-OSS), or None.
    - `alibi_slopes`: `[q_heads]`, or None: slope * (j - p) is added to the score of token j, after
      the soft cap (Press, Smith and Lewis, arXiv:2108.12409).

    Returns `[tokens, q_heads, v_dim]`, contiguous, in `q`'s dtype. Raises ValueError where shapes,
    strides, dtypes or devices disagree.
    """
    check_decode(
        q, k_pages, v_pages, block_table, seq_lens, scale=scale, cu_q=cu_q, max_q=max_q,
        window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        dtypes=ORACLE_FLOATS,
    )  # fmt: skip
    if cu_q is None:
        cu_q = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
    return _ragged(
        q, k_pages, v_pages, block_table, cu_q, seq_lens, scale, window, softcap, sinks,
        alibi_slopes,
    )  # fmt: skip


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    *,
    max_q: int,
    max_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of ragged new tokens over their paged histories.

    - `q`: `[tokens, q_heads, k_dim]`, last stride 1: the queries of all rows, one after another.
    - `cu_q`: int32 `[rows + 1]`: the queries of row i are `q[cu_q[i]:cu_q[i + 1]]`, the *last*
      tokens of its `seq_lens[i]`; K and V of all of them are in the pages. A row may have none.
    - `max_q`: an upper bound of the queries of a row; sizes the launch.
    - all else as for `paged_decode`.

    Returns `[tokens, q_heads, v_dim]`, contiguous, in `q`'s dtype. Raises ValueError where shapes,
    strides, dtypes or devices disagree.
    """
    check_prefill(
        q, k_pages, v_pages, block_table, cu_q, seq_lens, max_q=max_q, max_len=max_len,
        scale=scale, window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
        dtypes=ORACLE_FLOATS,
    )  # fmt: skip
    return _ragged(
        q, k_pages, v_pages, block_table, cu_q, seq_lens, scale, window, softcap, sinks,
        alibi_slopes,
    )  # fmt: skip


def _ragged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """The attention of each row's queries, zeros for rows of length 0."""
    out = q.new_zeros(q.shape[0], q.shape[1], v_pages.shape[3])
    bounds = cu_q.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        queries = slice(bounds[row], bounds[row + 1])
        if queries.start == queries.stop or length == 0:
            continue
        out[queries] = _attend(
            q[queries], k_pages, v_pages, block_table[row], length, scale, window, softcap, sinks,
            alibi_slopes,
        ).to(q.dtype)  # fmt: skip
    return out
