"""Sealed pages on a CPU: to make them, and attention over them and exact ones.

By native code (`native_sealed`) where there is some, else in stock torch: a row's pages are
unsealed side by side, in the model's dtype, and one attention call serves a block of its queries.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kvpaged_kernels.cpu.native_sealed import NativeSealed, has_native_sealed, native_seal
from kvpaged_kernels.cpu.parts import apply_sinks, attend_general, attend_part
from kvpaged_kernels.cpu.sealing import seal_pages, unseal
from kvpaged_kernels.sealed import Receipt, SliceLayout
from kvpaged_kernels.sealed_checks import check_mixed_decode, check_mixed_prefill, check_seal

QUERY_BLOCK = 256
"""Queries of one call, about: whole own pages."""


def seal(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor,
    layout: SliceLayout, queries: Tensor | None = None, *, native: bool = True,
) -> Receipt:  # fmt: skip
    """Code layers of full pages as slices of sealed ones: see `reference.seal.seal`.

    `native`: by native code where there is some.
    """
    check_seal(k_pages, v_pages, src, slices, dst, layout, queries)
    code = native_seal(layout) if native else None
    if code is not None:
        return code(k_pages, v_pages, src, slices, dst, queries)
    return seal_pages(k_pages, v_pages, src, slices, dst, layout, queries)


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
    native: bool = True,
) -> Tensor:
    """Attention of one query token a sequence: see `reference.mixed.mixed_decode`.

    `native`: by native code where there is some.
    """
    check_mixed_decode(
        q, k_pages, v_pages, slices, layout, block_table, seq_lens, keep=keep, scale=scale,
        window=window, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    if native and _is_native(q, layout, alibi_slopes):
        layer = NativeSealed(
            k_pages, v_pages, slices, layout, q.shape[1], keep=keep, scale=scale, window=window,
            softcap=softcap,
        )  # fmt: skip
        return layer.decode(q, block_table, seq_lens, sinks)
    rows = _Rows(k_pages, v_pages, slices, layout, keep, scale, window, softcap, alibi_slopes)
    out, lse = _nothing(q, layout)
    for row, length in enumerate(seq_lens.tolist()):
        if not length:
            continue
        entry = block_table[row, (length - 1) // layout.page_size].long()
        own = k_pages[entry].unsqueeze(0), v_pages[entry].unsqueeze(0)
        mine = slice(row, row + 1)
        rows.attend(q[mine], length - 1, block_table[row], own, (out[mine], lse[mine]))
    return _finished(q, out, lse, sinks)


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
    native: bool = True,
) -> Tensor:
    """Attention of ragged new tokens: see `reference.mixed.mixed_prefill`.

    `native`: by native code where there is some.
    """
    check_mixed_prefill(
        q, k_pages, v_pages, slices, layout, own_k, own_v, cu_own, block_table, cu_q, seq_lens,
        keep=keep, max_q=max_q, max_len=max_len, scale=scale, window=window, softcap=softcap,
        sinks=sinks, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    if native and _is_native(q, layout, alibi_slopes):
        layer = NativeSealed(
            k_pages, v_pages, slices, layout, q.shape[1], keep=keep, scale=scale, window=window,
            softcap=softcap,
        )  # fmt: skip
        return layer.prefill(q, own_k, own_v, cu_own, block_table, cu_q, seq_lens, sinks)
    rows = _Rows(k_pages, v_pages, slices, layout, keep, scale, window, softcap, alibi_slopes)
    out, lse = _nothing(q, layout)
    spans = zip(pairwise(cu_q.tolist()), pairwise(cu_own.tolist()), seq_lens.tolist(), strict=True)
    for row, ((first, last), (a, b), length) in enumerate(spans):
        if first == last:
            continue
        mine, start = slice(first, last), length - (last - first)
        own = own_k[a:b], own_v[a:b]
        rows.attend(q[mine], start, block_table[row], own, (out[mine], lse[mine]))
    return _finished(q, out, lse, sinks)


def _is_native(q: Tensor, layout: SliceLayout, alibi_slopes: Tensor | None) -> bool:
    """Native code knows no slopes."""
    return alibi_slopes is None and has_native_sealed(layout, q.shape[1] // layout.kv_heads)


def _nothing(q: Tensor, layout: SliceLayout) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of queries that have seen nothing yet."""
    return torch.zeros(*q.shape[:2], layout.v_dim), torch.full(q.shape[:2], -torch.inf)


def _finished(q: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    return (out if sinks is None else apply_sinks(out, lse, sinks)).to(q.dtype)


class _Rows:
    """A layer's pages, and how rows attend to them."""

    def __init__(
        self, k_pages: Tensor, v_pages: Tensor, slices: Tensor, layout: SliceLayout, keep: int,
        scale: float, window: int | None, softcap: float | None, slopes: Tensor | None,
    ) -> None:  # fmt: skip
        self._pages, self._slices, self._layout = (k_pages, v_pages), slices, layout
        self._keep, self._scale, self._window = keep, scale, window
        self._softcap, self._slopes = softcap, slopes

    def attend(
        self, q: Tensor, start: int, entries: Tensor, own: tuple[Tensor, Tensor],
        result: tuple[Tensor, Tensor],
    ) -> None:  # fmt: skip
        """Attention of a row's last queries, `q`, from position `start` on, into `result`.

        `own`: K and V of the pages from that of `start` on, `[pages, kv_heads, page_size, dim]`.
        """
        size, stop = self._layout.page_size, start + len(q)
        place, last = start // size, (stop - 1) // size
        seen = self._first_seen(start) // size
        before = self._before(entries, seen, last)
        dense = [x.transpose(0, 1).flatten(1, 2) for x in own]
        step = max(1, QUERY_BLOCK // size)
        for page in range(place, last + 1, step):
            begin, end = max(page * size, start), min((page + step) * size, stop)
            final = (end - 1) // size
            first = min(self._first_seen(begin), page * size)
            k, v = (
                torch.cat([x[:, first - seen * size : (final - seen) * size],
                           y[:, (page - place) * size : end - place * size]], 1)
                for x, y in zip(before, dense, strict=True)
            )  # fmt: skip
            keys = torch.cat([torch.arange(first, final * size), torch.arange(page * size, end)])
            sealed = torch.arange(len(keys)) < final * size - first
            mine = slice(begin - start, end - start)
            part = self._part(q[mine], k, v, torch.arange(begin, end), keys, sealed)
            for into, x in zip(result, part, strict=True):
                into[mine] = x.squeeze(0).transpose(0, 1)

    def _first_seen(self, position: int) -> int:
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _before(self, entries: Tensor, first: int, last: int) -> list[Tensor]:
        """K and V of logical pages `[first, last)` as those behind see them: `[kv_heads, tokens,
        dim]`.
        """
        exact = entries[first : max(first, min(self._keep, last))].long()
        coded = entries[max(first, min(self._keep, last)) : last].long()
        found = []
        for pages, back in zip(self._pages, unseal(self._slices[coded], self._layout), strict=True):
            both = torch.cat([pages[exact], back.to(pages.dtype)])
            found.append(both.transpose(0, 1).flatten(1, 2))
        return found

    def _part(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, key: Tensor, sealed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries at `position` over keys at positions `key`: sealed ones from behind their page,
        exact ones from within it.
        """
        queries, k, v = q.transpose(0, 1).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        size, place = self._layout.page_size, position.unsqueeze(1)
        within = (key // size == place // size) & (key <= place)
        shown = torch.where(sealed, key // size < place // size, within)
        if self._window is not None:
            shown &= key > place - self._window
        if self._slopes is not None:
            slopes = self._slopes.float().view(1, -1, 1, 1)
            bias = (slopes * (key - place)).masked_fill_(~shown, -torch.inf)
            return attend_general(queries, k, v, self._scale, self._softcap, bias, False)
        mask = None
        if not bool(shown.all()):
            mask = torch.zeros(shown.shape, dtype=q.dtype).masked_fill_(~shown, -torch.inf)
            mask = mask[None, None]
        if len(q) == 1:  # the group, packed into the query length
            queries = q.unflatten(1, (k.shape[1], -1))
        out, lse = attend_part(queries, k, v, scale=self._scale, softcap=self._softcap, bias=mask)
        if len(q) == 1:
            out, lse = out.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2)
        return out, lse
