"""Native code over sealed pages against the oracles."""

import logging
import platform
import shutil
from typing import Any

import pytest
import torch

from kvpaged_kernels.cpu import mixed, native, native_sealed
from kvpaged_kernels.cpu.native import NativeError
from kvpaged_kernels.sealed import Part
from tests.cpu.sealed_rows import lay_out, make_rows, part
from tests.cpu.sealed_seals import check_seal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["exact", "fp8", "int8", "int4"]
OPTIONS = [
    # keep, window, softcap, sinks
    (0, None, None, False),
    (1, None, 5.0, True),
    (2, 1, None, False),
    (0, 70, None, True),
    (1, 150, 5.0, False),
]

# Where there is a compiler, code that it refuses is a failure.
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")

LAYOUTS = [
    # dtype, K and its group, V and its group, slots, widths, query heads a KV head
    (torch.bfloat16, ("int4", 32), ("int4", 32), 64, (64, 64), 3),
    (torch.bfloat16, ("int8", 32), ("int4", 16), 64, (64, 64), 1),
    (torch.bfloat16, ("int4", 16), ("int8", 64), 16, (128, 128), 4),
    (torch.bfloat16, ("int8", 128), ("int8", 16), 128, (64, 128), 3),
    (torch.bfloat16, ("int4", 64), ("int4", 64), 64, (256, 256), 1),
    (torch.bfloat16, ("fp8", 0), ("fp8", 0), 32, (64, 64), 3),
    (torch.bfloat16, ("exact", 0), ("int4", 32), 16, (128, 64), 4),
    (torch.bfloat16, ("int4", 16), ("exact", 0), 16, (80, 48), 3),
    (torch.float16, ("int4", 32), ("int8", 32), 64, (64, 64), 3),
    (torch.float16, ("fp8", 0), ("int4", 32), 32, (64, 64), 1),
    (torch.float32, ("int4", 32), ("fp8", 0), 32, (64, 64), 3),
    (torch.float32, ("fp8", 0), ("int8", 16), 16, (48, 80), 4),
]


def make_layout(dtype, k, v, size, dims):
    return lay_out(part(k[0], dtype, k[1]), part(v[0], dtype, v[1]), dtype, size=size, dims=dims)


@pytest.fixture
def only_native(monkeypatch):
    monkeypatch.setattr(mixed, "seal_pages", None)
    monkeypatch.setattr(mixed, "_Rows", None)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "k", "v", "size", "dims", "group"), LAYOUTS)
def test_decode_equals_the_oracle(dtype, k, v, size, dims, group, threads, only_native):
    layout = make_layout(dtype, k, v, size, dims)
    lengths = [1, size, size + 1, 0, 2 * size, 5 * size + 3, 300]
    torch.manual_seed(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for keep, window, softcap, sinks in OPTIONS:
            rows = make_rows(
                layout, lengths, group=group, keep=keep, window=window, softcap=softcap,
                sinks=sinks,
            )  # fmt: skip
            rows.judge(mixed.mixed_decode(**rows.given), "mixed_decode")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("dtype", "k", "v", "size", "dims", "group"), LAYOUTS)
def test_prefill_equals_the_oracle(dtype, k, v, size, dims, group, threads, only_native):
    layout = make_layout(dtype, k, v, size, dims)
    counts = [1, size, size + 1, 0, 2 * size + 5, 40, 33]
    lengths = [1, size, size + 1, 70, 3 * size + 5, 2 * size + 40, 250]
    torch.manual_seed(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for keep, window, softcap, sinks in OPTIONS:
            rows = make_rows(
                layout, lengths, counts, group=group, keep=keep, window=window, softcap=softcap,
                sinks=sinks,
            )  # fmt: skip
            rows.judge(mixed.mixed_prefill(**rows.given), "mixed_prefill")
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are its flags")
@pytest.mark.parametrize("flags", [("-march=haswell",), ("-march=native", "-mno-avx512bf16")])
@pytest.mark.parametrize(("dtype", "k", "v", "size", "dims", "group"), LAYOUTS[::5])
def test_older_processors(flags, dtype, k, v, size, dims, group, only_native, monkeypatch):
    """Without wide vectors, and without products of bf16."""
    others = tuple(x for x in native._FLAGS if not x.startswith("-march"))
    monkeypatch.setattr(native, "_FLAGS", (*others, *flags))
    native_sealed._code.cache_clear()
    native_sealed.native_seal.cache_clear()
    native.load.cache_clear()
    try:
        layout = make_layout(dtype, k, v, size, dims)
        torch.manual_seed(0)
        rows = make_rows(layout, [1, size + 1, 300], group=group, keep=1, window=150, softcap=5.0)
        rows.judge(mixed.mixed_decode(**rows.given), "mixed_decode")
        rows = make_rows(layout, [size + 1, 300], [2, 100], group=group, sinks=True)
        rows.judge(mixed.mixed_prefill(**rows.given), "mixed_prefill")
        check_seal(layout.k, layout.v, dtype, native=True, size=size, dims=dims)
        if k == "int4":
            check_seal(layout.k, layout.v, dtype, native=True, size=size, dims=dims, moved=True)
    finally:
        native_sealed._code.cache_clear()
        native_sealed.native_seal.cache_clear()
        native.load.cache_clear()


def test_prefill_refuses_what_does_not_fit(only_native):
    layout = make_layout(*LAYOUTS[0][:5])
    rows = make_rows(layout, [200, 70], [100, 6], group=3, keep=1)
    given = rows.given
    assert given["cu_own"].tolist() == [0, 3, 4]
    wrong: dict[str, dict[str, Any]] = {
        "row 0 has 3 own pages, its new tokens need 2": {"seq_lens": [192, 70]},
        "row 0 has 100 new tokens of 99": {"seq_lens": [99, 70]},
        "row 0 has 99 new tokens": {"cu_q": [1, 100, 106]},
        "row 2 has 0 new tokens of 105 in all; there are 106": {"cu_q": [0, 100, 105]},
        "row 0 has 2 own pages": {"cu_own": [0, 2, 4]},
        "row 1 has 1 own pages, its new tokens need 1; there are 3": {"own": 3},
        "page 1 of row 0 is entry 99": {"entry": 99},
    }
    for text, changes in wrong.items():
        changed = dict(given)
        for name, values in changes.items():
            if name == "own":
                changed |= {x: given[x][:values] for x in ("own_k", "own_v")}
            elif name == "entry":
                changed["block_table"] = given["block_table"].clone()
                changed["block_table"][0, 1] = values
            else:
                changed[name] = torch.tensor(values, dtype=torch.int32)
        with pytest.raises(ValueError, match=text):
            mixed.mixed_prefill(**changed)


def test_decode_refuses_what_there_is_not(only_native):
    layout = make_layout(*LAYOUTS[0][:5])
    rows = make_rows(layout, [200, 3], group=3, keep=1)
    given = rows.given
    for page, entries in ((0, len(given["k_pages"])), (1, len(given["slices"]))):
        for wrong in (-1, entries):
            table = given["block_table"].clone()
            table[0, page] = wrong
            with pytest.raises(ValueError, match=f"page {page} of row 0 is entry {wrong}"):
                mixed.mixed_decode(**given | {"block_table": table})
    with pytest.raises(ValueError, match="row 1 has 500 tokens, a table of 4"):
        mixed.mixed_decode(**given | {"seq_lens": torch.tensor([200, 500], dtype=torch.int32)})


def test_slopes_are_left_to_torch(monkeypatch):
    layout = make_layout(*LAYOUTS[0][:5])
    rows = make_rows(layout, [200, 3], group=3, slopes=True)
    monkeypatch.setattr(mixed, "NativeSealed", None)
    rows.judge(mixed.mixed_decode(**rows.given), "mixed_decode")


@pytest.mark.parametrize(
    ("dtype", "k", "v"),
    [
        *((torch.bfloat16, k, v) for k in FORMS for v in FORMS),
        (torch.float32, "int4", "int4"), (torch.float16, "int4", "int4"),
        (torch.float32, "fp8", "int8"), (torch.float16, "int8", "fp8"),
    ],
)  # fmt: skip
def test_sealing_is_as_good_as_the_oracle(dtype, k, v, only_native):
    check_seal(part(k, dtype), part(v, dtype, 64), dtype, native=True)


@pytest.mark.parametrize(
    ("k", "v", "size", "dims"),
    [
        (Part("int", 4, 16), Part("int", 4, 16), 16, (16, 48)),
        (Part("int", 4, 64), Part("int", 8, 80), 64, (80, 80)),
        (Part("int", 8, 128), Part("int", 4, 32), 128, (256, 128)),
    ],
)
def test_sealing_of_any_width(k, v, size, dims, only_native):
    check_seal(k, v, torch.bfloat16, native=True, heads=3, size=size, dims=dims)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("size", "group", "k_dim"), [(64, 32, 64), (16, 16, 128), (64, 32, 80), (32, 32, 256)]
)
def test_codes_are_moved_as_the_oracle_does(dtype, size, group, k_dim, only_native):
    k, v = Part("int", 4, group), Part("int", 4, 32)
    check_seal(k, v, dtype, native=True, heads=3, size=size, dims=(k_dim, 64), moved=True)


def test_every_number_of_fp8_is_found():
    """And what lies between two of them goes to the nearer, or to the even one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat([numbers, (numbers[:-1] + numbers[1:]) / 2, torch.tensor([1e9, -1e9])])
    numbers = torch.cat([numbers, numbers[-1:].expand(1024 - len(numbers))]).clone()
    pages = numbers.view(1, 1, 1, 16, 64)
    layout = lay_out(Part("exact", 32), Part("fp8", 8), torch.float32, heads=1)
    slices = [torch.empty(1, 1, layout.slice_bytes, dtype=torch.uint8) for _ in range(2)]
    entry = torch.tensor([0])
    for x, by in zip(slices, (True, False), strict=True):
        mixed.seal(pages, pages, entry, x, entry, layout, native=by)
    assert len(slices[0][0, 0, layout.v_codes :].unique()) == 256
    assert torch.equal(*slices)


def test_sealing_refuses_entries_that_there_are_not():
    layout = lay_out(Part("fp8", 8), Part("fp8", 8), torch.float32)
    pages = torch.zeros(2, 1, 2, 16, 64)
    slices = torch.zeros(3, 1, layout.slice_bytes, dtype=torch.uint8)
    for src, dst in ((2, 0), (-1, 0), (0, 3), (0, -1)):
        with pytest.raises(ValueError, match="has entries"):
            mixed.seal(pages, pages, torch.tensor([src]), slices, torch.tensor([dst]), layout)
    none = torch.zeros(0, dtype=torch.int64)
    assert mixed.seal(pages, pages, none, slices, none, layout).sums.shape == (0, 1)
    assert not slices.any()


def test_what_native_code_does_not_know_is_sealed_by_torch(caplog):
    layout = lay_out(Part("int", 4, 8), Part("int", 4, 16), torch.float32)
    with pytest.raises(NativeError, match="multiples of 16"):
        native_sealed.NativeSeal(layout)
    native_sealed.native_seal.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            check_seal(layout.k, layout.v, torch.float32, native=True)
    assert caplog.text.count("sealed by stock torch") == 1
    native_sealed.has_native_sealed.cache_clear()
    rows = make_rows(layout, [40, 16])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            rows.judge(mixed.mixed_decode(**rows.given), "mixed_decode")
    assert caplog.text.count("stays with stock torch") == 1
