"""Native code over sealed pages against the oracles."""

import logging
import shutil

import pytest
import torch

from kvpaged_kernels.cpu import mixed, native_sealed
from kvpaged_kernels.cpu.native import NativeError
from kvpaged_kernels.sealed import Part
from tests.cpu.sealed_rows import lay_out, part
from tests.cpu.sealed_seals import check_seal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = ["exact", "fp8", "int8", "int4"]

# Where there is a compiler, code that it refuses is a failure.
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")


@pytest.mark.parametrize(
    ("dtype", "k", "v"),
    [
        *((torch.bfloat16, k, v) for k in FORMS for v in FORMS),
        (torch.float32, "int4", "int4"), (torch.float16, "int4", "int4"),
        (torch.float32, "fp8", "int8"), (torch.float16, "int8", "fp8"),
    ],
)  # fmt: skip
def test_sealing_is_as_good_as_the_oracle(dtype, k, v, monkeypatch):
    monkeypatch.setattr(mixed, "seal_pages", None)
    check_seal(part(k, dtype), part(v, dtype, 64), dtype, native=True)


@pytest.mark.parametrize(
    ("k", "v", "size", "dims"),
    [
        (Part("int", 4, 16), Part("int", 4, 16), 16, (16, 48)),
        (Part("int", 4, 64), Part("int", 8, 80), 64, (80, 80)),
        (Part("int", 8, 128), Part("int", 4, 32), 128, (256, 128)),
    ],
)
def test_sealing_of_any_width(k, v, size, dims, monkeypatch):
    monkeypatch.setattr(mixed, "seal_pages", None)
    check_seal(k, v, torch.bfloat16, native=True, heads=3, size=size, dims=dims)


def test_every_number_of_fp8_is_found():
    """And what lies between two of them goes to the nearer, or to the even one."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat([numbers, (numbers[:-1] + numbers[1:]) / 2, torch.tensor([1e9, -1e9])])
    numbers = torch.cat([numbers, numbers[-1:].expand(1024 - len(numbers))]).clone()
    pages = numbers.view(1, 1, 1, 16, 64)
    layout = lay_out(Part("fp8", 8), Part("fp8", 8), torch.float32, heads=1)
    slices = [torch.empty(1, 1, layout.slice_bytes, dtype=torch.uint8) for _ in range(2)]
    entry = torch.tensor([0])
    for x, native in zip(slices, (True, False), strict=True):
        mixed.seal(pages, pages, entry, x, entry, layout, native=native)
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
