from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.decode import decode_launches
from kvpaged_kernels.gpu.decode import paged_decode as decode_gpu
from kvpaged_kernels.gpu.launch import Device
from kvpaged_kernels.gpu.plan import Shape, plan_decode, plan_launch
from kvpaged_kernels.reference.attention import paged_decode as decode_reference
from tests.ops.paging import Case, assert_close, cap_factor, dense, expect, make_case

DECODES = [
    pytest.param(decode_reference, id="reference"),
    pytest.param(decode_gpu, id="gpu"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def queries(case: Case, group: int, count: int, *, seed: int = 1) -> torch.Tensor:
    """`[count, q_heads, k_dim]`, every second token and head of something larger."""
    generator = torch.Generator().manual_seed(seed)
    pages = case.pool.k_pages
    shape = (2 * count, 2 * group * pages.shape[1], pages.shape[3])
    return torch.randn(shape, generator=generator).to(pages.dtype)[::2, 1::2]


def check(
    decode: Any, case: Case, group: int, *, counts: Sequence[int] | None = None, **options: Any
) -> torch.Tensor:
    """Run `decode` for the last `counts[i]` tokens of row i (one if not given), compare with
    fp64.
    """
    each = [1] * len(case.k) if counts is None else list(counts)
    q = queries(case, group, sum(each))
    options.setdefault("scale", q.shape[2] ** -0.5)
    more: dict[str, Any] = {}
    if counts is not None:
        more = {"cu_q": torch.tensor([0, *accumulate(each)], dtype=torch.int32)}
        more["max_q"] = max(*each, 1)
    out: torch.Tensor = decode(q, **case.arguments(), **more, **options)
    assert out.is_contiguous()
    factor = cap_factor(out.dtype, options.get("softcap"))
    assert_close(out, expect(case, list(q.split(each)), **options), factor=factor)
    return out


def lengths_around(page_size: int) -> list[int]:
    """Nothing, one token, both sides of a page's end, odd ones, and enough to be cut."""
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
@pytest.mark.parametrize("lengths", [[0, 1, 40, 5], [0, 1, 140, 531]], ids=["whole", "cut"])
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


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_alibi(decode, window, softcap):
    """Negative, zero and large slopes; the bias comes after the soft cap."""
    lengths = [0, 1, 64, 531]
    case = make_case(
        lengths,
        layout="page-major",
        dtype=FP32,
        needed_from=[0 if window is None else max(0, length - window) for length in lengths],
    )
    slopes = torch.tensor([0.5, 2**-8, 0.0, -(2**-6), 4.0, 1.0])
    check(decode, case, 3, alibi_slopes=slopes, window=window, softcap=softcap)


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize(
    ("layout", "page_size", "group", "dtype"),
    [
        ("page-major", 16, 3, BF16),
        ("layer-major", 64, 4, FP32),
        ("page-major", 128, 8, FP16),  # 8 heads of 16 queries: two tiles of them
        ("layer-major", 32, 1, FP32),
    ],
)
@pytest.mark.parametrize("window", [None, 40])
def test_a_few_queries(decode, layout, page_size, group, dtype, window):
    """Drafts of unequal lengths: each query sees up to itself; rows without any, whole prompts."""
    lengths, counts = [16, 0, 5, 531, 300, 77, 64], [16, 0, 5, 16, 1, 7, 0]
    case = make_case(
        lengths,
        layout=layout,
        page_size=page_size,
        dtype=dtype,
        needed_from=[
            0 if window is None else max(0, n - max(q, 1) - window + 1)
            for n, q in zip(lengths, counts, strict=True)
        ],
    )
    check(decode, case, group, counts=counts, window=window)


@pytest.mark.parametrize("decode", DECODES)
def test_a_few_queries_with_all_options(decode):
    case = make_case(
        [200, 0, 61], layout="page-major", kv_heads=1, page_size=64, k_dim=128, dtype=FP32
    )
    check(
        decode, case, 4, counts=[3, 0, 9], window=50, softcap=20.0,
        sinks=torch.linspace(-2, 2, 4), alibi_slopes=torch.linspace(0, 0.5, 4),
    )  # fmt: skip


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize(
    ("layout", "page_size", "dims", "dtype"),
    [
        ("page-major", 16, (64, 64), BF16),
        ("layer-major", 64, (128, 128), FP16),
        ("page-major", 128, (192, 32), BF16),
        ("layer-major", 32, (80, 96), FP16),
        ("page-major", 64, (8, 16), BF16),
    ],
)
@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 20.0}], ids=["plain", "both"])
def test_pages_of_fp8(decode, layout, page_size, dims, dtype, options):
    """e4m3 pages give what the same numbers in the queries' dtype do; several queries too."""
    lengths, counts = [16, 0, 5, 531, 300, 77], [3, 0, 5, 1, 4, 7]
    case = make_case(
        lengths, layout=layout, page_size=page_size, k_dim=dims[0], v_dim=dims[1],
        dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(sum(counts), 6, dims[0], generator=generator).to(dtype)
    cu_q = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    options = {**options, "scale": dims[0] ** -0.5}
    out = decode(q, **case.arguments(), cu_q=cu_q, max_q=7, **options)
    wide = case._replace(k=[k.to(dtype) for k in case.k], v=[v.to(dtype) for v in case.v])
    assert_close(out, expect(wide, list(q.split(counts)), **options))


def test_every_number_of_e4m3_is_read_as_it_is():
    """All 254 finite ones, subnormal numbers and zeros among them, as V of one token each."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[(numbers & 127) < 127].view(torch.float8_e4m3fn)
    assert len(numbers) == 254
    v = torch.cat((numbers, numbers[:2])).view(1, 1, 16, 16).contiguous()
    k = torch.zeros(1, 1, 16, 64).to(torch.float8_e4m3fn)
    table, zero = torch.zeros(16, 1).int(), torch.zeros(16, 1, 64, dtype=BF16)
    # Row i attends to its last token alone: a window of one.
    lengths = torch.arange(1, 17).int()
    out = decode_gpu(zero, k, v, table, lengths, scale=1.0, window=1)
    assert torch.equal(out.view(-1).float(), v.view(-1).float())


def test_a_plan_serves_every_layer():
    """Made once, used with any pages of its shape; refused with another."""
    cases = [make_case([5, 300, 0, 77], layout="page-major", seed=seed) for seed in (0, 1)]
    plan = plan_decode(Shape(4, 2, 2, 64, 64, 16, 1, None, BF16), cases[0].seq_lens)
    for case in cases:
        q = queries(case, 2, 4)
        planned = decode_gpu(q, **case.arguments(), scale=0.125, plan=plan)
        assert torch.equal(planned, check(decode_gpu, case, 2))
    with pytest.raises(ValueError, match="the plan is for"):
        decode_gpu(queries(cases[0], 3, 4), **cases[0].arguments(), scale=1.0, plan=plan)


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
    most=st.sampled_from([1, 1, 5, 16]),
    seed=st.integers(0, 99),
)
def test_gpu_with_any_shape(
    layout, lengths, dtype, page_size, k_dim, v_dim, group, window, softcap, most, seed
):
    counts = None if most == 1 else [min(length, most - i) for i, length in enumerate(lengths)]
    case = make_case(
        lengths,
        layout=layout,
        kv_heads=1,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
        needed_from=[0 if window is None else max(0, length - window - 15) for length in lengths],
        seed=seed,
    )
    check(decode_gpu, case, group, counts=counts, window=window, softcap=softcap)


@pytest.mark.parametrize("decode", DECODES)
def test_tokens_of_no_row_give_zeros(decode):
    """A padded batch has more queries than `cu_q` gives to rows; a huge window is no window."""
    case = make_case([40, 0], layout="page-major")
    q = queries(case, 2, 20)
    cu_q = torch.tensor([0, 3, 3], dtype=torch.int32)
    options = {"cu_q": cu_q, "max_q": 12, "scale": 0.125}
    out = decode(q, **case.arguments(), **options)
    assert (out[3:] == 0).all()
    assert (out[:3] != 0).any()
    windowed = decode(q, **case.arguments(), window=2**31 - 1, **options)
    assert (windowed - out).abs().max() < 2**-8


def test_no_rows():
    case = make_case([], layout="page-major")
    q = torch.empty(0, 6, 64, dtype=BF16)
    arguments: dict[str, Any] = {**case.arguments()}
    out = decode_gpu(q, **arguments, scale=1.0)
    assert out.shape == (0, 6, 64)


@pytest.mark.parametrize("max_q", [1, 3])
def test_pages_beyond_int32(max_q):
    """Entries whose offset in elements needs 33 bits, in memory that is never touched elsewhere."""
    step, entries = 2**26, 40
    flat = torch.empty(step * entries + 4 * 64 * 16, dtype=BF16)
    pages = flat.as_strided((entries, 2, 16, 64), (step, 16 * 64, 64, 1))
    chosen = [39, 33, 1]
    random = torch.Generator().manual_seed(0)
    k, v = (torch.randn(len(chosen) * 16, 2, 64, generator=random).to(BF16) for _ in range(2))
    k_pages, v_pages = pages, flat[2 * 16 * 64 :].as_strided(pages.shape, pages.stride(), 2 * 1024)
    for place, entry in enumerate(chosen):
        tokens = slice(place * 16, place * 16 + 16)
        k_pages[entry], v_pages[entry] = k[tokens].transpose(0, 1), v[tokens].transpose(0, 1)
    assert chosen[0] * step > 2**31
    q = torch.randn(max_q, 4, 64, generator=random).to(BF16)
    more = {} if max_q == 1 else {"cu_q": torch.tensor([0, max_q]).int(), "max_q": max_q}
    out = decode_gpu(
        q, k_pages, v_pages, torch.tensor([chosen]).int(), torch.tensor([45]).int(), scale=0.125,
        **more,
    )  # fmt: skip
    exact = dense(q.double(), k[:45].double(), v[:45].double(), scale=0.125)
    assert (out - exact).abs().max() < 2**-7


def test_launches_on_a_pool_beyond_int32():
    """A page-major pool of 4 TiB in units of 256 bytes, on a device of 132 multiprocessors."""
    shape, strides = (2**31, 8, 64, 128), (128, 2**32, 128, 1)
    pages = torch.empty_strided(shape, strides, dtype=BF16, device="meta")
    for rows, length in ((256, 2**17), (2, 2**17), (1, 1)):
        facts = Shape(rows, 8, 4, 128, 128, 64, 1, None, BF16)
        lens = torch.empty(rows, dtype=torch.int32, device="meta")
        plan, planning = plan_launch(facts, lens, None, Device("sm_90", 132, 227 * 1024))
        q = torch.empty(rows, 32, 128, dtype=BF16, device="meta")
        table = torch.empty(rows, -(-length // 64), dtype=torch.int32, device="meta")
        attend, merge = decode_launches(
            q, pages, pages, table, lens, torch.empty_like(q), plan=plan, scale=1.0,
            sinks=torch.empty(32, device="meta"),
        )  # fmt: skip
        # The grid is the device's, whatever the batch: what CUDA graphs need.
        assert attend.grid == (132 * plan.config.programs_per_sm,)
        assert merge.grid == (attend.grid[0] - 1, 1)
        assert planning.arguments["KV_HEADS"] == plan.heads == 8
        assert attend.arguments["stride_k_head"] == 2**32
        assert attend.arguments["parts"].shape == (attend.grid[0], 2, 16, 128)
        assert attend.arguments["parts"].dtype == torch.float32


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 64)}, "multiple of kv_heads"),
        ({"q": torch.zeros(2, 6, 80)}, "q has dimension 80"),
        ({"q": torch.zeros(3, 6, 64)}, "got 3 for 2 rows"),
        ({"q": torch.zeros(2, 6, 64).half()}, "one dtype"),
        ({"q": torch.zeros(2, 64, 6).mT}, "last stride 1"),
        ({"q": torch.zeros(6, 64)}, "tokens, q_heads"),
        ({"block_table": torch.zeros(2, 4).long()}, "block_table must be one of torch.int32"),
        ({"block_table": torch.zeros(3, 4).int()}, "block_table has 3 rows"),
        ({"seq_lens": torch.zeros(2).long()}, "seq_lens must be one of"),
        ({"v_pages": torch.zeros(4, 3, 16, 64)}, "agree in kv_heads"),
        ({"v_pages": torch.zeros(4, 2, 16, 64).half()}, "one dtype"),
        ({"k_pages": torch.zeros(4, 2, 16, 264)}, "multiple of 8 up to 256"),
        ({"sinks": torch.zeros(5)}, "sinks must be"),
        ({"window": 0}, "window must be"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"alibi_slopes": torch.zeros(5)}, "alibi_slopes must be"),
        ({"scale": 0.0}, "scale must be positive"),
        (
            {
                "k_pages": torch.zeros(4, 2, 16, 64).to(torch.float8_e4m3fn),
                "v_pages": torch.zeros(4, 2, 16, 64).to(torch.float8_e4m3fn),
            },
            "q over pages of float8_e4m3fn must be one of",
        ),
        ({"max_q": 2}, "max_q must be 1 without cu_q"),
        ({"max_q": 17, "cu_q": torch.tensor([0, 1, 2]).int()}, "max_q must be in 1..16"),
        ({"cu_q": torch.tensor([0, 2]).int()}, "cu_q must have rows"),
        ({"cu_q": torch.tensor([0, 1, 2])}, "cu_q must be one of torch.int32"),
        ({"cu_q": torch.zeros(3, 2).int()[:, 0]}, "cu_q must have last stride 1"),
        ({"seq_lens": torch.zeros(2, 2).int()[:, 0]}, "seq_lens must have last stride 1"),
        ({"softcap": float("inf")}, "softcap must be positive and finite"),
        (
            {
                "q": torch.zeros(2, 6, 64).half(),
                "k_pages": torch.zeros(4, 2, 16, 65).to(torch.float8_e4m3fn)[..., :64],
                "v_pages": torch.zeros(4, 2, 16, 64).to(torch.float8_e4m3fn),
            },
            "strides and offset must be even",
        ),
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
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        decode(**{**arguments, **change})
