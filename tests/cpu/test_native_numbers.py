"""Numbers that native code must not lose: NaN, scores under large caps, sums of many products."""

import itertools
import shutil
from typing import Any

import numpy as np
import pytest
import torch

from kvpaged_kernels.cpu.native_attend import NativeLayer
from kvpaged_kernels.cpu.native_linear import pack
from kvpaged_kernels.cpu.plan import plan_spans
from kvpaged_kernels.cpu.prefill import paged_prefill as stock_prefill
from kvpaged_kernels.reference.attention import paged_prefill

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")

PAGE, KV_HEADS, GROUP, DIM = 16, 2, 3, 32
# Of those, the last has lowest bits that an exponent could be made of.
NANS = torch.tensor([0x7FC00000, -0x400000, 0x7FC00001], dtype=torch.int32).view(torch.float32)


def nan_of(bits, dtype):
    return NANS[bits] if dtype == torch.float32 else NANS[bits].to(dtype)


def attend(dtype, counts, lengths, *, shared=0, softcap=None, window=None, scale=1.0, spoil=None):
    """What native code gives, the oracle in fp64, and stock torch, for rows of pages in order.

    `shared`: pages that all rows begin with. `spoil`: changes keys, `[entries, heads, slots,
    width]`, before.
    """
    width = -(-max(lengths) // PAGE)
    table = torch.arange(len(counts) * width, dtype=torch.int32).view(len(counts), width)
    table[1:, :shared] = table[0, :shared]
    k_pages, v_pages = (torch.randn(table.numel(), KV_HEADS, PAGE, DIM).to(dtype) for _ in range(2))
    if spoil is not None:
        spoil(k_pages)
    q = torch.randn(sum(counts), KV_HEADS * GROUP, DIM).to(dtype)
    lens = torch.tensor(lengths, dtype=torch.int32)
    cu_q = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    places = [
        (row, n - c + i)
        for row, (c, n) in enumerate(zip(counts, lengths, strict=True))
        for i in range(c)
    ]
    k, v = (  # as they are in the pages: writing them changes nothing
        torch.stack([x[table[row, p // PAGE], :, p % PAGE] for row, p in places])
        for x in (k_pages, v_pages)
    )
    layer = NativeLayer(
        k_pages, v_pages, KV_HEADS * GROUP, scale=scale, window=window, softcap=softcap
    )
    got = layer(layer.plan(q, k, v, table, lens, cu_q), q, k, v)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    exact = paged_prefill(
        q.double(), k_pages.double(), v_pages.double(), table, cu_q, lens, **options,
        max_q=max(counts), max_len=max(lengths),
    )  # fmt: skip
    plan = plan_spans(
        table.numpy(), np.array(lengths), cu_q.numpy().astype(np.int64), joined=False,
        page_size=PAGE, step=1, window=window,
    )  # fmt: skip
    return got, exact, stock_prefill(q, k_pages, v_pages, plan, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(len(NANS)))
@pytest.mark.parametrize(
    ("counts", "lengths", "shared"),
    [
        ([1], [300], 0),
        ([5], [305], 0),  # whole blocks of 64, seen by all
        ([100], [100], 0),  # a block that some see
        ([100], [200], 0),
        ([1, 1, 2], [300, 290, 301], 16),  # a trunk
    ],
)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_key_of_nan_is_seen_by_whoever_sees_it(dtype, bits, counts, lengths, shared, softcap):
    torch.manual_seed(0)
    for position in (3, 63, 64, 98):

        def spoil(keys, at=position):
            keys[at // PAGE, :, at % PAGE, 7] = nan_of(bits, dtype)

        got, exact, _ = attend(dtype, counts, lengths, shared=shared, softcap=softcap, spoil=spoil)
        assert exact.isnan().any()
        assert torch.equal(got.isnan(), exact.isnan())


@pytest.mark.parametrize(("counts", "lengths"), [([1], [300]), ([70], [300])])
def test_a_key_of_nan_outside_a_window_is_not_seen(counts, lengths):
    torch.manual_seed(0)

    def spoil(keys):
        keys[:5] = NANS[2]
        keys[5, :, :8] = NANS[0]

    got, exact, _ = attend(torch.float32, counts, lengths, window=100, spoil=spoil)
    assert torch.equal(got.isnan(), exact.isnan())
    assert not got[-40:].isnan().any()


@pytest.mark.parametrize(("counts", "lengths"), [([1], [300]), ([5], [305]), ([100], [200])])
def test_keys_of_infinite_scores_have_no_weight(counts, lengths):
    torch.manual_seed(0)

    def spoil(keys):  # whole blocks of scores of -inf, of q > 0 alone
        keys[:8] = 0
        keys[:8, :, :, 0] = -torch.inf

    got, exact, _ = attend(torch.float32, counts, lengths, spoil=spoil)
    assert torch.equal(got.isnan(), exact.isnan())
    assert not got.isnan().all()
    seen = ~got.isnan()
    assert torch.allclose(got[seen].double(), exact[seen], atol=1e-5)


@pytest.mark.parametrize("counts", [[1], [40], [1, 1, 3]])
@pytest.mark.parametrize("cap", [5.0, 30.0, 50.0, 1000.0, 1e5])
def test_scores_under_a_cap_are_as_exact_as_torchs(cap, counts):
    torch.manual_seed(0)
    for scale in (0.2, 2.0, cap / 30):  # scores up to the cap's sixth to 30 times the cap
        got, exact, other = attend(
            torch.float32, counts, [301] * len(counts), softcap=cap, scale=scale
        )
        errors = [float((x - exact).abs().max() / exact.abs().max()) for x in (got, other)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps, (scale, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [256, 258, 576, 1536, 9000])
def test_sums_of_many_products_are_as_exact_as_torchs(inner, dtype):
    for seed, (columns, rows) in enumerate([(200, 1), (64, 7), (33, 2), (16, 64)] * 2):
        torch.manual_seed(seed)
        weight, x = torch.randn(columns, inner).to(dtype), torch.randn(rows, inner).to(dtype)
        exact = x.double() @ weight.double().T
        ways = pack(weight, None)(x), torch.nn.functional.linear(x, weight)
        errors = [float((y.double() - exact).abs().max() / exact.abs().max()) for y in ways]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps, (columns, rows, errors)
