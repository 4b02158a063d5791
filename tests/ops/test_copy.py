import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.copy import copy_launch
from kvpaged_kernels.gpu.copy import copy_pages as copy_gpu
from kvpaged_kernels.reference.copy import copy_pages as copy_reference

COPIES = [pytest.param(copy_reference, id="reference"), pytest.param(copy_gpu, id="gpu")]


def random_bytes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("copy_pages", COPIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("pieces", [1, 3])
def test_whole_pages_byte_for_byte(copy_pages, dtype, index, pieces):
    """Page-major: pages of 5,376 bytes, entries in units of 256; layer-major: one run a piece."""
    page, pages, unit = 5376, 6, 256
    memory = random_bytes(page * pages, seed=4)
    size = dtype.itemsize
    if pieces == 1:
        step, shape = page // unit, ((pages - 1) * page // unit + 1, 1, page // size)
        strides = (unit // size, page // size, 1)
    else:
        step, shape = 1, (pages, pieces, page // pieces // size)
        strides = (shape[2], pages * shape[2], 1)
    view = memory.view(dtype).as_strided(shape, strides)
    src, dst = torch.tensor([5, 0, 2], dtype=index), torch.tensor([1, 4, 3], dtype=index)
    expected = memory.clone().reshape(pieces, pages, page // pieces)
    expected[:, dst.long()] = expected[:, src.long()].clone()

    copy_pages(view, src * step, dst * step)

    assert torch.equal(memory, expected.flatten())


@settings(max_examples=15, deadline=None)
@given(
    offset=st.integers(0, 9),
    piece=st.integers(1, 2100),
    gap=st.integers(0, 9),
    pieces=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_any_alignment(offset, piece, gap, pieces, seed):
    """Odd addresses, lengths and gaps: the word is as wide as they allow, the gaps stay."""
    page = pieces * (piece + gap)
    memory = random_bytes(offset + 4 * page, seed)
    expected = memory.clone()
    src, dst = torch.tensor([3, 1]), torch.tensor([0, 2])
    for target, copy_pages in ((memory, copy_gpu), (expected, copy_reference)):
        view = target.as_strided((4, pieces, piece), (page, piece + gap, 1), offset)
        copy_pages(view, src, dst)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize(
    ("length", "stride", "offset", "word"),
    [
        (512, 512, 0, torch.int64),
        (514, 516, 0, torch.int32),
        (513, 516, 0, torch.int16),
        (512, 514, 0, torch.int32),
        (512, 512, 1, torch.int16),
        (512, 512, 2, torch.int32),
    ],
)
def test_the_widest_word_that_fits(length, stride, offset, word):
    memory = torch.zeros(4 * 516 + 2, dtype=torch.bfloat16)
    pages = memory.as_strided((4, 1, length), (stride, stride, 1), offset)
    entries = torch.zeros(1, dtype=torch.int32)
    launch = copy_launch(pages, entries, entries)
    assert launch.arguments["pages"].dtype == word
    assert launch.arguments["piece_len"] * word.itemsize == 2 * length


def test_many_large_pages_make_one_grid():
    pages = torch.empty_strided(
        (2**20, 4, 2**21), (128, 2**40, 1), dtype=torch.bfloat16, device="meta"
    )
    entries = torch.empty(300, dtype=torch.int64, device="meta")
    launch = copy_launch(pages, entries, entries)
    assert launch.grid == (300 * 4 * launch.arguments["chunks"],)
    assert launch.arguments["chunks"] * launch.arguments["BLOCK"] == 2**21 // 4
    assert launch.arguments["stride_piece"] == 2**38


@pytest.mark.parametrize("copy_pages", COPIES)
def test_nothing_to_copy(copy_pages):
    memory = random_bytes(64, seed=5)
    expected = memory.clone()
    none = torch.empty(0, dtype=torch.int32)
    copy_pages(memory.view(4, 1, 16), none, none)
    assert torch.equal(memory, expected)


@pytest.mark.parametrize("copy_pages", COPIES)
@pytest.mark.parametrize(
    ("pages", "src", "dst", "message"),
    [
        (torch.zeros(4, 16), torch.zeros(1).int(), torch.zeros(1).int(), "entries, pieces"),
        (torch.zeros(4, 8, 2).mT, torch.zeros(1).int(), torch.ones(1).int(), "last stride 1"),
        (torch.zeros(4, 1, 16), torch.zeros(2).int(), torch.zeros(1).int(), "one length"),
        (torch.zeros(4, 1, 16), torch.zeros(1), torch.zeros(1), "src must be one of"),
    ],
    ids=["rank", "stride", "length", "dtype"],
)
def test_refusals(copy_pages, pages, src, dst, message):
    with pytest.raises(ValueError, match=message):
        copy_pages(pages, src, dst)
