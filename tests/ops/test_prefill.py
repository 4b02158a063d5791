from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.decode import paged_decode
from kvpaged_kernels.gpu.launch import Device
from kvpaged_kernels.gpu.prefill import paged_prefill as prefill_gpu
from kvpaged_kernels.gpu.prefill import prefill_launch
from kvpaged_kernels.reference.attention import paged_prefill as prefill_reference
from tests.ops.paging import Case, assert_close, cap_factor, expect, make_case

PREFILLS = [
    pytest.param(prefill_reference, id="reference"),
    pytest.param(prefill_gpu, id="gpu"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(
    prefill: Any, case: Case, counts: Sequence[int], group: int, *, slack: int = 0, **options: Any
) -> torch.Tensor:
    """Run `prefill` for the last `counts[i]` tokens of row i, compare with fp64."""
    generator = torch.Generator().manual_seed(2)
    pages = case.pool.k_pages
    shape = (2 * sum(counts), 2 * group * pages.shape[1], pages.shape[3])
    q = torch.randn(shape, generator=generator).to(pages.dtype)[::2, 1::2]
    cu_q = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    options.setdefault("scale", q.shape[2] ** -0.5)
    out: torch.Tensor = prefill(
        q,
        **case.arguments(),
        cu_q=cu_q,
        max_q=max(counts) + slack,
        max_len=int(case.seq_lens.max()) + slack,
        **options,
    )
    assert out.is_contiguous()
    factor = cap_factor(out.dtype, options.get("softcap"))
    assert_close(out, expect(case, list(q.split(list(counts))), **options), factor=factor)
    return out


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize(
    ("layout", "dtype", "k_dim", "v_dim", "page_size", "kv_heads", "group"),
    [
        ("page-major", BF16, 64, 64, 16, 3, 3),
        ("layer-major", BF16, 64, 64, 64, 3, 3),
        ("layer-major", FP16, 80, 80, 16, 2, 1),
        ("page-major", FP32, 96, 96, 32, 2, 4),
        ("page-major", BF16, 128, 128, 128, 2, 8),
        ("layer-major", BF16, 256, 256, 256, 1, 16),
        ("layer-major", FP32, 256, 256, 16, 1, 5),
        ("page-major", BF16, 192, 128, 64, 1, 2),
        ("page-major", FP16, 64, 64, 64, 1, 71),
        ("layer-major", FP32, 64, 128, 64, 2, 3),
    ],
)
def test_plain(prefill, layout, dtype, k_dim, v_dim, page_size, kv_heads, group):
    """Whole prompts, chunks after a history, single tokens, empty rows and rows without queries."""
    new = min(page_size, 64)
    case = make_case(
        [new + 5, 0, 1, page_size, 2 * page_size + 7, 40, 200],
        layout=layout,
        kv_heads=kv_heads,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
    )
    check(prefill, case, [new + 5, 0, 1, new, 9, 0, 1], group)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize(("layout", "page_size"), [("page-major", 16), ("layer-major", 64)])
@pytest.mark.parametrize("window", [1, 17, 64, 10_000])
def test_window(prefill, layout, page_size, window):
    """Pages wholly before the first query's window have no memory and no valid entry."""
    lengths, counts = [1, 100, 300, 299, 130], [1, 100, 70, 1, 0]
    case = make_case(
        lengths,
        layout=layout,
        page_size=page_size,
        needed_from=[
            max(0, length - count - window + 1)
            for length, count in zip(lengths, counts, strict=True)
        ],
    )
    check(prefill, case, counts, 3, window=window)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(prefill, dtype, softcap):
    case = make_case([1, 130], layout="page-major", dtype=dtype)
    check(prefill, case, [1, 50], 4, softcap=softcap, scale=1.5)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(prefill, window):
    case = make_case([1, 140, 33], layout="layer-major", page_size=32)
    sinks = torch.tensor([0.0, -torch.inf, 4.0, -3.0, 60.0, 1.0], dtype=BF16)
    out = check(prefill, case, [1, 60, 33], 3, sinks=sinks, window=window)
    assert out[:, 4].abs().max() < 1e-10


@pytest.mark.parametrize("prefill", PREFILLS)
def test_alibi(prefill):
    case = make_case([1, 140, 33], layout="layer-major", page_size=32, dtype=FP32)
    check(prefill, case, [1, 60, 33], 2, alibi_slopes=torch.tensor([0.5, 2**-8, 0.0, -0.125]))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_all_options_together(prefill):
    case = make_case(
        [200, 61],
        layout="page-major",
        kv_heads=1,
        page_size=64,
        k_dim=256,
        dtype=FP32,
        needed_from=[64, 0],
    )
    sinks = torch.linspace(-2, 2, 4)
    check(prefill, case, [40, 61], 4, window=90, softcap=50.0, sinks=sinks)


def test_the_bounds_do_not_matter():
    case = make_case([70, 20], layout="page-major")
    exact = check(prefill_gpu, case, [70, 3], 2)
    assert torch.equal(check(prefill_gpu, case, [70, 3], 2, slack=200), exact)


def test_chunks_equal_the_whole_prompt():
    case = make_case([150], layout="page-major", dtype=FP32)
    q = torch.randn(150, 6, 64, generator=torch.Generator().manual_seed(3))
    shared: dict[str, Any] = {**case.arguments()}
    arguments = {name: shared[name] for name in ("k_pages", "v_pages", "block_table")}

    def run(start: int, stop: int) -> torch.Tensor:
        return prefill_gpu(
            q[start:stop],
            **arguments,
            cu_q=torch.tensor([0, stop - start], dtype=torch.int32),
            seq_lens=torch.tensor([stop], dtype=torch.int32),
            max_q=stop - start,
            max_len=stop,
            scale=0.125,
        )

    whole = run(0, 150)
    chunked = torch.cat([run(0, 64), run(64, 65), run(65, 150)])
    assert (whole - chunked).abs().max() < 1e-6
    last = paged_decode(q[149:], **shared, scale=0.125)
    assert (whole[149] - last[0]).abs().max() < 1e-6


@settings(max_examples=12, deadline=None)
@given(
    layout=st.sampled_from(["page-major", "layer-major"]),
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 150)), min_size=1, max_size=3),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    page_size=st.sampled_from([16, 32, 64, 128, 256]),
    k_dim=st.integers(1, 32).map(lambda n: 8 * n),
    v_dim=st.integers(1, 32).map(lambda n: 8 * n),
    group=st.integers(1, 9),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.just(20.0),
    seed=st.integers(0, 99),
)
def test_gpu_with_any_shape(
    layout, rows, dtype, page_size, k_dim, v_dim, group, window, softcap, seed
):
    counts = [new for new, _ in rows]
    lengths = [new + history for new, history in rows]
    case = make_case(
        lengths,
        layout=layout,
        kv_heads=1,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
        needed_from=[
            0 if window is None or new == 0 else max(0, history - window + 1)
            for new, history in rows
        ],
        seed=seed,
    )
    check(prefill_gpu, case, counts, group, window=window, softcap=softcap)


@pytest.mark.parametrize("shared_memory", [64, 99, 163, 227])
def test_launch_on_a_pool_beyond_int32(shared_memory):
    shape, strides = (2**31, 8, 64, 128), (128, 2**32, 128, 1)
    pages = torch.empty_strided(shape, strides, dtype=BF16, device="meta")
    q = torch.empty(2**20, 32, 128, dtype=BF16, device="meta")
    launch = prefill_launch(
        q,
        pages,
        pages,
        torch.empty(5, 2**14, dtype=torch.int32, device="meta"),
        torch.empty(6, dtype=torch.int32, device="meta"),
        torch.empty(5, dtype=torch.int32, device="meta"),
        torch.empty_like(q),
        max_q=2**20 - 3,
        scale=1.0,
        window=None,
        softcap=None,
        sinks=None,
        alibi_slopes=None,
        device=Device("sm_90", 132, shared_memory * 1024),
    )
    blocks = launch.arguments["blocks"]
    assert launch.grid == (5 * blocks, 8)
    assert (blocks - 1) * launch.arguments["BLOCK_M"] < 4 * (2**20 - 3)
    assert blocks * launch.arguments["BLOCK_M"] >= 4 * (2**20 - 3)
    assert launch.arguments["stride_v_head"] == 2**32


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 5, 64)}, "multiple of kv_heads"),
        ({"q": torch.zeros(3, 64)}, "tokens, q_heads"),
        ({"cu_q": torch.zeros(3).long()}, "cu_q must be one of"),
        ({"cu_q": torch.zeros(4).int()}, "cu_q must have rows"),
        ({"max_q": 65}, "max_q must be"),
        ({"window": -3}, "window must be"),
        ({"sinks": torch.zeros(6).int()}, "sinks must be one of"),
        ({"k_pages": torch.zeros(4, 2, 8, 64)}, "power of two"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(prefill, change, message):
    arguments = {
        "q": torch.zeros(3, 6, 64),
        "k_pages": torch.zeros(4, 2, 16, 64),
        "v_pages": torch.zeros(4, 2, 16, 64),
        "block_table": torch.zeros(2, 4).int(),
        "cu_q": torch.zeros(3).int(),
        "seq_lens": torch.zeros(2).int(),
        "max_q": 3,
        "max_len": 64,
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        prefill(**{**arguments, **change})
