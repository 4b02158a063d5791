"""Rows over sealed and exact pages, at random, and what their attention is in fp64."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpaged_kernels.reference import mixed as oracle
from kvpaged_kernels.reference.seal import code, unseal
from kvpaged_kernels.sealed import Part, SliceLayout


def part(form: str, dtype: torch.dtype, group: int = 16) -> Part:
    """A way to code, by a short name."""
    return {
        "exact": Part("exact", 8 * dtype.itemsize),
        "fp8": Part("fp8", 8),
        "int8": Part("int", 8, group),
        "int4": Part("int", 4, group),
    }[form]


def lay_out(
    k: Part, v: Part, dtype: torch.dtype, *, heads: int = 2, size: int = 16,
    dims: tuple[int, int] = (64, 64),
) -> SliceLayout:  # fmt: skip
    return SliceLayout.of(
        k, v, kv_heads=heads, page_size=size, k_dim=dims[0], v_dim=dims[1], dtype=dtype
    )


def numbers(*shape: int) -> Tensor:
    """Like keys: some channels are far from 0, some far wider than others."""
    x = torch.randn(shape) * torch.rand(shape[-1]).mul(3).sub(2).exp()
    return x + torch.randn(shape[-1])


class Rows(NamedTuple):
    """Arguments of attention, and of the same in fp32 and with what is sealed rounded to a dtype,
    by which a result is judged.
    """

    given: dict[str, Any]
    wide: dict[str, Any]
    rounded: dict[str, Any]

    def judge(self, out: Tensor, kind: str) -> None:
        """The error of `out` is within a small multiple of what rounding costs."""
        attend = getattr(oracle, kind)
        exact, other = attend(**self.wide).double(), attend(**self.rounded).double()
        assert out.shape == exact.shape
        assert out.dtype == self.given["q"].dtype
        if not out.numel():
            return
        rounding = [(x - exact).abs().max().item() for x in (other, exact.to(out.dtype).double())]
        error = (out.double() - exact).abs().max().item()
        # Scores, up to some 50 here, are sums in fp32; e^x makes their errors relative ones.
        summing = 64 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert error <= 3 * sum(rounding) + summing, (error, rounding, summing)


def make_rows(
    layout: SliceLayout, lengths: list[int], counts: list[int] | None = None, *, group: int = 3,
    keep: int = 0, window: int | None = None, softcap: float | None = None, sinks: bool = False,
    slopes: bool = False,
) -> Rows:  # fmt: skip
    """Rows of `lengths` tokens, `counts` of them new (`None`: decode).

    What nothing may look at is NaN, and entries of the table that it may not use are wrong.
    """
    size, heads, dims = layout.page_size, layout.kv_heads, (layout.k_dim, layout.v_dim)
    places = [max(n - 1, 0) // size for n in lengths]
    width = max(places) + 1
    total = len(lengths) * width + 2
    order = torch.randperm(total)
    sealed = [numbers(total, heads, size, dim).to(layout.dtype) for dim in dims]
    exact = [torch.full((total, heads, size, dim), torch.nan, dtype=layout.dtype) for dim in dims]
    used = torch.zeros(total, dtype=torch.bool)
    table = torch.full((len(lengths), width), 2**30, dtype=torch.int32)
    own: list[list[Tensor]] = [[], []]
    cu_own = [0]
    for row, (length, place) in enumerate(zip(lengths, places, strict=True)):
        new = 1 if counts is None else counts[row]
        start = length - new
        first = 0 if window is None else max(0, start - window + 1)
        for page in range(first // size, place + 1 if counts is None else place):
            if not length or not new:
                break
            entry = order[row * width + page]
            table[row, page] = entry
            used[entry] = keep <= page < place
            if not used[entry]:
                stop = min(length - page * size, size)
                for x in exact:
                    x[entry, :, :stop] = numbers(*x[entry, :, :stop].shape).to(x.dtype)
        pages = range(start // size, place + 1) if new and length else range(0)
        for page in pages:
            stop = min(length - page * size, size)
            for kind, dim in zip(own, dims, strict=True):
                made = torch.full((heads, size, dim), torch.nan, dtype=layout.dtype)
                made[:, :stop] = numbers(heads, stop, dim).to(layout.dtype)
                kind.append(made)
        cu_own.append(cu_own[-1] + len(pages))
    tokens = len(lengths) if counts is None else sum(counts)
    given: dict[str, Any] = {
        "q": torch.randn(heads * group, tokens, dims[0]).to(layout.dtype).transpose(0, 1),
        "block_table": table, "seq_lens": torch.tensor(lengths, dtype=torch.int32), "keep": keep,
        "scale": dims[0] ** -0.5, "window": window, "softcap": softcap,
        "sinks": torch.randn(heads * group) if sinks else None,
        "alibi_slopes": torch.rand(heads * group) if slopes else None,
    }  # fmt: skip
    if counts is not None:
        given |= {
            "cu_q": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            "cu_own": torch.tensor(cu_own, dtype=torch.int32), "max_q": max(counts),
            "max_len": max(lengths),
        }  # fmt: skip
        for name, kind, dim in zip(("own_k", "own_v"), own, dims, strict=True):
            none = torch.zeros(0, heads, size, dim, dtype=layout.dtype)
            given[name] = torch.stack(kind) if kind else none
    back = unseal(code(sealed[0], sealed[1], layout), layout)
    narrow = [x.to(layout.dtype).float() for x in back]
    whole = Part("exact", 32)
    fine = [
        lay_out(k, v, torch.float32, heads=heads, size=size, dims=dims)
        for k, v in ((_wide(layout.k), _wide(layout.v)), (whole, whole))
    ]
    wide = {x: y.float() if _is_float(y) else y for x, y in given.items()}
    wide |= {"k_pages": exact[0].float(), "v_pages": exact[1].float()}
    given |= {"k_pages": exact[0], "v_pages": exact[1]}
    return Rows(
        given | {"slices": _slices(sealed, used, layout), "layout": layout},
        wide | {"slices": _slices([x.float() for x in sealed], used, fine[0]), "layout": fine[0]},
        wide | {"slices": _slices(narrow, used, fine[1]), "layout": fine[1]},
    )


def _wide(form: Part) -> Part:
    return Part("exact", 32) if form.form == "exact" else form


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _slices(pages: list[Tensor], used: Tensor, layout: SliceLayout) -> Tensor:
    """One of two layers; what isn't used stands for NaN."""
    made = torch.full((len(used), 2, layout.slice_bytes), 0xFF, dtype=torch.uint8)
    if used.any():
        made[used, 1] = code(pages[0][used], pages[1][used], layout)
    return made[:, 1]
