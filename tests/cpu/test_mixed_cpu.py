"""Sealed pages in stock torch against the oracles: sealing, and attention over what was sealed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.cpu import mixed
from kvpaged_kernels.cpu.sealing import unseal
from kvpaged_kernels.reference import seal as oracle
from tests.cpu.sealed_rows import lay_out, make_rows, part
from tests.cpu.sealed_seals import check_seal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["exact", "fp8", "int8", "int4"]


def run(kind: str, case: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = getattr(mixed, kind)(**case, native=False)
    return found


def draw_rows(draw: Any, *, several: bool) -> Any:
    """A case; the kinds of pages, lengths and options are drawn."""

    def choose(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    torch.manual_seed(draw(st.integers(0, 2**31)))
    size, dims = choose(16, 32, 64), choose((64, 64), (64, 64), (128, 64), (16, 48), (80, 80))
    dtype = choose(*DTYPES)
    k, v = (part(choose(*FORMS), dtype, group) for group in (choose(16, size), choose(16, dims[1])))
    layout = lay_out(k, v, dtype, heads=choose(1, 2, 3), size=size, dims=dims)
    near = (0, 1, size - 1, size, size + 1, 2 * size, 3 * size + 5, 5 * size)
    counts = None
    lengths = [choose(*near) for _ in range(choose(1, 2, 3))]
    if several:
        counts = [choose(0, 1, 5, size, size + 1, 3 * size + 2) for _ in lengths]
        lengths = [new + before for new, before in zip(counts, lengths, strict=True)]
    return make_rows(
        layout, lengths, counts, group=choose(1, 3, 4), keep=choose(0, 1, 2),
        window=choose(None, None, 1, size, 40), softcap=choose(None, None, 5.0),
        sinks=choose(False, True), slopes=choose(False, False, False, True),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decode_equals_the_oracle(data):
    rows = draw_rows(data.draw, several=False)
    rows.judge(run("mixed_decode", rows.given), "mixed_decode")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prefill_equals_the_oracle(data):
    rows = draw_rows(data.draw, several=True)
    rows.judge(run("mixed_prefill", rows.given), "mixed_prefill")


def test_prompts_longer_than_a_block_of_queries():
    torch.manual_seed(0)
    layout = lay_out(part("int8", torch.float32), part("int4", torch.float32), torch.float32)
    for window in (None, 100):
        rows = make_rows(layout, [630, 40], [600, 8], keep=1, window=window)
        rows.judge(run("mixed_prefill", rows.given), "mixed_prefill")


def test_the_judge_finds_what_is_wrong():
    torch.manual_seed(0)
    layout = lay_out(part("int4", torch.bfloat16), part("int4", torch.bfloat16), torch.bfloat16)
    rows = make_rows(layout, [100, 1])
    out = run("mixed_decode", rows.given)
    other = run("mixed_decode", rows.given | {"scale": rows.given["scale"] * 1.05})
    rows.judge(out, "mixed_decode")
    with pytest.raises(AssertionError):
        rows.judge(other, "mixed_decode")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", FORMS)
@pytest.mark.parametrize("v", FORMS)
def test_sealing_is_as_good_as_the_oracle(dtype, k, v):
    check_seal(part(k, dtype), part(v, dtype, 64), dtype, native=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_codes_are_moved_as_the_oracle_does(dtype, dim):
    int4 = part("int4", dtype)
    check_seal(int4, int4, dtype, native=False, dims=(dim, 64), moved=True)


@pytest.mark.parametrize(("k", "v"), [("exact", "int4"), ("fp8", "int8"), ("int4", "fp8")])
def test_unsealing_equals_the_oracle(k, v):
    torch.manual_seed(0)
    layout = lay_out(part(k, torch.bfloat16), part(v, torch.bfloat16), torch.bfloat16)
    pages = [torch.randn(3, 2, 16, 64).bfloat16() for _ in range(2)]
    made = oracle.code(pages[0], pages[1], layout)
    for got, expected in zip(unseal(made, layout), oracle.unseal(made, layout), strict=True):
        assert got.dtype == expected.dtype
        assert torch.allclose(got.float(), expected.float(), rtol=1e-6, atol=1e-6)
