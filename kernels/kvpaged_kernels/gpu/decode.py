"""Attention of one query token a sequence over its pages, split over the tokens and merged.

One program takes one row, one KV head and one split: the GQA group of the head is packed into the
rows of the tile, so K and V are read once. Splits are laid out from each row's own length, so a
short row in a batch with a long one leaves its spare splits empty instead of being cut to bits.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.checks import check_decode
from kvpaged_kernels.gpu.configs import (
    MAX_SPLITS,
    decode_blocks,
    min_split_tokens,
    split_count,
)
from kvpaged_kernels.gpu.launch import Device, Launch, attention_arguments, device_of
from kvpaged_kernels.gpu.primitives import LOWEST, add_sinks, attend, window_begin

_MERGE_CHUNK = 16


@triton.jit
def _split_tokens(
    length,
    window,
    splits,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """The first token that a row reads, and the tokens of one of its splits."""
    begin = 0
    if HAS_WINDOW:
        begin = window_begin(length - 1, window, min(PAGE_SIZE, BLOCK_N))
    tile: tl.constexpr = max(PAGE_SIZE, BLOCK_N)
    share = tl.cdiv(tl.cdiv(length - begin, splits), tile) * tile
    return begin, tl.maximum(share, MIN_TOKENS)


@triton.jit
def _decode(
    q,
    k_pages,
    v_pages,
    block_table,
    seq_lens,
    sinks,
    out,
    part_lse,
    stride_q_row,
    stride_q_head,
    stride_k_entry,
    stride_k_head,
    stride_k_slot,
    stride_v_entry,
    stride_v_head,
    stride_v_slot,
    stride_table_row,
    q_heads,
    window,
    score_scale,
    cap,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """`out` is the result; with `IS_SPLIT` it is fp32 `[rows, q_heads, splits, V_DIM]`."""
    row = tl.program_id(0).to(tl.int64)
    blocks_m: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = (tl.program_id(1) // blocks_m).to(tl.int64)
    member = tl.program_id(1) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    splits = tl.num_programs(2)

    length = tl.load(seq_lens + row)
    begin, share = _split_tokens(length, window, splits, PAGE_SIZE, BLOCK_N, MIN_TOKENS, HAS_WINDOW)
    start = begin + split * share
    end = tl.minimum(start + share, length)
    if IS_SPLIT:  # noqa: SIM102 - decided at compile time, the inner one at run time
        if start >= length:
            return

    dim = tl.arange(0, BLOCK_K)
    head = kv_head * GROUP + member
    queries = q + row * stride_q_row + head[:, None] * stride_q_head + dim[None, :]
    query = tl.load(queries, mask=(member < GROUP)[:, None] & (dim < K_DIM)[None, :], other=0.0)
    k_pages += kv_head * stride_k_head
    v_pages += kv_head * stride_v_head
    table = block_table + row * stride_table_row
    last = length - 1
    position = tl.zeros([BLOCK_M], tl.int32) + last
    acc, m, total = attend(
        query, k_pages, v_pages, table, position, last, last, start, end,
        stride_k_entry, stride_k_slot, stride_v_entry, stride_v_slot,
        window, score_scale, cap, K_DIM, V_DIM, BLOCK_K, BLOCK_V, PAGE_SIZE, BLOCK_N,
        HAS_WINDOW, HAS_SOFTCAP,
    )  # fmt: skip

    place = row * q_heads + head
    if IS_SPLIT:
        place = place * splits + split
        tl.store(part_lse + place, m + tl.log2(total), mask=member < GROUP)
    elif sinks is not None:
        m, total, alpha = add_sinks(m, total, sinks, head, member < GROUP)
        acc *= alpha[:, None]
    acc /= tl.where(total > 0, total, 1.0)[:, None]
    dim = tl.arange(0, BLOCK_V)
    tl.store(
        out + place[:, None] * V_DIM + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=(member < GROUP)[:, None] & (dim < V_DIM)[None, :],
    )


@triton.jit
def _merge(
    parts,
    part_lse,
    seq_lens,
    sinks,
    out,
    q_heads,
    splits,
    window,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weigh the splits of one query head by their log-sum-exp; only the splits of its row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(seq_lens + row)
    begin, share = _split_tokens(length, window, splits, PAGE_SIZE, BLOCK_N, MIN_TOKENS, HAS_WINDOW)
    live = tl.cdiv(length - begin, share)
    place = row * q_heads + head
    split = tl.arange(0, BLOCK_S)
    lse = tl.load(part_lse + place * splits + split, mask=split < live, other=-float("inf"))
    m = tl.maximum(tl.max(lse, 0), LOWEST)
    total = tl.sum(tl.exp2(lse - m), 0)
    if sinks is not None:
        m, total, _ = add_sinks(m, total, sinks, head, True)

    dim = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, live, CHUNK):
        some = first + tl.arange(0, CHUNK)
        part = place * splits + some
        weight = tl.exp2(tl.load(part_lse + part, mask=some < live, other=-float("inf")) - m)
        values = tl.load(
            parts + part[:, None] * V_DIM + dim[None, :],
            mask=(some < live)[:, None] & (dim < V_DIM)[None, :],
            other=0.0,
        )
        acc += tl.sum(values * weight[:, None], 0)
    acc /= tl.where(total > 0, total, 1.0)
    tl.store(out + place * V_DIM + dim, acc.to(out.dtype.element_ty), mask=dim < V_DIM)


def decode_launches(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    max_len: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    device: Device,
) -> list[Launch]:
    """The launches of `paged_decode` into `out`: one, or with several splits two."""
    rows, q_heads, k_dim = q.shape
    _, kv_heads, page_size, v_dim = v_pages.shape
    group = q_heads // kv_heads
    blocks = decode_blocks(q.element_size(), k_dim, v_dim, group, device.shared_memory)
    programs_m = kv_heads * triton.cdiv(group, blocks.m)
    splits = split_count(max_len, page_size, rows * programs_m, device.multiprocessors, window)
    target, part_lse = out, None
    if splits > 1:
        target = torch.empty(rows, q_heads, splits, v_dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(rows, q_heads, splits, dtype=torch.float32, device=q.device)
    arguments = attention_arguments(
        q, k_pages, v_pages, block_table, scale=scale, window=window, softcap=softcap
    ) | {
        "seq_lens": seq_lens,
        "sinks": sinks if splits == 1 else None,
        "out": target,
        "part_lse": part_lse,
        "stride_q_row": q.stride(0),
        "stride_q_head": q.stride(1),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "MIN_TOKENS": max(min_split_tokens(page_size), blocks.n),
        "IS_SPLIT": splits > 1,
    }
    attending = Launch(
        kernel=_decode,
        grid=(rows, programs_m, splits),
        arguments=arguments,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    if splits == 1:
        return [attending]
    return [attending, _merging(arguments, splits, sinks, out)]


def _merging(
    attending: Mapping[str, Any], splits: int, sinks: Tensor | None, out: Tensor
) -> Launch:
    """The launch that merges what a launch with these arguments leaves, into `out`."""
    sizes = ("V_DIM", "BLOCK_V", "PAGE_SIZE", "BLOCK_N", "MIN_TOKENS", "HAS_WINDOW")
    same = ("part_lse", "seq_lens", "q_heads", "window", *sizes)
    rows, q_heads, _ = out.shape
    return Launch(
        kernel=_merge,
        grid=(rows, q_heads),
        arguments={name: attending[name] for name in same}
        | {
            "parts": attending["out"],
            "sinks": sinks,
            "out": out,
            "splits": splits,
            "BLOCK_S": MAX_SPLITS,
            "CHUNK": _MERGE_CHUNK,
        },
    )


def paged_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    max_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query token a sequence over its paged history.

    - `q`: `[rows, q_heads, k_dim]`, last stride 1.
    - `k_pages`, `v_pages`: `[entries, kv_heads, page_size, k_dim or v_dim]` of `q`'s dtype;
      `q_heads` is a multiple of `kv_heads`, query head `h` reads KV head `h // group`.
    - `block_table`: int32 `[rows, width]`, last stride 1: entry of each logical page. Entries
      wholly before the window or past the length are never used.
    - `seq_lens`: int32 `[rows]`, tokens of each row *including* the query's own, the last one,
      already in the pages. A row of length 0 gives zeros.
    - `max_len`: an upper bound of `seq_lens`; sizes the launch, never changes what is attended to
      (the splits it leads to change the order of sums).
    - `scale`: factor of the dot products.
    - `window`: W, or None. A query at position p sees positions p-W < j <= p: W tokens with itself.
    - `softcap`: c, or None: scores become c*tanh(s/c), after `scale` (Gemma 2).
    - `sinks`: `[q_heads]` logits that join the softmax's denominator only (GPT-OSS), or None.

    Returns `[rows, q_heads, v_dim]`, contiguous, in `q`'s dtype; sums are fp32. Raises ValueError
    where shapes, strides, dtypes or devices disagree. Splitting over tokens is Flash-Decoding's.
    """
    tensors = (q, k_pages, v_pages, block_table, seq_lens)
    check_decode(*tensors, max_len=max_len, window=window, softcap=softcap, sinks=sinks)
    out = q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])
    if q.shape[0] == 0:
        return out
    launches = decode_launches(
        *tensors,
        out,
        max_len=max_len,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        device=device_of(q),
    )
    for launch in launches:
        launch.run(q.device)
    return out
