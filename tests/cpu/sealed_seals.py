"""Whether pages are sealed as well as the oracle does it."""

import torch
from torch import Tensor

from kvpaged_kernels.cpu import mixed
from kvpaged_kernels.reference.checksum import checksum
from kvpaged_kernels.reference.seal import code, unseal
from kvpaged_kernels.sealed import Part, SliceLayout
from tests.cpu.sealed_rows import lay_out, numbers


def check_seal(
    k: Part, v: Part, dtype: torch.dtype, *, native: bool, heads: int = 2, size: int = 32,
    dims: tuple[int, int] = (64, 64), moved: bool = False,
) -> None:  # fmt: skip
    """Seal some pages of two layers, and look at all that is said of it."""
    torch.manual_seed(0)
    layout = lay_out(k, v, dtype, heads=heads, size=size, dims=dims)
    # Slots lie apart, as they do where several layers or kinds share a page.
    pages = [numbers(5, 2, heads, size, dim + 8).to(dtype)[..., :dim] for dim in dims]
    pages[0][1, 0] = 0
    pages[0][1, 1, 0, :, 3] = 7
    pages[1][1, 0, :, 2] = -3
    pages[1][3] *= 1e4 if dtype != torch.float16 else 1e3
    pages[0][3] *= 1e-6
    slices = torch.full((6, 2, layout.slice_bytes + 16), 0xA5, dtype=torch.uint8)[..., :-16]
    whole = slices.clone()
    src, dst = torch.tensor([1, 3, 4]), torch.tensor([5, 0, 2])
    query = torch.randn(2, heads, 2, dims[0]) if moved else None
    if query is not None:
        query[:, :, 1] = query[:, :, 1].exp()
    sums, errors = mixed.seal(pages[0], pages[1], src, slices, dst, layout, query, native=native)
    rest = [i for i in range(6) if i not in dst.tolist()]
    assert torch.equal(slices[rest], whole[rest])
    parent = slices._base
    assert parent is not None
    assert (parent[..., -16:] == 0xA5).all()
    words = slices[dst].view(torch.int32).unsqueeze(2)
    assert sums.dtype == torch.int64
    assert torch.equal(sums, checksum(words, torch.arange(3)))
    assert errors.dtype == torch.float32
    given = [x[src].flatten(0, 1) for x in pages]
    made = slices[dst].flatten(0, 1)
    toward = None if query is None else query.repeat(3, 1, 1, 1)
    best = code(given[0], given[1], layout, toward)
    back, other = unseal(made, layout), unseal(best, layout)
    for kind, (got, best, x, form) in enumerate(zip(back, other, given, (k, v), strict=True)):
        off = (got.float() - x.float()).abs().flatten(1).amax(1).view(3, 2)
        most = x.float().abs().flatten(1).amax(1).view(3, 2)
        assert ((errors[..., kind] - off).abs() <= 1e-6 * most).all()
        if form.form != "int":
            assert torch.equal(got.float(), best.float())
            continue
        if kind == 0 and toward is not None:
            costs = [_costs(y, x, toward) for y in (got, best)]
            assert (costs[0].mean(2) <= 1.01 * costs[1].mean(2)).all()
            same = (got == best).all(-1).float().mean()
            assert same > (0.97 if dtype == torch.float32 else 0.75), same
            continue
        squares = [_squares(y, x, layout, kind) for y in (got, best)]
        ranges = _squares(torch.zeros_like(got), x, layout, kind)
        assert (squares[0] <= 1.001 * squares[1] + 1e-9 * ranges).all()
        if form.bits == 8:
            assert torch.allclose(got, best, rtol=0.02, atol=0.02 * float(most.max()))
    tail = layout.head_bytes - _used(layout)
    if tail:
        ends = made.view(-1, heads, layout.head_bytes)[..., -tail:]
        assert not ends.any()


def _squares(back: Tensor, x: Tensor, layout: SliceLayout, kind: int) -> Tensor:
    """Sums of squared errors of all that shares a parameter."""
    error = (back.double() - x.double()).square()
    group = (layout.k, layout.v)[kind].group
    sums: Tensor = error.unflatten(2 + kind, (-1, group)).sum(3 + kind)
    return sums


def _costs(back: Tensor, x: Tensor, query: Tensor) -> Tensor:
    """Of each key, what `kvpaged_kernels.reference.moves` calls its cost."""
    error = back.double() - x.double()
    along = torch.einsum("nhtd,nhd->nht", error, query[:, :, 0].double())
    return along.square() + torch.einsum("nhtd,nhd->nht", error.square(), query[:, :, 1].double())


def _used(layout: SliceLayout) -> int:
    """Bytes of a head that mean something."""
    if layout.v.form != "int":
        return layout.v_params
    return layout.v_params + 2 * layout.page_size * (layout.v_dim // layout.v.group)
