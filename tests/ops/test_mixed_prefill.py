from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.launch import Device
from kvpaged_kernels.gpu.mixed_decode import mixed_decode
from kvpaged_kernels.gpu.mixed_prefill import mixed_prefill, mixed_prefill_launch
from kvpaged_kernels.reference.mixed import mixed_prefill as prefill_reference
from kvpaged_kernels.sealed import SliceLayout
from tests.ops.sealed_case import FORMATS, assert_near, sealed_case, sealed_layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def cumulated(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)


def make_arguments(
    layout: SliceLayout, lengths: Sequence[int], counts: Sequence[int], group: int, *, keep: int,
    window: int | None = None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments for the last `counts[i]` tokens of row i; pages that nobody may read have no entry,
    and slots of own pages behind the last token hold NaN.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    size = layout.page_size
    starts = [n - new for n, new in zip(lengths, counts, strict=True)]
    first = [0 if window is None else max(0, start - window + 1) for start in starts]
    case = sealed_case(layout, lengths, keep=keep, needed_from=first, own=False, seed=seed)
    own = [
        0 if not new else (n - 1) // size - start // size + 1
        for n, new, start in zip(lengths, counts, starts, strict=True)
    ]
    own_k, own_v = (
        torch.randn(sum(own), 2 * layout.kv_heads, size, dim, generator=generator)
        .to(layout.dtype)[:, 1::2]
        for dim in (layout.k_dim, layout.v_dim)
    )  # fmt: skip
    for length, pages, last in zip(lengths, own, accumulate(own), strict=True):
        if pages and length % size:
            own_k[last - 1, :, length % size :] = torch.nan
            own_v[last - 1, :, length % size :] = torch.nan
    q = torch.randn(sum(counts), group * layout.kv_heads, layout.k_dim, generator=generator)
    return {
        "q": q.to(layout.dtype),
        **case.arguments(),
        "own_k": own_k,
        "own_v": own_v,
        "cu_own": cumulated(own),
        "cu_q": cumulated(counts),
        "keep": keep,
        "max_q": max(counts),
        "max_len": max(lengths),
        "scale": layout.k_dim**-0.5,
        "window": window,
    }


def check(arguments: dict[str, Any], **options: Any) -> torch.Tensor:
    out = mixed_prefill(**arguments, **options)
    assert_near(out, prefill_reference(**arguments, **options))
    return out


# A whole prompt, nothing, a chunk in the middle of a page, single tokens, no new ones.
LENGTHS, COUNTS = [75, 0, 90, 64, 33, 40], [75, 0, 25, 1, 1, 0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_prefill_formats(name, dtype):
    layout = sealed_layout(name, dtype, kv_heads=2)
    check(make_arguments(layout, LENGTHS, COUNTS, 3, keep=1))


@pytest.mark.parametrize(
    ("name", "dtype", "page_size", "k_dim", "v_dim", "k_group", "v_group", "group"),
    [
        ("int4", BF16, 64, 128, 128, 32, 32, 4),
        ("int4", FP16, 64, 64, 64, 32, 64, 1),
        ("int4", FP32, 32, 96, 96, 16, 24, 5),
        ("k8v4", FP32, 16, 80, 80, 16, 80, 5),
        ("int8", FP32, 128, 64, 64, 64, 32, 2),
        ("fp8", FP16, 64, 128, 80, 0, 0, 2),
    ],
)
def test_prefill_shapes(name, dtype, page_size, k_dim, v_dim, k_group, v_group, group):
    layout = sealed_layout(
        name, dtype, page_size=page_size, k_dim=k_dim, v_dim=v_dim, k_group=k_group,
        v_group=v_group,
    )  # fmt: skip
    check(make_arguments(layout, [2 * page_size + 9, 70], [page_size // 2, 3], group, keep=0))


@pytest.mark.parametrize("keep", [0, 2, 100])
@pytest.mark.parametrize("window", [None, 1, 32, 70])
def test_prefill_window_and_exact_pages(keep, window):
    """Pages wholly before the first query's window have no valid entry."""
    layout = sealed_layout("int4", FP32)
    check(make_arguments(layout, LENGTHS, COUNTS, 2, keep=keep, window=window))


@pytest.mark.parametrize("name", ["int4", "fp8"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_prefill_options(name, dtype):
    arguments = make_arguments(sealed_layout(name, dtype), [40, 110], [40, 10], 6, keep=1)
    slopes = torch.tensor([0.5, 2**-8, 0.0, -(2**-6), 2**-4, 1.0])
    check(arguments, softcap=5.0, alibi_slopes=slopes)
    sinks = torch.tensor([0.0, -torch.inf, 4.0, -3.0, 120.0, 1.0], dtype=dtype)
    out = check(arguments, sinks=sinks)
    assert out[:, 4].abs().max() < 1e-10


def test_prefill_of_one_token_is_a_decode():
    layout = sealed_layout("int4", FP32)
    case = sealed_case(layout, [75, 33, 160], keep=1)
    q = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(4))
    options: dict[str, Any] = {"keep": 1, "scale": 0.125}
    decoded = mixed_decode(q, **case.arguments(), **options)
    own = case.block_table[torch.arange(3), (case.seq_lens.long() - 1) // 32].long()
    filled = mixed_prefill(
        q, **case.arguments(), own_k=case.k_pages[own], own_v=case.v_pages[own],
        cu_own=cumulated([1, 1, 1]), cu_q=cumulated([1, 1, 1]), max_q=1, max_len=160, **options,
    )  # fmt: skip
    assert (filled - decoded).abs().max() < 1e-6


def test_tokens_and_own_pages_of_nobody():
    """A padded batch has more of both than its rows say."""
    layout = sealed_layout("int4", FP32)
    arguments = make_arguments(layout, [75], [20], 2, keep=1)
    exact = check(arguments)
    for name in ("q", "own_k", "own_v"):
        more = torch.full_like(arguments[name][:1], torch.nan)
        arguments[name] = torch.cat([arguments[name], more])
    out = mixed_prefill(**arguments)
    assert torch.equal(out[:-1], exact)
    assert (out[-1] == 0).all()


@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 120)), min_size=1, max_size=3),
    page_size=st.sampled_from([16, 32, 64]),
    k_dim=st.integers(1, 16).map(lambda n: 8 * n),
    quarter=st.integers(1, 8).map(lambda n: 4 * n),
    group=st.integers(1, 9),
    keep=st.integers(0, 2),
    window=st.none() | st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_any_mixed_prefill(name, dtype, rows, page_size, k_dim, quarter, group, keep, window, seed):
    layout = sealed_layout(
        name, dtype, page_size=page_size, k_dim=k_dim, v_dim=4 * quarter, k_group=16,
        v_group=2 * quarter,
    )  # fmt: skip
    counts, lengths = [new for new, _ in rows], [new + before for new, before in rows]
    check(make_arguments(layout, lengths, counts, group, keep=keep, window=window, seed=seed))


def test_prefill_launch_covers_own_pages_of_any_pool():
    layout = sealed_layout("int4", BF16, page_size=64, k_dim=128, v_dim=128, kv_heads=2)
    meta: dict[str, Any] = {"device": "meta"}
    pages = torch.empty_strided((2**31, 2, 64, 128), (128, 2**32, 128, 1), dtype=BF16, **meta)
    slices = torch.empty_strided((2**31, layout.slice_bytes), (256, 1), dtype=torch.uint8, **meta)
    q = torch.empty(2**16, 24, 128, dtype=BF16, **meta)
    row = torch.empty(6, dtype=torch.int32, **meta)
    launch = mixed_prefill_launch(
        q, pages, pages, slices, layout, pages[:1000], pages[:1000], row,
        torch.empty(5, 2**14, dtype=torch.int32, **meta), row, row[:5], torch.empty_like(q),
        keep=1, scale=1.0, window=None, softcap=None, sinks=None, alibi_slopes=None,
        device=Device("sm_90", 132, 227 * 1024),
    )  # fmt: skip
    assert launch.grid == (1000 * (64 * 12 // launch.arguments["BLOCK_M"]), 2)
    assert launch.arguments["stride_ok_head"] == 2**32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own_k": torch.zeros(2, 1, 32, 80)}, "own pages are"),
        ({"cu_own": torch.zeros(2)}, "cu_own is int32"),
        ({"keep": -1}, "counted from 0"),
        ({"max_q": 300}, "max_q must be"),
    ],
)
def test_mixed_prefill_refuses(change, message):
    arguments = make_arguments(sealed_layout("int4", FP32), [75], [20], 2, keep=1)
    with pytest.raises(ValueError, match=message):
        mixed_prefill(**{**arguments, **change})
