"""K and V of full pages as coded slices, and back, in stock torch (`kvpaged_kernels.sealed`)."""

import torch
from torch import Tensor

from kvpaged_kernels.cpu.native_copy import coefficients
from kvpaged_kernels.sealed import (
    MOVE_BLOCK,
    MOVES,
    SCALE_SHIFT,
    ZERO_SHIFT,
    ZERO_UNIT,
    Part,
    Receipt,
    SliceLayout,
)

TRIED = (2, 1, 0, -1)
"""Scales that are tried for a group, by their distance from the first that holds its whole range,
as `reference.seal` says.
"""

E4M3_MOST = 448.0
LARGEST_HALF = 65504.0
LARGEST_SCALE = (31 << 10 - SCALE_SHIFT) - 1
FARTHEST_ZERO = 248.0


def seal_pages(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor,
    layout: SliceLayout, queries: Tensor | None,
) -> Receipt:  # fmt: skip
    """Seal, as `reference.seal.seal` defines it; page by page, which bounds what it needs."""
    layers = k_pages.shape[1]
    factors = torch.from_numpy(coefficients(0, layout.slice_bytes // 4)).long()
    sums = torch.empty(len(src), layers, dtype=torch.int64)
    errors = torch.zeros(len(src), layers, 2)
    for i, (page, entry) in enumerate(zip(src.tolist(), dst.tolist(), strict=True)):
        given = k_pages[page], v_pages[page]
        made = _code(*given, layout, queries)
        slices[entry] = made
        sums[i] = (made.view(torch.int32).long() * factors).sum(1)
        for kind, (back, exact) in enumerate(zip(unseal(made, layout), given, strict=True)):
            if exact.numel():
                errors[i, :, kind] = (back.float() - exact.float()).abs().flatten(1).amax(1)
    return Receipt(sums, errors)


def unseal(slices: Tensor, layout: SliceLayout) -> tuple[Tensor, Tensor]:
    """K and V of slices, uint8 `[n, slice_bytes]`: `[n, kv_heads, page_size, dim]`, exact parts in
    their own dtype, others in fp32.
    """
    size = layout.page_size
    heads = slices.unflatten(1, (layout.kv_heads, layout.head_bytes))
    k = _numbers(heads, 0, layout.k, layout.k_dim, layout)
    v = _numbers(heads, layout.v_codes, layout.v, layout.v_dim, layout)
    if layout.k.form == "fp8":
        middles = _piece(heads, layout.k_params, 2 * layout.k_dim).view(torch.float16)
        k.add_(middles.float().unsqueeze(2))
    if layout.k.form == "int":
        groups = size // layout.k.group
        params = _piece(heads, layout.k_params, 2 * layout.k_dim * groups).view(torch.int16)
        scale, low = _meaning(params.unflatten(2, (groups, 1, -1)), layout.k.bits)
        k = k.unflatten(2, (groups, -1)).mul_(scale).add_(low).flatten(2, 3)
    if layout.v.form == "int" and layout.v_dim:
        groups = layout.v_dim // layout.v.group
        params = _piece(heads, layout.v_params, 2 * size * groups).view(torch.int16)
        turned = params.unflatten(2, (groups, size)).transpose(2, 3).unsqueeze(4)
        scale, low = _meaning(turned, layout.v.bits)
        v = v.unflatten(3, (groups, -1)).mul_(scale).add_(low).flatten(3, 4)
    return k, v


def _piece(heads: Tensor, first: int, count: int) -> Tensor:
    return heads[:, :, first : first + count].contiguous()


def _numbers(heads: Tensor, first: int, part: Part, dim: int, layout: SliceLayout) -> Tensor:
    """Codes as numbers: `[n, heads, page_size, dim]`."""
    shape = layout.page_size, dim
    raw = _piece(heads, first, layout.page_size * dim * part.bits // 8)
    if part.bits == 4:
        words = raw.view(torch.int16).int().unflatten(2, (layout.page_size, dim // 4))
        return torch.cat([(words >> 4 * n & 15).float() for n in range(4)], dim=-1)
    if part.form == "exact":
        found = raw.view(layout.dtype)
    else:
        found = (raw.view(torch.float8_e4m3fn) if part.form == "fp8" else raw).float()
    return found.view(*found.shape[:2], *shape)


def _meaning(params: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Of parameters (int16): the scale, and what code 0 stands for, fp32 both."""
    whole = params.int()
    scale = _fp16((whole >> 8 & 0xFF) << SCALE_SHIFT)
    zero = _fp16((whole & 0x80) << 8 | (whole & 0x7F) << ZERO_SHIFT)
    return scale, scale * zero * (ZERO_UNIT * 2**bits / 16)


def _fp16(bits: Tensor) -> Tensor:
    return bits.short().view(torch.float16).float()


def _bits(x: Tensor) -> Tensor:
    return x.half().view(torch.int16).int()


def _code(k: Tensor, v: Tensor, layout: SliceLayout, queries: Tensor | None) -> Tensor:
    """Slices, uint8 `[layers, slice_bytes]`, of a page, `[layers, kv_heads, page_size, dim]`."""
    made = torch.zeros(*k.shape[:2], layout.head_bytes, dtype=torch.uint8)

    def put(first: int, piece: Tensor) -> None:
        content = piece.flatten(2).contiguous().view(torch.uint8)
        made[:, :, first : first + content.shape[2]] = content

    if layout.k.form == "fp8":
        x = k.float()
        middle = ((x.amax(2) + x.amin(2)) / 2).clamp(-LARGEST_HALF, LARGEST_HALF).half()
        put(0, _e4m3(x - middle.float().unsqueeze(2)))
        put(layout.k_params, middle)
    elif layout.k.form == "int":
        grouped = k.float().unflatten(2, (-1, layout.k.group))
        codes, params = _quantise(grouped, 3, layout.k.bits)
        if queries is not None:
            scale, low = _meaning(params, layout.k.bits)
            like = queries[:, :, None, None].unbind(-2)
            codes = _moved(codes.float(), scale, low.add(scale * codes).sub_(grouped), *like)
        put(0, _packed(codes.flatten(2, 3), layout.k.bits))
        put(layout.k_params, params)
    else:
        put(0, k)
    if layout.v.form == "fp8":
        put(layout.v_codes, _e4m3(v.float()))
    elif layout.v.form == "int" and layout.v_dim:
        grouped = v.float().unflatten(3, (-1, layout.v.group))
        codes, params = _quantise(grouped, 4, layout.v.bits)
        put(layout.v_codes, _packed(codes.flatten(3, 4), layout.v.bits))
        put(layout.v_params, params.squeeze(4).transpose(2, 3))
    elif layout.v_dim:
        put(layout.v_codes, v)
    return made.flatten(1)


def _moved(codes: Tensor, scale: Tensor, error: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Codes of 4 bits, `[..., k_dim]`, moved as `reference.moves` says."""
    quarter = codes.shape[-1] // 4
    lines = [x.expand(codes.shape).unflatten(-1, (4, quarter)) for x in (codes, scale, error, u, w)]
    along = codes.new_zeros(())
    out = lines[0].clone()
    for start in range(0, quarter, MOVE_BLOCK):
        for part in range(4):
            mine = slice(start, start + MOVE_BLOCK)
            code, step, off, toward, weight = (x[..., part, mine] for x in lines)
            along = along + (off * toward).sum(-1, keepdim=True)
            for _ in range(MOVES):
                up = torch.where(along * toward > 0, -1.0, 1.0)
                by = up * step
                across = by * toward
                change = across * (2 * along + across) + weight * by * (2 * off + by)
                after = code + up
                change[(after < 0) | (after > 15) | (toward == 0)] = torch.inf
                least, at = change.min(-1, keepdim=True)
                taken = torch.zeros_like(change).scatter_(-1, at, (least < 0).float())
                code, off = code + taken * up, off + taken * by
                along = along + (taken * across).sum(-1, keepdim=True)
            out[..., part, mine] = code
    moved: Tensor = out.flatten(-2).to(torch.uint8)
    return moved


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn)


def _quantise(x: Tensor, of: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (uint8) of `x` (fp32), and a parameter (int16) for all along its dimension `of`."""
    top, unit = 2**bits - 1, 2**bits / 16
    low, high = x.amin(of, keepdim=True), x.amax(of, keepdim=True)
    wanted = torch.maximum((high - low) / top, low.abs() / (FARTHEST_ZERO * unit))
    wanted = wanted.clamp(max=LARGEST_HALF)
    # The bits of a positive fp16 number rise with it: the first scale that is not below.
    bits_up = _bits(wanted) + (wanted.half().float() < wanted)
    first = (bits_up + (1 << SCALE_SHIFT) - 1) >> SCALE_SHIFT
    best = torch.full_like(low, torch.inf)
    codes = torch.zeros_like(x)
    params = torch.zeros_like(first)
    for step in TRIED:
        kept = (first + step).clamp(1, LARGEST_SCALE)
        scale = _fp16(kept << SCALE_SHIFT)
        begin = (low + high - top * scale) / 2
        zero = (begin / (scale * unit)).clamp(-FARTHEST_ZERO, FARTHEST_ZERO)
        nearest = (_bits(zero.abs() / ZERO_UNIT) + (1 << ZERO_SHIFT - 1)) >> ZERO_SHIFT
        param = kept << 8 | nearest.clamp(max=0x7F) | (zero < 0).int() << 7
        base = _meaning(param, bits)[1]
        code = ((x - base) / scale).round_().clamp_(0, top)
        error = (base + scale * code - x).square_().sum(of, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better, code, codes)
        params = torch.where(better, param, params)
    return codes.to(torch.uint8), params.short()


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes, the last dimension packed."""
    if bits == 8:
        return codes
    a, b, c, d = codes.int().unflatten(-1, (4, -1)).unbind(-2)
    words: Tensor = (a | b << 4 | c << 8 | d << 12).short()
    return words
