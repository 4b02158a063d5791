import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.transfer import PROGRAMS, fill_launch
from kvpaged_kernels.gpu.transfer import fill_pages as fill_gpu
from kvpaged_kernels.reference.transfer import fill_pages as fill_reference

FILLS = [pytest.param(fill_reference, id="reference"), pytest.param(fill_gpu, id="gpu")]


def random_bytes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_some_layers_of_page_major_pages(fill, index):
    """Pages of 5,376 bytes, entries in units of 256; layers 1 and 2 of three of 1,792 bytes."""
    page, pages, unit = 5376, 6, 256
    memory, records = random_bytes(page * pages, 1), random_bytes(3 * page, 2)
    expected = memory.clone().view(pages, page)
    entries = [4, 0, 5]
    for row, entry in enumerate(entries):
        expected[entry, 1792:] = records.view(3, page)[row, 1792:]
    shape = ((pages - 1) * page // unit + 1, 1, 1, 2 * 1792)
    view = memory.as_strided(shape, (unit, 0, 0, 1), 1792)
    source = records.as_strided((3, 1, 1, 2 * 1792), (page, 0, 0, 1), 1792)
    fill(source, view, torch.tensor(entries, dtype=index) * (page // unit))
    assert torch.equal(memory, expected.flatten())


@settings(max_examples=20, deadline=None)
@given(
    offset=st.integers(0, 9),
    piece=st.integers(1, 5000),
    gap=st.integers(0, 9),
    slices=st.integers(1, 3),
    pieces=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_alignment(offset, piece, gap, slices, pieces, seed):
    """Layer-major at odd addresses, lengths and gaps: what lies between stays."""
    pages, row = 4, piece + gap
    memory = random_bytes(offset + slices * pieces * pages * row, seed)
    expected = memory.clone()
    records = random_bytes(offset + 3 * slices * pieces * row, seed + 1)
    source = records.as_strided(
        (3, slices, pieces, piece), (slices * pieces * row, pieces * row, row, 1), offset
    )
    entries = torch.tensor([3, 0, 2])
    for target, fill in ((memory, fill_gpu), (expected, fill_reference)):
        view = target.as_strided(
            (pages, slices, pieces, piece), (row, pieces * pages * row, pages * row, 1), offset
        )
        fill(source, view, entries)
    assert torch.equal(memory, expected)


def test_strides_beyond_int32_reach_the_kernel_whole():
    records = torch.empty_strided(
        (300, 32, 2, 2**12), (2**37, 2**35, 2**34, 1), dtype=torch.uint8, device="meta"
    )
    pages = torch.empty_strided(
        (2**20, 32, 2, 2**12), (2**8, 2**40, 2**39, 1), dtype=torch.uint8, device="meta"
    )
    launch = fill_launch(records, pages, torch.empty(300, dtype=torch.int64, device="meta"))
    assert launch.grid == (PROGRAMS,)
    found = {name: of for name, of in launch.arguments.items() if name.startswith("stride")}
    assert found == {
        "stride_record": 2**34, "stride_record_slice": 2**32, "stride_record_piece": 2**31,
        "stride_entry": 2**5, "stride_slice": 2**37, "stride_piece": 2**36,
    }  # fmt: skip
    assert launch.arguments["count"] == 300 * 32 * 2
    assert launch.arguments["ROWS"] * launch.arguments["BLOCK"] * 8 == 16384


@pytest.mark.parametrize("fill", FILLS)
def test_nothing_to_copy(fill):
    memory = random_bytes(64, seed=5)
    expected = memory.clone()
    fill(memory[:0].view(0, 1, 1, 16), memory.view(4, 1, 1, 16), torch.empty(0, dtype=torch.int32))
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("records", "entries", "message"),
    [
        (torch.zeros(1, 1, 16), torch.zeros(1).int(), "slices, pieces"),
        (torch.zeros(1, 1, 1, 8), torch.zeros(1).int(), "the same pieces"),
        (torch.zeros(1, 1, 1, 16).half(), torch.zeros(1).int(), "records must be one of"),
        (torch.zeros(1, 1, 1, 16), torch.zeros(2).int(), "an entry a record"),
        (torch.zeros(1, 1, 1, 32)[..., ::2], torch.zeros(1).int(), "last stride 1"),
        (torch.zeros(1, 1, 1, 16), torch.zeros(1), "entries must be one of"),
    ],
    ids=["rank", "pieces", "dtype", "entries", "stride", "index"],
)
def test_refusals(fill, records, entries, message):
    with pytest.raises(ValueError, match=message):
        fill(records, torch.zeros(4, 1, 1, 16), entries)


def test_records_the_device_cannot_reach_are_refused():
    with pytest.raises(ValueError, match="pinned host memory"):
        fill_gpu(
            torch.zeros(1, 1, 1, 16), torch.empty(4, 1, 1, 16, device="meta"),
            torch.zeros(1, dtype=torch.int32, device="meta"),
        )  # fmt: skip
