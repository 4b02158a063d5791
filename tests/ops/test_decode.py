from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.configs import MAX_SPLITS, min_split_tokens, split_count
from kvpaged_kernels.gpu.decode import decode_launches
from kvpaged_kernels.gpu.decode import paged_decode as decode_gpu
from kvpaged_kernels.gpu.launch import Device
from kvpaged_kernels.reference.attention import paged_decode as decode_reference
from tests.ops.paging import Case, assert_close, cap_factor, expect, make_case

DECODES = [
    pytest.param(decode_reference, id="reference"),
    pytest.param(decode_gpu, id="gpu"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def queries(case: Case, group: int, *, seed: int = 1) -> torch.Tensor:
    """`[rows, q_heads, k_dim]`, every second row and head of something larger."""
    generator = torch.Generator().manual_seed(seed)
    pages = case.pool.k_pages
    shape = (2 * len(case.k), 2 * group * pages.shape[1], pages.shape[3])
    return torch.randn(shape, generator=generator).to(pages.dtype)[::2, 1::2]


def check(decode: Any, case: Case, group: int, *, slack: int = 0, **options: Any) -> torch.Tensor:
    """Run `decode`, compare with fp64, return the output."""
    q = queries(case, group)
    options.setdefault("scale", q.shape[2] ** -0.5)
    max_len = max(int(case.seq_lens.max()), 1) + slack
    out: torch.Tensor = decode(q, **case.arguments(), max_len=max_len, **options)
    assert out.is_contiguous()
    factor = cap_factor(out.dtype, options.get("softcap"))
    assert_close(out, expect(case, list(q.split(1)), **options), factor=factor)
    return out


def lengths_around(page_size: int) -> list[int]:
    """Nothing, one token, both sides of a page's end, odd ones, and enough for several splits."""
    return [0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 7, 531]


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize(
    ("layout", "dtype", "k_dim", "v_dim", "page_size", "kv_heads", "group"),
    [
        ("page-major", BF16, 64, 64, 16, 3, 3),
        ("layer-major", BF16, 64, 64, 64, 3, 3),
        ("layer-major", FP16, 80, 80, 16, 2, 1),
        ("page-major", FP32, 96, 96, 32, 2, 4),
        ("page-major", BF16, 128, 128, 128, 2, 8),
        ("layer-major", BF16, 256, 256, 256, 1, 16),
        ("layer-major", FP32, 256, 256, 16, 1, 20),
        ("page-major", BF16, 192, 128, 64, 1, 2),
        ("page-major", FP16, 64, 64, 256, 1, 71),
        ("layer-major", FP32, 64, 128, 64, 2, 3),
    ],
)
def test_plain(decode, layout, dtype, k_dim, v_dim, page_size, kv_heads, group):
    case = make_case(
        lengths_around(page_size),
        layout=layout,
        kv_heads=kv_heads,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
    )
    out = check(decode, case, group)
    assert (out[0] == 0).all()


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize(
    ("layout", "page_size"), [("page-major", 16), ("layer-major", 64), ("page-major", 128)]
)
@pytest.mark.parametrize("window", [1, 16, 63, 200, 10_000])
def test_window(decode, layout, page_size, window):
    """Pages wholly before the window have no memory and no valid entry."""
    lengths = [*lengths_around(page_size), 600]
    case = make_case(
        lengths,
        layout=layout,
        page_size=page_size,
        needed_from=[max(0, length - window) for length in lengths],
    )
    check(decode, case, 3, window=window)


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(decode, dtype, softcap):
    case = make_case([0, 1, 130, 531], layout="page-major", dtype=dtype)
    # A scale that drives many scores into the cap.
    check(decode, case, 4, softcap=softcap, scale=1.5)


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("lengths", [[0, 1, 40, 5], [0, 1, 140, 531]], ids=["one split", "splits"])
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(decode, lengths, window):
    """They take part once, however many splits there are; -inf is none, a large one takes all."""
    case = make_case(lengths, layout="layer-major", page_size=32)
    sinks = torch.tensor([0.0, -torch.inf, 4.0, -3.0, 60.0, 1.0], dtype=BF16)
    out = check(decode, case, 3, sinks=sinks, window=window)
    assert (out[0] == 0).all()
    assert out[:, 4].abs().max() < 1e-10


@pytest.mark.parametrize("decode", DECODES)
def test_all_options_together(decode):
    lengths = [1, 129, 700]
    case = make_case(
        lengths,
        layout="page-major",
        kv_heads=1,
        page_size=64,
        k_dim=256,
        dtype=FP32,
        needed_from=[0, 0, 200],
    )
    sinks = torch.linspace(-2, 2, 4)
    check(decode, case, 4, window=500, softcap=50.0, sinks=sinks)


@pytest.mark.parametrize("decode", DECODES)
def test_scores_far_from_zero(decode):
    """Scores in the hundreds neither overflow nor lose the small weights' ratio."""
    case = make_case([3, 300], layout="page-major", dtype=FP32)
    check(decode, case, 2, scale=40.0)


def test_the_bound_of_lengths_does_not_matter():
    case = make_case([5, 300], layout="page-major")
    exact = check(decode_gpu, case, 2)
    for slack in (1, 1000, 100_000):
        out = check(decode_gpu, case, 2, slack=slack)
        assert (out - exact).abs().max() <= 2**-8


@settings(max_examples=12, deadline=None)
@given(
    layout=st.sampled_from(["page-major", "layer-major"]),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    page_size=st.sampled_from([16, 32, 64, 128, 256]),
    k_dim=st.integers(1, 32).map(lambda n: 8 * n),
    v_dim=st.integers(1, 32).map(lambda n: 8 * n),
    group=st.integers(1, 20),
    window=st.none() | st.integers(1, 300),
    softcap=st.none() | st.just(20.0),
    seed=st.integers(0, 99),
)
def test_gpu_with_any_shape(
    layout, lengths, dtype, page_size, k_dim, v_dim, group, window, softcap, seed
):
    case = make_case(
        lengths,
        layout=layout,
        kv_heads=1,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
        needed_from=[0 if window is None else max(0, length - window) for length in lengths],
        seed=seed,
    )
    check(decode_gpu, case, group, window=window, softcap=softcap)


def test_no_rows():
    case = make_case([], layout="page-major")
    q = torch.empty(0, 6, 64, dtype=BF16)
    arguments: dict[str, Any] = {**case.arguments()}
    out = decode_gpu(q, **arguments, max_len=100, scale=1.0)
    assert out.shape == (0, 6, 64)


def launches_on_meta(rows: int, max_len: int, device: Device) -> list[Any]:
    """Launches over a page-major pool of 4 TiB in units of 256 bytes."""
    shape, strides = (2**31, 8, 64, 128), (128, 2**32, 128, 1)
    pages = torch.empty_strided(shape, strides, dtype=BF16, device="meta")
    q = torch.empty(rows, 32, 128, dtype=BF16, device="meta")
    return decode_launches(
        q,
        pages,
        pages,
        torch.empty(rows, -(-max_len // 64), dtype=torch.int32, device="meta"),
        torch.empty(rows, dtype=torch.int32, device="meta"),
        torch.empty_like(q),
        max_len=max_len,
        scale=1.0,
        window=None,
        softcap=None,
        sinks=torch.empty(32, device="meta"),
        device=device,
    )


def test_launches_on_a_pool_beyond_int32():
    (attend,) = launches_on_meta(256, 2**17, Device(132, 227 * 1024))
    assert attend.grid == (256, 8, 1)
    assert attend.arguments["stride_k_head"] == 2**32
    assert attend.arguments["sinks"] is not None
    attend, merge = launches_on_meta(2, 2**17, Device(132, 227 * 1024))
    assert attend.grid == (2, 8, 17)
    assert attend.arguments["sinks"] is None
    assert attend.arguments["out"].shape == (2, 32, 17, 128)
    assert attend.arguments["out"].dtype == torch.float32
    assert merge.grid == (2, 32)
    assert merge.arguments["sinks"] is not None


def test_split_count():
    assert split_count(2**20, 64, 1, 132, None) == MAX_SPLITS
    assert split_count(2**17, 64, 264, 132, None) == 1
    assert split_count(2**17, 64, 100, 132, None) == 3
    for page_size in (16, 64, 256):
        least = min_split_tokens(page_size)
        assert least >= 2 * page_size
        assert split_count(2 * least - 1, page_size, 1, 132, None) == 1
        assert split_count(2 * least, page_size, 1, 132, None) == 2
        assert split_count(2**20, page_size, 1, 132, 1) == 1
    assert split_count(0, 16, 0, 132, None) == 1


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 64)}, "multiple of kv_heads"),
        ({"q": torch.zeros(2, 6, 80)}, "q has dimension 80"),
        ({"q": torch.zeros(3, 6, 64)}, "q has 3 rows"),
        ({"q": torch.zeros(2, 6, 64).half()}, "one dtype"),
        ({"q": torch.zeros(2, 64, 6).mT}, "last stride 1"),
        ({"q": torch.zeros(6, 64)}, "rows, q_heads"),
        ({"block_table": torch.zeros(2, 4).long()}, "block_table must be one of torch.int32"),
        ({"block_table": torch.zeros(3, 4).int()}, "block_table has 3 rows"),
        ({"seq_lens": torch.zeros(2).long()}, "seq_lens must be one of"),
        ({"v_pages": torch.zeros(4, 3, 16, 64)}, "agree in kv_heads"),
        ({"v_pages": torch.zeros(4, 2, 16, 64).half()}, "one dtype"),
        ({"k_pages": torch.zeros(4, 2, 16, 264)}, "multiple of 8 up to 256"),
        ({"sinks": torch.zeros(5)}, "sinks must be"),
        ({"window": 0}, "window must be"),
        ({"softcap": 0.0}, "softcap must be"),
        ({"max_len": -1}, "max_len must"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int32, device="meta")}, "is on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(decode, change, message):
    arguments = {
        "q": torch.zeros(2, 6, 64),
        "k_pages": torch.zeros(4, 2, 16, 64),
        "v_pages": torch.zeros(4, 2, 16, 64),
        "block_table": torch.zeros(2, 4).int(),
        "seq_lens": torch.zeros(2).int(),
        "max_len": 64,
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        decode(**{**arguments, **change})
