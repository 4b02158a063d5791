"""The stock-torch paths against the eager oracles in fp64: any table, any shape, any option."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged import ops
from kvpaged.geometry import PageGeometry
from kvpaged.ops import LayerPages, Options
from kvpaged_kernels.cpu import prefill
from kvpaged_kernels.cpu.plan import DecodePlan, plan_decode
from kvpaged_kernels.reference.append import append as reference_append
from kvpaged_kernels.reference.attention import paged_decode, paged_prefill


def make_pages(
    pages: int, layout: Any, dtype: torch.dtype, *, page_size: int, kv_heads: int, dims: tuple
) -> LayerPages:
    shape = PageGeometry(
        layers=2, kv_heads=kv_heads, head_dim=dims[0], v_dim=dims[1],
        page_size=page_size, dtype=dtype, layout=layout,
    )  # fmt: skip
    size = pages * shape.page_bytes
    flat = torch.randn(size // shape.itemsize).to(dtype)
    k, v = (shape.view(1, kind, pages=pages, storage_bytes=size) for kind in ("k", "v"))
    return LayerPages.of(flat, k, v, step=shape.entries_per_page())


def make_table(rng, lengths, pages: LayerPages, total: int, style: str) -> torch.Tensor:
    """Block tables: each row one run, runs of two, pages anywhere, pages that all rows share, or a
    tree: each row begins as one before it and goes on by itself.
    """
    counts = [-(-n // pages.page_size) for n in lengths]
    width = max([*counts, 1])
    table = np.zeros((len(lengths), width), np.int64)
    if style == "runs":
        start = 0
        for row, count in enumerate(counts):
            table[row, :count] = np.arange(start, start + count)
            start += width
    elif style == "tree":
        for row in range(len(lengths)):
            table[row] = np.arange(row * width, (row + 1) * width)
            common = int(rng.integers(0, width + 1))
            table[row, :common] = table[int(rng.integers(0, row + 1)), :common]
    elif style == "shared":
        table[:, :] = rng.permutation(total)[:width]
    else:
        order = np.arange(total).reshape(-1, 2) if style == "pairs" else np.arange(total)
        order = rng.permutation(order).reshape(-1)
        start = 0
        for row, count in enumerate(counts):
            table[row, :count] = order[start : start + count]
            start += count
    return torch.from_numpy((table * pages.step).astype(np.int32))


def in_fp64(pages: LayerPages) -> tuple[torch.Tensor, torch.Tensor]:
    """The same views over a storage in fp64 (page-major views overlap: never copied by value)."""
    flat = pages.flat.double()
    k, v = (flat.as_strided(x[:4], x[4:8], x[8]) for x in (pages.k_view, pages.v_view))
    return k, v


def bound(exact: torch.Tensor, rounded: torch.Tensor, out: torch.Tensor) -> None:
    """Our error stays within a small multiple of what rounding the exact result costs."""
    if not out.numel():
        return
    dtype_error = (rounded.double() - exact).abs().max().item()
    error = (out.double() - exact).abs().max().item()
    assert error <= 4 * dtype_error + 2e-6, (error, dtype_error)


STYLES = ("runs", "pairs", "anywhere", "shared", "tree")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_decode_equals_the_oracle(data):
    layout = data.draw(st.sampled_from(["layer-major", "page-major"]))
    page_size = data.draw(st.sampled_from([16, 32, 64, 256]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    dims = data.draw(st.sampled_from([(64, 64), (80, 80), (96, 96), (128, 64), (16, 16)]))
    kv_heads, group = data.draw(st.sampled_from([(1, 4), (2, 3), (3, 1)]))
    rows = data.draw(st.integers(1, 5))
    longest = data.draw(st.sampled_from([40, 300, 900]))
    same = data.draw(st.booleans())
    lengths = [data.draw(st.integers(0, longest)) for _ in range(rows)]
    lengths = [lengths[0]] * rows if same else lengths
    style = data.draw(st.sampled_from(STYLES))
    window = data.draw(st.sampled_from([None, 1, 20, 130]))
    softcap = data.draw(st.sampled_from([None, 5.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    torch.manual_seed(int(rng.integers(2**16)))
    width = -(-max([*lengths, 1]) // page_size)
    total = 2 * -(-(width * rows + 4) // 2)
    pages = make_pages(total, layout, dtype, page_size=page_size, kv_heads=kv_heads, dims=dims)
    table = make_table(rng, lengths, pages, total, style)
    lens = torch.tensor(lengths, dtype=torch.int32)
    q = torch.randn(rows, kv_heads * group, dims[0]).to(dtype)
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    slopes = torch.rand(kv_heads * group) if data.draw(st.integers(0, 3)) == 0 else None
    options = Options(dims[0] ** -0.5, window, softcap, sinks, slopes)
    out = ops.decode(pages, q, table, lens, options, backend="cpu")
    exact = paged_decode(q.double(), *in_fp64(pages), table, lens, **options._asdict())
    assert out.shape == exact.shape
    assert out.dtype == dtype
    bound(exact, exact.to(dtype), out)


@pytest.mark.parametrize("layout", ["layer-major", "page-major"])
def test_what_rows_share_is_read_once(layout):
    """Three levels: all four rows, two pairs, each alone; one call for each piece."""
    joined = layout == "layer-major"
    table = np.array([[0, 1, 2, 3, 10], [0, 1, 2, 3, 12], [0, 1, 6, 7, 14], [0, 1, 6, 7, 16]])
    plan = plan_decode(
        table.astype(np.int32), np.array([70, 75, 79, 66]), page_size=16, step=1, joined=joined,
        dtype=torch.float32,
    )  # fmt: skip
    found = [(t.start, t.tokens, t.rows.tolist()) for t in plan.trunks]
    pages = [(0, [0, 1, 2, 3]), (2, [0, 1]), (6, [2, 3])]
    if joined:
        expected = [(start, 32, rows) for start, rows in pages]
    else:
        expected = [(start + i, 16, rows) for start, rows in pages for i in (0, 1)]
    assert sorted(found) == sorted(expected)
    assert sum(len(grid.owners) for grid in plan.grids) == 4


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_prefill_equals_the_oracle(data):
    layout = data.draw(st.sampled_from(["layer-major", "page-major"]))
    page_size = data.draw(st.sampled_from([16, 64]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    dims = data.draw(st.sampled_from([(64, 64), (80, 80), (96, 32)]))
    kv_heads, group = data.draw(st.sampled_from([(1, 4), (2, 3), (3, 1)]))
    rows = data.draw(st.integers(1, 4))
    lengths = [data.draw(st.integers(0, 500)) for _ in range(rows)]
    counts = [data.draw(st.integers(0, n)) for n in lengths]
    style = data.draw(st.sampled_from(STYLES))
    window = data.draw(st.sampled_from([None, 1, 20, 130]))
    softcap = data.draw(st.sampled_from([None, 5.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    torch.manual_seed(int(rng.integers(2**16)))
    width = -(-max([*lengths, 1]) // page_size)
    total = 2 * -(-(width * rows + 4) // 2)
    pages = make_pages(total, layout, dtype, page_size=page_size, kv_heads=kv_heads, dims=dims)
    table = make_table(rng, lengths, pages, total, style)
    lens = torch.tensor(lengths, dtype=torch.int32)
    cu_q = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    q = torch.randn(sum(counts), kv_heads * group, dims[0]).to(dtype)
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    slopes = torch.rand(kv_heads * group) if data.draw(st.integers(0, 3)) == 0 else None
    options = Options(dims[0] ** -0.5, window, softcap, sinks, slopes)
    bounds: dict[str, Any] = {"max_q": max(counts), "max_len": max(lengths)}
    out = ops.prefill(pages, q, table, cu_q, lens, options, backend="cpu", **bounds)
    k_pages, v_pages = in_fp64(pages)
    exact = paged_prefill(
        q.double(), k_pages, v_pages, table, cu_q, lens, **bounds, **options._asdict()
    )
    assert out.shape == exact.shape
    bound(exact, exact.to(dtype), out)


@pytest.mark.parametrize("layout", ["layer-major", "page-major"])
@pytest.mark.parametrize("style", ["runs", "pairs", "anywhere"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefill_after_a_hit_has_the_bits_of_attention_over_all_tokens_at_once(
    layout, style, dtype, monkeypatch
):
    """New tokens over any pages are what torch makes of them over one tensor, as DynamicCache's
    are: not parts that are rounded one by one. Whatever calls the mask is cut into.
    """
    torch.manual_seed(0)
    length, page_size = 1160, 64
    pages = make_pages(20, layout, dtype, page_size=page_size, kv_heads=2, dims=(64, 64))
    table = make_table(np.random.default_rng(0), [length], pages, 20, style)
    assert pages.v_pages is not None
    k, v = (
        x[table[0].long()].transpose(0, 1).flatten(1, 2)[None, :, :length]
        for x in (pages.k_pages, pages.v_pages)
    )
    lengths = torch.tensor([length], dtype=torch.int32)
    for new in (2, 40, 300):
        q = torch.randn(1, 6, new, 64).to(dtype)
        seen = torch.ones(new, length, dtype=torch.bool).tril(length - new)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, enable_gqa=True
        )
        for elements in (2**22, 64 * length):
            monkeypatch.setattr(prefill, "MASK_ELEMENTS", elements, raising=False)
            out = ops.prefill(
                pages, q[0].transpose(0, 1), table, torch.tensor([0, new], dtype=torch.int32),
                lengths, Options(64**-0.5), backend="cpu", max_q=new, max_len=length,
            )  # fmt: skip
            assert torch.equal(out, expected[0].transpose(0, 1))


@pytest.mark.parametrize("layout", ["layer-major", "page-major"])
@pytest.mark.parametrize("as_runs", [True, False])
def test_append_writes_exactly_the_slots_asked_for(layout, as_runs):
    lengths, counts = [37, 16, 3, 40], [37, 1, 2, 20]
    rng = np.random.default_rng(0)
    pages = make_pages(12, layout, torch.bfloat16, page_size=16, kv_heads=3, dims=(64, 32))
    table = make_table(rng, lengths, pages, 12, "anywhere")
    cu_q = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    slots = [
        int(table[row, p // 16]) * 16 + p % 16
        for row, (n, c) in enumerate(zip(lengths, counts, strict=True))
        for p in range(n - c, n)
    ]
    k, v = torch.randn(60, 3, 64).bfloat16(), torch.randn(60, 3, 32).bfloat16()
    lens = torch.tensor(lengths, dtype=torch.int32)
    spans = ops.plan_spans(pages, table, cu_q, lens, None) if as_runs else None
    before = pages.flat.clone()
    ops.append(pages, k, v, torch.tensor(slots), backend="cpu", spans=spans)
    ours = pages.flat.clone()
    pages.flat.copy_(before)
    reference_append(k, v, pages.k_pages, pages.v_pages, torch.tensor(slots))
    assert torch.equal(ours, pages.flat)
    assert not torch.equal(ours, before)


def plan(table, lengths, **options: Any) -> DecodePlan:
    defaults: dict[str, Any] = {"page_size": 64, "step": 1, "joined": True, "dtype": torch.float32}
    return plan_decode(
        np.array(table, np.int32), np.array(lengths, np.int64), **(defaults | options)
    )


def test_rows_that_are_runs_at_equal_distances_take_one_call_and_no_merge():
    made = plan([[0, 1, 2], [8, 9, 10], [16, 17, 18]], [130, 180, 192])
    assert made.direct
    assert len(made.grids) == 1
    grid = made.grids[0]
    assert (grid.start, grid.step, grid.count, grid.tokens) == (0, 8, 3, 192)
    assert grid.rows is None
    assert grid.bias is not None


def test_scattered_pages_of_many_rows_take_one_call_when_they_lie_together():
    rng = np.random.default_rng(1)
    table = rng.permutation(32).reshape(8, 4)
    made = plan(table, [256] * 8)
    assert [grid.count for grid in made.grids] == [32]
    assert made.grids[0].cells is None
    assert made.grids[0].bias is None


def test_a_large_hole_splits_a_call_and_a_small_one_is_computed():
    made = plan([[0, 2, 3, 30]], [256])
    assert sorted(grid.count for grid in made.grids) == [1, 4]
    small = next(grid for grid in made.grids if grid.count == 4)
    assert small.cells is not None
    assert small.cells.tolist() == [0, 2, 3]


def test_pages_before_a_window_are_in_no_call():
    made = plan([[9, 9, 9, 3]], [250], window=40)
    assert [grid.start for grid in made.grids] == [3]
