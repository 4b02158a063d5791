from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.decode_configs import DecodeConfig
from kvpaged_kernels.gpu.launch import Device
from kvpaged_kernels.gpu.mixed_decode import (
    mixed_decode,
    mixed_decode_launches,
    mixed_plan_launch,
    plan_mixed_decode,
)
from kvpaged_kernels.gpu.plan import DecodePlan
from kvpaged_kernels.reference.mixed import mixed_decode as mixed_reference
from kvpaged_kernels.reference.seal import code
from kvpaged_kernels.sealed import SliceLayout
from tests.ops.sealed_case import FORMATS, SealedCase, assert_near, sealed_case, sealed_layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def queries(case: SealedCase, group: int, seed: int = 1) -> torch.Tensor:
    """`[rows, q_heads, k_dim]`, every second head of something larger."""
    generator = torch.Generator().manual_seed(seed)
    layout = case.layout
    shape = (len(case.seq_lens), 2 * group * layout.kv_heads, layout.k_dim)
    return torch.randn(shape, generator=generator).to(layout.dtype)[:, ::2]


def check(
    case: SealedCase, group: int, *, keep: int, plan: DecodePlan | None = None, **options: Any
) -> torch.Tensor:
    q = queries(case, group)
    options.setdefault("scale", q.shape[2] ** -0.5)
    out = mixed_decode(q, **case.arguments(), keep=keep, plan=plan, **options)
    assert_near(out, mixed_reference(q, **case.arguments(), keep=keep, **options))
    return out


def lengths_around(size: int) -> list[int]:
    """Nothing, one token, ends of pages and of the page behind, and enough to be cut."""
    return [0, 1, size, size + 1, 4 * size + 7, 9 * size - 1]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_formats(name, dtype):
    layout = sealed_layout(name, dtype, kv_heads=2)
    out = check(sealed_case(layout, lengths_around(32), keep=1), 3, keep=1)
    assert (out[0] == 0).all()


@pytest.mark.parametrize(
    ("name", "dtype", "page_size", "k_dim", "v_dim", "k_group", "v_group", "group"),
    [
        ("int4", BF16, 64, 128, 128, 32, 32, 4),
        ("int4", FP16, 64, 64, 64, 32, 64, 20),
        ("int4", FP32, 128, 80, 80, 64, 80, 1),
        ("int4", FP32, 32, 96, 96, 16, 24, 2),
        ("int4", FP32, 16, 64, 256, 16, 32, 5),
        ("int8", FP32, 64, 96, 128, 64, 32, 2),
        ("int8", FP16, 64, 64, 64, 64, 32, 8),
        ("fp8", FP16, 64, 128, 80, 0, 0, 1),
    ],
)
def test_shapes(name, dtype, page_size, k_dim, v_dim, k_group, v_group, group):
    layout = sealed_layout(
        name, dtype, page_size=page_size, k_dim=k_dim, v_dim=v_dim, kv_heads=1, k_group=k_group,
        v_group=v_group,
    )  # fmt: skip
    lengths = [page_size, 300 if page_size < 128 else 3 * page_size + 9]
    check(sealed_case(layout, lengths, keep=0), group, keep=0)


@pytest.mark.parametrize("keep", [0, 2, 100])
def test_pages_that_stay_exact(keep):
    layout = sealed_layout("int4", FP32)
    check(sealed_case(layout, lengths_around(32), keep=keep), 2, keep=keep)


@pytest.mark.parametrize("name", ["int4", "fp8"])
@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("window", [1, 32, 95, 10_000])
def test_window(name, keep, window):
    """Pages wholly before the window have no valid entry."""
    lengths = lengths_around(32)
    layout = sealed_layout(name, FP32)
    case = sealed_case(
        layout, lengths, keep=keep, needed_from=[max(0, n - window) for n in lengths]
    )
    check(case, 2, keep=keep, window=window)


@pytest.mark.parametrize("name", ["int4", "k8v4", "fp8"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_options(name, dtype):
    """Soft cap, sinks (none, a large one) and slopes, in rows that are whole and that are cut."""
    case = sealed_case(sealed_layout(name, dtype), [0, 40, 300], keep=1)
    slopes = torch.tensor([0.5, 2**-8, 0.0, -(2**-6), 2**-4, 1.0])
    check(case, 6, keep=1, softcap=5.0, alibi_slopes=slopes)
    sinks = torch.tensor([0.0, -torch.inf, 4.0, -3.0, 120.0, 1.0], dtype=dtype)
    out = check(case, 6, keep=1, sinks=sinks)
    assert out[:, 4].abs().max() < 1e-10


def test_a_far_mean_is_no_error():
    """Channels a hundred ranges away from 0: zero points take what codes can't."""
    layout = sealed_layout("int4", FP32)
    case = sealed_case(layout, [300], keep=0)
    generator = torch.Generator().manual_seed(5)
    k = torch.randn(len(case.slices), 1, 32, 64, generator=generator)
    k[..., ::7] = k[..., ::7] * 0.1 - 30
    case.slices.copy_(code(k, torch.randn(k.shape, generator=generator), layout))
    check(case, 2, keep=0)


def test_a_plan_serves_all_layers_and_fits_one_layout():
    layout = sealed_layout("int4", FP32)
    case = sealed_case(layout, [1, 300], keep=1)
    plan = plan_mixed_decode(layout, 2, case.seq_lens)
    exact = check(case, 2, keep=1)
    assert torch.equal(check(case, 2, keep=1, plan=plan), exact)
    with pytest.raises(ValueError, match="the plan is for"):
        check(case, 3, keep=1, plan=plan)


@settings(max_examples=8, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    lengths=st.lists(st.integers(0, 250), min_size=1, max_size=3),
    page_size=st.sampled_from([16, 32, 64]),
    k_dim=st.integers(1, 16).map(lambda n: 8 * n),
    quarter=st.integers(1, 8).map(lambda n: 4 * n),
    wide=st.sampled_from([1, 2, 4]),
    group=st.integers(1, 9),
    keep=st.integers(0, 2),
    window=st.none() | st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_any_mixed_decode(
    name, dtype, lengths, page_size, k_dim, quarter, wide, group, keep, window, seed
):
    layout = sealed_layout(
        name, dtype, page_size=page_size, k_dim=k_dim, v_dim=4 * quarter, kv_heads=1, k_group=16,
        v_group=wide * quarter,
    )  # fmt: skip
    first = [0 if window is None else max(0, n - window) for n in lengths]
    case = sealed_case(layout, lengths, keep=keep, needed_from=first, seed=seed)
    check(case, group, keep=keep, window=window)


def meta_launches(layout: SliceLayout, config: DecodeConfig | None = None) -> list[Any]:
    device = Device("sm_90", 132, 227 * 1024)
    lens = torch.empty(5, dtype=torch.int32, device="meta")
    plan, _ = mixed_plan_launch(layout, 16, lens, window=None, device=device, config=config)
    pages = torch.empty_strided(
        (2**31, layout.kv_heads, 64, 128), (128, 2**32, 128, 1), dtype=layout.dtype, device="meta"
    )
    slices = torch.empty_strided(
        (2**31, layout.slice_bytes), (256, 1), dtype=torch.uint8, device="meta"
    )
    q = torch.empty(5, 16, 128, dtype=layout.dtype, device="meta")
    table = torch.empty(5, 2**14, dtype=torch.int32, device="meta")
    return mixed_decode_launches(
        q, pages, pages, slices, layout, table, lens, torch.empty_like(q), plan=plan,
        device=device, keep=1, scale=1.0,
    )  # fmt: skip


def test_mixed_launch_on_a_pool_beyond_int32():
    layout = sealed_layout("k8v4", BF16, page_size=64, k_dim=128, v_dim=128, kv_heads=2)
    attending, merging = meta_launches(layout)
    arguments = attending.arguments
    assert arguments["k_codes"].dtype == torch.int16
    assert arguments["STRIDE_K_CODES"] == arguments["STRIDE_PARAMS"] == 128
    assert arguments["stride_k_head"] == 2**32
    assert merging.grid[0] == attending.grid[0] - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slices": torch.zeros(4, 16, dtype=torch.uint8)}, "slices are uint8"),
        ({"keep": -1}, "counted from 0"),
        ({"q": torch.zeros(2, 4, 64, dtype=BF16)}, "one dtype"),
        ({"layout": sealed_layout("int4", FP32, v_dim=96, v_group=32)}, "exact pages of"),
        ({"window": 0}, "window must be"),
    ],
)
def test_mixed_decode_refuses(change, message):
    layout = sealed_layout("int4", FP32)
    arguments = {
        "q": torch.zeros(2, 4, 64),
        "k_pages": torch.zeros(3, 1, 32, 64),
        "v_pages": torch.zeros(3, 1, 32, 64),
        "slices": torch.zeros(3, layout.slice_bytes, dtype=torch.uint8),
        "layout": layout,
        "block_table": torch.zeros(2, 4).int(),
        "seq_lens": torch.zeros(2).int(),
        "keep": 1,
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        mixed_decode(**{**arguments, **change})
