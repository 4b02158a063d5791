"""The oracle of sealing: K and V of full pages as coded slices, and back (`sealed`)."""

import torch
from torch import Tensor

from kvpaged_kernels.reference.checksum import checksum
from kvpaged_kernels.reference.moves import move_codes
from kvpaged_kernels.sealed import SCALE_SHIFT, ZERO_SHIFT, ZERO_UNIT, Part, Receipt, SliceLayout
from kvpaged_kernels.sealed_checks import check_seal

TRIED = (2, 1, 0, -1)
"""Scales that are tried for a group, by their distance from the first that holds its whole range:
larger ones make up for a coarse zero point, the smaller one clips. The one with the least sum of
squared errors is taken.
"""

E4M3_MOST = 448.0
_MOST = (31 << 10 - SCALE_SHIFT) - 1
"""The largest scale: what comes after stands for infinity."""
_HALF = 65504.0
"""The largest fp16 number."""
_FARTHEST = 248.0
"""The largest zero point."""


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
    of squared errors. Which of two equally good ones, and which of two codes a value lies between,
    is left open: sums are rounded differently everywhere. Raises ValueError where shapes, dtypes or
    devices disagree, or queries are given for keys that are not of 4 bits.
    """
    check_seal(k_pages, v_pages, src, slices, dst, layout, queries)
    k, v = k_pages[src].flatten(0, 1), v_pages[src].flatten(0, 1)
    each = None if queries is None else queries.repeat(len(src), 1, 1, 1)
    made = code(k, v, layout, each)
    errors = [
        (back.float() - given.float()).abs().flatten(1).amax(1) if given.numel() else torch.zeros(0)
        for back, given in zip(unseal(made, layout), (k, v), strict=True)
    ]
    errors[1] = errors[1] if v.numel() else torch.zeros_like(errors[0])
    made = made.view(len(src), -1, layout.slice_bytes)
    slices[dst] = made
    words = made.view(torch.int32).unsqueeze(2)
    sums = checksum(words, torch.arange(len(src), device=words.device))
    return Receipt(sums, torch.stack(errors, 1).unflatten(0, (len(src), -1)))


def code(k: Tensor, v: Tensor, layout: SliceLayout, queries: Tensor | None = None) -> Tensor:
    """Slices, uint8 `[n, slice_bytes]`, of one layer of full pages, `[n, kv_heads, page_size, k_dim
    or v_dim]`, with queries `[n, kv_heads, 2, k_dim]`.
    """
    n, heads = k.shape[:2]
    out = torch.zeros(n, heads, layout.head_bytes, dtype=torch.uint8, device=k.device)
    k_codes, k_params = _code_k(k, layout.k, queries)
    v_codes, v_params = _code_v(v, layout.v)
    pieces = (
        (0, k_codes), (layout.v_codes, v_codes), (layout.k_params, k_params),
        (layout.v_params, v_params),
    )  # fmt: skip
    for at, piece in pieces:
        if piece is not None and piece.numel():
            content = piece.reshape(n, heads, -1).contiguous().view(torch.uint8)
            out[:, :, at : at + content.shape[2]] = content
    return out.view(n, heads * layout.head_bytes)


def unseal(slices: Tensor, layout: SliceLayout) -> tuple[Tensor, Tensor]:
    """K and V of slices, uint8 `[n, slice_bytes]`: fp32 `[n, kv_heads, page_size, dim]`, or exact
    parts in their own dtype.
    """
    n, heads, size = len(slices), layout.kv_heads, layout.page_size
    head = slices.view(n, heads, layout.head_bytes)

    def piece(at: int, dtype: torch.dtype, *shape: int) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        part = head[:, :, at : at + count].contiguous()
        return part.view(dtype).view(n, heads, *shape)

    found = []
    for part, at, dim in ((layout.k, 0, layout.k_dim), (layout.v, layout.v_codes, layout.v_dim)):
        if part.form == "exact":
            found.append(piece(at, layout.dtype, size, dim))
        elif part.form == "fp8":
            found.append(piece(at, torch.float8_e4m3fn, size, dim).float())
        else:
            raw = piece(at, torch.uint8, size, dim * part.bits // 8)
            found.append(_unpacked(raw, part.bits).float())
    k, v = found
    if layout.k.form == "fp8":
        k = k + piece(layout.k_params, torch.float16, 1, layout.k_dim).float()
    if layout.k.form == "int":
        groups = size // layout.k.group
        params = piece(layout.k_params, torch.int16, groups, 1, layout.k_dim)
        scale, low = meaning(params, layout.k.bits)
        k = (k.unflatten(2, (groups, -1)) * scale + low).flatten(2, 3)
    if layout.v.form == "int" and layout.v_dim:
        groups = layout.v_dim // layout.v.group
        params = piece(layout.v_params, torch.int16, groups, size).transpose(2, 3).unsqueeze(4)
        scale, low = meaning(params, layout.v.bits)
        v = (v.unflatten(3, (groups, -1)) * scale + low).flatten(3, 4)
    return k, v


def meaning(params: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of parameters (int16): the scale, and what code 0 stands for, fp32 both."""
    scale = _fp16((params.int() >> 8 & 0xFF) << SCALE_SHIFT)
    zero = _fp16((params.int() & 0x80) << 8 | (params.int() & 0x7F) << ZERO_SHIFT)
    return scale, scale * zero * (ZERO_UNIT * 2**bits / 16)


def _fp16(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.float16).float()


def _bits(x: Tensor) -> Tensor:
    return x.half().view(torch.int16).int() & 0xFFFF


def _code_k(k: Tensor, part: Part, queries: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if part.form == "exact":
        return k, None
    if part.form == "fp8":
        x = k.float()
        middle = ((x.amax(2, keepdim=True) + x.amin(2, keepdim=True)) / 2).clamp(-_HALF, _HALF)
        return _e4m3(x - middle.half().float()), middle.half()
    grouped = k.float().unflatten(2, (-1, part.group)).transpose(3, 4)  # [.., groups, dim, tokens]
    codes, params = _quantise(grouped, part.bits)
    codes = codes.transpose(3, 4)  # [n, heads, groups, tokens, dim]
    if queries is not None:
        scale, base = (each.unsqueeze(3) for each in meaning(params, part.bits))
        error = base + scale * codes - grouped.transpose(3, 4)
        like = queries[:, :, None, None]
        codes = move_codes(codes.float(), scale, error, like, top=2**part.bits - 1)[0]
    return _packed(codes.to(torch.uint8).flatten(2, 3), part.bits), params


def _code_v(v: Tensor, part: Part) -> tuple[Tensor, Tensor | None]:
    if part.form == "exact" or not v.shape[3]:
        return v, None
    if part.form == "fp8":
        return _e4m3(v.float()), None
    grouped = v.float().unflatten(3, (-1, part.group))  # [n, heads, tokens, groups, elements]
    codes, params = _quantise(grouped, part.bits)
    return _packed(codes.flatten(3, 4), part.bits), params.transpose(2, 3)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn)


def _quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of `x`'s shape, and parameters, int16 without its last dimension: of all in the
    last dimension of `x` (fp32) one.
    """
    top, unit = 2**bits - 1, 2**bits / 16
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    wanted = torch.maximum((high - low) / top, low.abs() / (_FARTHEST * unit))
    wanted = wanted.clamp(max=_HALF)
    most = _bits(wanted)  # the bits of a positive fp16 number rise with it
    most += (_fp16(most) < wanted).int()
    most = most + (1 << SCALE_SHIFT) - 1 >> SCALE_SHIFT  # the first scale that is not below
    best = codes = params = None
    for step in TRIED:
        kept = (most + step).clamp(1, _MOST)
        scale = _fp16(kept << SCALE_SHIFT)
        begin = (low + high - top * scale) / 2  # what goes beyond is clipped on both sides
        zero = (begin / (scale * unit)).clamp(-_FARTHEST, _FARTHEST)
        zero_bits = _bits(zero.abs() / ZERO_UNIT) + (1 << ZERO_SHIFT - 1) >> ZERO_SHIFT
        zero_bits = zero_bits.clamp(max=0x7F) | (zero < 0).int() << 7
        param = kept << 8 | zero_bits
        _, base = meaning(param, bits)
        code = ((x - base) / scale).round().clamp(0, top)
        error = (base + scale * code - x).square().sum(-1, keepdim=True)
        if best is None or codes is None or params is None:
            best, codes, params = error, code, param
        else:
            better = error < best
            best = torch.where(better, error, best)
            codes = torch.where(better, code, codes)
            params = torch.where(better, param, params)
    assert codes is not None
    assert params is not None
    return codes.to(torch.uint8), params.squeeze(-1).to(torch.int16)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes, the last dimension packed."""
    if bits == 8:
        return codes
    parts = codes.to(torch.int32).unflatten(-1, (4, -1)).unbind(-2)
    words: Tensor = parts[0] | parts[1] << 4 | parts[2] << 8 | parts[3] << 12
    return words.to(torch.int16).view(torch.uint8)


def _unpacked(raw: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return raw
    words = raw.contiguous().view(torch.int16).to(torch.int32)
    return torch.cat([words >> 4 * n & 15 for n in range(4)], dim=-1)
