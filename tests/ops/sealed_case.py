"""Sequences over sealed and exact pages for kernel tests."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvpaged_kernels.reference.seal import code
from kvpaged_kernels.sealed import Part, SliceLayout
from tests.ops.paging import GARBAGE

FORMATS = {
    "int4": ("int4", "int4"), "int8": ("int8", "int8"), "fp8": ("fp8", "fp8"),
    "k8v4": ("int8", "int4"), "k-only": ("int4", "exact"), "v-only": ("exact", "int8"),
    "mixed": ("fp8", "int4"),
}  # fmt: skip
"""How K and V are coded, by names of these tests."""


def sealed_layout(
    name: str, dtype: torch.dtype, *, page_size: int = 32, k_dim: int = 64, v_dim: int = 64,
    kv_heads: int = 1, k_group: int = 32, v_group: int = 32,
) -> SliceLayout:  # fmt: skip
    """The layout of one of `FORMATS`; groups are of integers."""
    parts = []
    for form, group in zip(FORMATS[name], (k_group, v_group), strict=True):
        if form == "exact":
            parts.append(Part("exact", 8 * dtype.itemsize))
        elif form == "fp8":
            parts.append(Part("fp8", 8))
        else:
            parts.append(Part("int", int(form[3:]), min(group, page_size) if not parts else group))
    return SliceLayout.of(
        *parts, kv_heads=kv_heads, page_size=page_size, k_dim=k_dim, v_dim=v_dim, dtype=dtype
    )


class SealedCase(NamedTuple):
    """What a kernel reads. Exact pages that nobody reads hold NaN, and so do slots behind the end;
    slices that nobody reads hold bytes that stand for huge numbers.
    """

    layout: SliceLayout
    k_pages: Tensor
    v_pages: Tensor
    slices: Tensor
    block_table: Tensor
    seq_lens: Tensor

    def arguments(self) -> dict[str, Any]:
        """The arguments that decode and prefill share."""
        return {
            "k_pages": self.k_pages,
            "v_pages": self.v_pages,
            "slices": self.slices,
            "layout": self.layout,
            "block_table": self.block_table,
            "seq_lens": self.seq_lens,
        }


def sealed_case(
    layout: SliceLayout, lengths: Sequence[int], *, keep: int, needed_from: Sequence[int] = (),
    own: bool = True, seed: int = 0,
) -> SealedCase:  # fmt: skip
    """Sequences of these lengths; `needed_from`: the first token that each may read.

    Without `own` (prefill) the page of the last token has no entry.
    """
    generator = torch.Generator().manual_seed(seed)
    size = layout.page_size
    needed_from = needed_from or [0] * len(lengths)
    counts = [-(-length // size) for length in lengths]
    entries = sum(counts) + 2
    head = layout.kv_heads, size
    # Every second head of something larger, and slices a little apart.
    k_pages = torch.full((entries, 2 * head[0], size, layout.k_dim), torch.nan, dtype=layout.dtype)
    v_pages = torch.full((entries, 2 * head[0], size, layout.v_dim), torch.nan, dtype=layout.dtype)
    k_pages, v_pages = k_pages[:, ::2], v_pages[:, 1::2]
    step = layout.slice_bytes + 48
    memory = torch.full((entries * step + 32,), 0x7B, dtype=torch.uint8)
    slices = memory.as_strided((entries, layout.slice_bytes), (step, 1), 32)
    width = max([*counts, 1]) + 1
    table = torch.tensor(GARBAGE, dtype=torch.int32)
    table = table[torch.randint(3, (len(lengths), width + 2), generator=generator)][:, 1:-1]
    exact_free, sealed_free = (torch.randperm(entries, generator=generator).tolist() for _ in "ab")
    for row, (length, first) in enumerate(zip(lengths, needed_from, strict=True)):
        for page in range(first // size, counts[row]):
            k = torch.randn(1, *head, layout.k_dim, generator=generator) * 1.5
            k += torch.randn(layout.k_dim, generator=generator)
            v = torch.randn(1, *head, layout.v_dim, generator=generator) + 0.3
            k, v = k.to(layout.dtype), v.to(layout.dtype)
            last = page == (length - 1) // size
            if last and not own:
                continue
            if page < keep or last:
                table[row, page] = entry = exact_free.pop()
                used = min(length - page * size, size)
                k_pages[entry, :, :used] = k[0, :, :used]
                v_pages[entry, :, :used] = v[0, :, :used]
            else:
                table[row, page] = entry = sealed_free.pop()
                slices[entry] = code(k, v, layout)[0]
    return SealedCase(
        layout, k_pages, v_pages, slices, table, torch.tensor(lengths, dtype=torch.int32)
    )


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of results about 1 in size: sums of fp32, or products of numbers rounded to 8 bits, whose
    mean error is an eighth of what the worst of thousands may be.
    """
    if dtype == torch.float32:
        return {"worst": 1e-5, "mean": 1e-6}
    return {"worst": 2**-5, "mean": 2**-8}


def assert_near(found: Tensor, wanted: Tensor) -> None:
    """`found` is `wanted` but for roundings."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert found.is_contiguous()
    assert torch.isfinite(found).all()
    if not found.numel():
        return
    error = (found.double() - wanted.double()).abs()
    bound = tolerance(found.dtype)
    assert error.max() <= bound["worst"] * max(1.0, wanted.abs().max().item())
    assert error.mean() <= bound["mean"]
