"""Sealing on the device: K and V of full pages become coded slices, in one launch.

A program makes one head of a slice, in tiles: of channels for K (all tokens of the page), of tokens
for V. Whatever it writes it writes as 16-bit words, which it sums as it goes: a word of the
checksum is 32 bits, and the sum of what its halves contribute.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpaged_kernels.gpu.checksum import coefficients
from kvpaged_kernels.gpu.launch import Launch
from kvpaged_kernels.gpu.quantise import e4m3, move_codes, quantise
from kvpaged_kernels.gpu.sealed_pieces import EXACT, FP8, INT4, INT8, pieces_of
from kvpaged_kernels.sealed import MOVE_BLOCK, MOVES, Receipt, SliceLayout
from kvpaged_kernels.sealed_checks import check_seal

_TILE = 2048
"""Numbers of a tile, about: the search keeps them in registers, with their codes and errors."""
_EXACT = tl.constexpr(EXACT)
_FP8 = tl.constexpr(FP8)
_INT4 = tl.constexpr(INT4)
_MOVES = tl.constexpr(MOVES)


@triton.jit
def _write(head, first, at, words, mask):
    """Store 16-bit words (the low halves of int32s) at `head + at`; what they add to the checksum.

    `first`: of the slice's words those before the head's.
    """
    tl.store(head + at, words.to(tl.int16), mask=mask)
    both = (words & 0xFFFF) << 16 * (at & 1)
    terms = both.to(tl.int64) * coefficients((first + at).to(tl.int64) >> 1)
    return tl.sum(tl.where(mask, terms, 0))


@triton.jit
def _pairs(x):
    """Bytes (int32) side by side as 16-bit words, half as many in the last dimension."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return even | odd << 8


@triton.jit
def _seal_plain(
    pages, stride_slot, head, first, begin,
    FORM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What has no parameters: exact K or V (`pages` are 16-bit words then), or V as e4m3."""
    dim = tl.arange(0, BLOCK_D)[None, None, :]
    total = tl.zeros([], tl.int64)
    worst = tl.zeros([], tl.float32)
    for start in range(0, PAGE_SIZE, BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)[:, None, None]
        there = dim < DIM
        x = tl.load(pages + slot * stride_slot + dim, mask=there, other=0)
        if FORM == _EXACT:
            total += _write(head, first, begin + slot * DIM + dim, x.to(tl.int32), there)
        else:
            x = x.to(tl.float32)
            byte, value = e4m3(x)
            worst = tl.maximum(worst, tl.max(tl.abs(value - x)))
            half = tl.arange(0, BLOCK_D // 2)[None, None, :]
            at = begin + slot * (DIM // 2) + half
            total += _write(head, first, at, _pairs(byte), half < DIM // 2)
    return total, worst


@triton.jit
def _seal_k(
    pages, stride_slot, head, first, query,
    FORM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr,
    PARAMS: tl.constexpr, BLOCK_D: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """K but where it is exact: `[group of tokens, token, channel]`; four channels of 4 bits make a
    word. Of e4m3 numbers the whole page is one group, whose middle is taken off.
    """
    PARTS: tl.constexpr = 4 if FORM == _INT4 else 1
    BITS: tl.constexpr = 4 if FORM == _INT4 else 8
    WIDTH: tl.constexpr = DIM // PARTS
    GROUPS: tl.constexpr = PAGE_SIZE // GROUP
    group = tl.arange(0, GROUPS)[:, None, None]
    slot = group * GROUP + tl.arange(0, GROUP)[None, :, None]
    along = tl.zeros([GROUPS, GROUP, 1], tl.float32)
    total = tl.zeros([], tl.int64)
    worst = tl.zeros([], tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)[None, None, :]
        there = column < WIDTH
        words = tl.zeros([GROUPS, GROUP, BLOCK_D], tl.int32)
        for part in range(PARTS):
            dim = part * WIDTH + column
            x = tl.load(pages + slot * stride_slot + dim, mask=there, other=0.0).to(tl.float32)
            if FORM == _FP8:
                high, low = tl.max(x, 1, keep_dims=True), tl.min(x, 1, keep_dims=True)
                middle = tl.minimum(tl.maximum((high + low) / 2, -65504.0), 65504.0).to(tl.float16)
                x -= middle.to(tl.float32)
                code, value = e4m3(x)
                param = middle.to(tl.int16, bitcast=True).to(tl.int32)
                error = tl.max(tl.abs(value - x))
            else:
                code, param, scale, off = quantise(x, there, False, BITS)
                if MOVED:
                    toward = tl.load(query + dim, mask=there, other=0.0)
                    weight = tl.load(query + DIM + dim, mask=there, other=0.0)
                    code, off, along = move_codes(
                        code, scale, off, toward, weight, along, 2**BITS - 1, _MOVES
                    )
                error = tl.max(tl.abs(off))
            total += _write(head, first, PARAMS + group * DIM + dim, param, there)
            worst = tl.maximum(worst, error)
            words |= code << 4 * part
        if FORM == _INT4:
            total += _write(head, first, slot * WIDTH + column, words, there)
        else:
            half = start // 2 + tl.arange(0, BLOCK_D // 2)[None, None, :]
            at = slot * (DIM // 2) + half
            total += _write(head, first, at, _pairs(words), half < DIM // 2)
    return total, worst


@triton.jit
def _seal_v(
    pages, stride_slot, head, first, begin,
    FORM: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, GROUP: tl.constexpr,
    PARAMS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """V in integers: `[token, part, column]`, a group at a time, which of 4 bits has one part of
    the words or several.
    """
    PARTS: tl.constexpr = 4 if FORM == _INT4 else 1
    BITS: tl.constexpr = 4 if FORM == _INT4 else 8
    QUARTER: tl.constexpr = DIM // PARTS
    ROWS: tl.constexpr = GROUP // WIDTH
    column = tl.arange(0, BLOCK_D)[None, None, :]
    total = tl.zeros([], tl.int64)
    worst = tl.zeros([], tl.float32)
    for start in range(0, PAGE_SIZE, BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)[:, None, None]
        for tile in range(TILES):
            there = column < WIDTH
            words = tl.zeros([BLOCK_T, 1, BLOCK_D], tl.int32)
            for part in range(0, PARTS, ROWS):
                parts = part + tl.arange(0, ROWS)[None, :, None]
                dim = parts * QUARTER + tile * WIDTH + column
                x = tl.load(pages + slot * stride_slot + dim, mask=there, other=0.0)
                code, param, _, off = quantise(x.to(tl.float32), there, True, BITS)
                group = (part * QUARTER + tile * WIDTH) // GROUP
                at = PARAMS + group * PAGE_SIZE + slot
                total += _write(head, first, at, param, slot >= 0)
                worst = tl.maximum(worst, tl.max(tl.abs(off)))
                words += tl.sum(code << 4 * parts, 1, keep_dims=True)
            if FORM == _INT4:
                at = begin + slot * QUARTER + tile * WIDTH + column
                total += _write(head, first, at, words, there)
            else:
                half = tl.arange(0, BLOCK_D // 2)[None, None, :]
                at = begin + (slot * DIM + tile * WIDTH) // 2 + half
                total += _write(head, first, at, _pairs(words), half < WIDTH // 2)
    return total, worst


@triton.jit
def _seal(
    k_pages,
    v_pages,
    src,
    words,
    dst,
    sums,
    errors,
    queries,
    stride_k_entry,
    stride_k_layer,
    stride_k_head,
    stride_k_slot,
    stride_v_entry,
    stride_v_layer,
    stride_v_head,
    stride_v_slot,
    stride_s_entry,
    stride_s_layer,
    layers,
    HEADS: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    K_FORM: tl.constexpr,
    V_FORM: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    V_TILES: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_CODES: tl.constexpr,
    K_PARAMS: tl.constexpr,
    V_PARAMS: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK_KT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_VT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    number = tl.program_id(0) // HEADS
    kv_head = (tl.program_id(0) % HEADS).to(tl.int64)
    layer = (number % layers).to(tl.int64)
    entry = tl.load(src + number // layers)
    k_pages += entry * stride_k_entry + layer * stride_k_layer + kv_head * stride_k_head
    v_pages += entry * stride_v_entry + layer * stride_v_layer + kv_head * stride_v_head
    head = words + tl.load(dst + number // layers) * stride_s_entry + layer * stride_s_layer
    head += kv_head * HEAD_WORDS
    first = (kv_head * HEAD_WORDS).to(tl.int32)
    if K_FORM == _EXACT:
        total, worst = _seal_plain(
            k_pages, stride_k_slot, head, first, 0, K_FORM, K_DIM, PAGE_SIZE, BLOCK_KT, BLOCK_K
        )
    else:
        total, worst = _seal_k(
            k_pages, stride_k_slot, head, first, queries + (layer * HEADS + kv_head) * 2 * K_DIM,
            K_FORM, K_DIM, PAGE_SIZE, K_GROUP, K_PARAMS, BLOCK_K, MOVED,
        )  # fmt: skip
    tl.atomic_max(errors + number * 2, worst)
    if V_DIM > 0:
        if V_FORM <= _FP8:
            more, worst = _seal_plain(
                v_pages, stride_v_slot, head, first, V_CODES, V_FORM, V_DIM, PAGE_SIZE,
                BLOCK_VT, BLOCK_V,
            )  # fmt: skip
        else:
            more, worst = _seal_v(
                v_pages, stride_v_slot, head, first, V_CODES, V_FORM, V_DIM, PAGE_SIZE,
                V_GROUP, V_PARAMS, V_TILES, V_WIDTH, BLOCK_VT, BLOCK_V,
            )  # fmt: skip
        total += more
        tl.atomic_max(errors + number * 2 + 1, worst)
    tl.atomic_add(sums + number, total)


def _k_constants(layout: SliceLayout, *, moved: bool) -> dict[str, Any]:
    """How K is worked through: by channels, all tokens of the page at a time."""
    pieces, size = pieces_of(layout, "K"), layout.page_size
    # Exact numbers are copied as 16-bit words.
    dim = layout.k_dim * layout.dtype.itemsize // 2 if pieces.form == EXACT else layout.k_dim
    width = triton.next_power_of_2(dim // 4 if pieces.form == INT4 else dim)
    block = max(1, _TILE // width), width
    if pieces.form != EXACT:
        block = size, MOVE_BLOCK if moved else max(16, _TILE // size)
    return {
        "K_FORM": pieces.form,
        "K_GROUP": pieces.group or size,
        "K_DIM": dim,
        "BLOCK_KT": min(size, block[0]),
        "BLOCK_K": min(width, block[1]),
    }


def _v_constants(layout: SliceLayout) -> dict[str, Any]:
    """How V is worked through: by tokens, of integers a group of columns at a time."""
    dim = layout.v_dim
    if not dim:
        names = ("FORM", "GROUP", "TILES", "WIDTH", "DIM")
        return {f"V_{name}": 0 for name in names} | {"BLOCK_VT": 0, "BLOCK_V": 0}
    pieces = pieces_of(layout, "V")
    dim = dim * layout.dtype.itemsize // 2 if pieces.form == EXACT else dim
    width = {INT8: pieces.group, INT4: pieces.width}.get(pieces.form, dim)
    block = triton.next_power_of_2(width)
    together = block * (pieces.group // width if pieces.form > FP8 else 1)
    return {
        "V_FORM": pieces.form,
        "V_GROUP": pieces.group,
        "V_TILES": pieces.tiles,
        "V_WIDTH": width,
        "V_DIM": dim,
        "BLOCK_VT": min(layout.page_size, max(1, _TILE // together)),
        "BLOCK_V": block,
    }


def seal_launch(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor,
    layout: SliceLayout, receipt: Receipt, queries: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch of `seal`; `receipt` is zeros before. Reads shapes and strides only."""
    k, v = (
        pages.view(torch.int16) if part.form == "exact" else pages
        for pages, part in ((k_pages, layout.k), (v_pages, layout.v))
    )
    layers = k.shape[1]
    return Launch(
        kernel=_seal,
        grid=(src.shape[0] * layers * layout.kv_heads,),
        arguments={
            "k_pages": k,
            "v_pages": v,
            "src": src,
            "words": slices.view(torch.int16),
            "dst": dst,
            "sums": receipt.sums,
            "errors": receipt.errors,
            "queries": receipt.errors if queries is None else queries,
            "stride_k_entry": k.stride(0),
            "stride_k_layer": k.stride(1),
            "stride_k_head": k.stride(2),
            "stride_k_slot": k.stride(3),
            "stride_v_entry": v.stride(0),
            "stride_v_layer": v.stride(1),
            "stride_v_head": v.stride(2),
            "stride_v_slot": v.stride(3),
            "stride_s_entry": slices.stride(0) // 2,
            "stride_s_layer": slices.stride(1) // 2,
            "layers": layers,
            "HEADS": layout.kv_heads,
            "HEAD_WORDS": layout.head_bytes // 2,
            "PAGE_SIZE": layout.page_size,
            "V_CODES": layout.v_codes // 2,
            "K_PARAMS": layout.k_params // 2,
            "V_PARAMS": layout.v_params // 2,
            "MOVED": queries is not None,
        }
        | _k_constants(layout, moved=queries is not None)
        | _v_constants(layout),
    )


def seal(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor,
    layout: SliceLayout, queries: Tensor | None = None,
) -> Receipt:  # fmt: skip
    """Code layers of full pages as slices of sealed ones.

    - `k_pages`, `v_pages`: `[entries, layers, kv_heads, page_size, k_dim or v_dim]` of the layout's
      dtype, last stride 1.
    - `src`: int64 `[n]`, entries of the full pages.
    - `slices`: uint8 `[entries of sealed pages, layers, slice_bytes]`, last stride 1; written.
    - `dst`: int64 `[n]`, entries there, distinct.
    - `queries`: fp32 `[layers, kv_heads, 2, k_dim]`, contiguous, or `None`: what queries are like,
      for which errors of keys of 4 bits are made to cancel (`reference.moves`).

    Codes are chosen in fp32: of the scales that are tried for a group, the one with the least sum
    of squared errors. Raises ValueError where shapes or dtypes disagree, or for groups that
    `sealed_pieces` can't read.
    """
    check_seal(k_pages, v_pages, src, slices, dst, layout, queries)
    shape = src.shape[0], k_pages.shape[1]
    receipt = Receipt(
        torch.zeros(shape, dtype=torch.int64, device=src.device),
        torch.zeros(*shape, 2, device=src.device),
    )
    launch = seal_launch(k_pages, v_pages, src, slices, dst, layout, receipt, queries)
    if receipt.sums.numel():
        launch.run(k_pages.device)
    return receipt
