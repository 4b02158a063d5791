import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.cpu import copy
from kvpaged_kernels.cpu.copy import checksum as checksum_cpu
from kvpaged_kernels.cpu.native_copy import prepare
from kvpaged_kernels.gpu.checksum import checksum as checksum_gpu
from kvpaged_kernels.gpu.checksum import checksum_launch
from kvpaged_kernels.reference.checksum import checksum as checksum_reference
from kvpaged_kernels.reference.checksum import checksum_numpy, root


def mix32(x: int) -> int:
    """The definition once more, in plain integers."""
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def by_hand(words: list[int], first_word: int = 0) -> int:
    total = 0
    for i, word in enumerate(words, start=first_word):
        a = mix32(i + 0x9E3779B9)
        total += word * (a - 2**32 if a >= 2**31 else a)
    total &= 2**64 - 1
    return total - 2**64 if total >= 2**63 else total


def random_words(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


@pytest.fixture(scope="module", autouse=True)
def native_code():
    prepare(60)


@settings(max_examples=25, deadline=None)
@given(
    slices=st.integers(1, 3),
    pieces=st.integers(1, 3),
    piece_words=st.integers(1, 1300),
    first_word=st.sampled_from([0, 1, 77, 2**31 - 5, 2**32 - 3 * 1300]),
    index=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 99),
)
def test_all_implementations_agree_bit_for_bit(
    slices, pieces, piece_words, first_word, index, seed
):
    """Pages overlap in units of 5 words, as entries of a page-major pool do."""
    memory = random_words(200 + slices * pieces * (piece_words + 1), seed=seed)
    shape = (41, slices, pieces, piece_words)
    words = memory.as_strided(shape, (5, pieces * (piece_words + 1), piece_words + 1, 1))
    entries = torch.tensor([40, 0, 17, 0], dtype=index)
    got = checksum_gpu(words, entries, first_word=first_word)
    assert got.dtype == torch.int64
    assert torch.equal(got, checksum_reference(words, entries, first_word=first_word))
    assert torch.equal(got, checksum_cpu(words, entries, first_word=first_word))
    assert torch.equal(got, copy._in_numpy(words, entries, first_word))
    native = copy._native(words, entries, first_word)
    assert native is not None or not shutil.which("g++")
    assert native is None or torch.equal(got, native)
    theirs = checksum_numpy(words.numpy(), entries.numpy(), first_word=first_word)
    assert theirs.dtype == np.int64
    assert np.array_equal(got.numpy(), theirs)
    assert got[1, -1] == by_hand(words[0, -1].flatten().tolist(), first_word)


IMPLEMENTATIONS = [
    pytest.param(checksum_gpu, id="gpu"),
    pytest.param(checksum_reference, id="reference"),
    pytest.param(checksum_cpu, id="cpu"),
]


@pytest.mark.parametrize("checksum", IMPLEMENTATIONS)
@pytest.mark.parametrize("fill", [-(2**31), -1, 0, 1, 2**31 - 1])
def test_extreme_words(checksum, fill):
    words = torch.full((1, 1, 1, 3000), fill, dtype=torch.int32)
    got = checksum(words, torch.tensor([0]))
    assert got.item() == by_hand([fill] * 3000)


@pytest.mark.parametrize("checksum", IMPLEMENTATIONS)
def test_a_known_value(checksum):
    """On disk and on other machines: the value may never change."""
    words = torch.arange(-5, 59, dtype=torch.int32).reshape(1, 1, 4, 16)
    assert checksum(words, torch.tensor([0])).item() == 208481522373


@pytest.mark.parametrize("checksum", IMPLEMENTATIONS)
def test_faults_change_the_sum(checksum):
    words = random_words(1, 1, 2, 64, seed=6)
    entry = torch.tensor([0])
    good = checksum(words, entry).item()
    for bit in (0, 7, 31):
        for index in (0, 63, 127):
            flipped = words.clone().flatten()
            flipped[index] ^= -(2**31) if bit == 31 else 1 << bit
            assert checksum(flipped.view_as(words), entry).item() != good
    swapped = words.clone()
    swapped[0, 0, 0, 3:5] = words[0, 0, 0, 3:5].flip(0)
    assert checksum(swapped, entry).item() != good
    assert checksum(words.flip(2), entry).item() != good
    assert checksum(words.roll(1, -1), entry).item() != good
    # A word that moves to another place in a page of zeros is found: no coefficient repeats.
    lone = torch.zeros(64, 1, 1, 64, dtype=torch.int32)
    lone[torch.arange(64), 0, 0, torch.arange(64)] = 12345
    assert checksum(lone, torch.arange(64)).unique().numel() == 64


@pytest.mark.parametrize("checksum", IMPLEMENTATIONS)
def test_parts_add_up(checksum):
    words = random_words(2, 3, 4, 50, seed=7)
    entries = torch.tensor([1, 0])
    whole = checksum(words, entries)
    first = checksum(words[:, :, :1], entries)
    rest = checksum(words[:, :, 1:], entries, first_word=50)
    assert torch.equal(whole, first + rest)


def test_the_root_is_the_checksum_of_the_sums():
    sums = checksum_reference(random_words(3, 5, 2, 40, seed=8), torch.arange(3))
    words = sums.numpy().view("<i4").reshape(3, 1, 1, 10)
    assert np.array_equal(root(sums).numpy(), checksum_numpy(words, np.arange(3))[:, 0])
    assert torch.equal(checksum_gpu(torch.from_numpy(words), torch.arange(3))[:, 0], root(sums))
    assert root(sums)[0] != root(sums.flip(1))[0]


@pytest.mark.parametrize("checksum", IMPLEMENTATIONS)
def test_no_entries_and_no_words(checksum):
    words = random_words(2, 3, 1, 8, seed=9)
    assert checksum(words, torch.empty(0, dtype=torch.int64)).shape == (0, 3)
    empty = checksum(words[..., :0], torch.tensor([1]))
    assert torch.equal(empty, torch.zeros(1, 3, dtype=torch.int64))


def test_strides_beyond_int32_reach_the_kernel_whole():
    words = torch.empty_strided(
        (8, 32, 2, 4096), (2**36, 2**33, 2**32, 1), dtype=torch.int32, device="meta"
    )
    sums = torch.empty(5, 32, dtype=torch.int64, device="meta")
    launch = checksum_launch(words, torch.empty(5, dtype=torch.int32, device="meta"), sums, 0)
    assert launch.grid == (160,)
    names = ("stride_entry", "stride_slice", "stride_piece")
    assert [launch.arguments[name] for name in names] == [2**36, 2**33, 2**32]


@pytest.mark.parametrize("checksum", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("words", "first_word", "message"),
    [
        (torch.zeros(1, 1, 1, 4), 0, "words must be one of torch.int32"),
        (torch.zeros(1, 1, 4).int(), 0, "entries_total, slices"),
        (torch.zeros(1, 1, 1, 4).int(), -1, "must be in 0"),
        (torch.zeros(1, 1, 1, 4).int(), 2**32 - 3, "must be in 0"),
    ],
    ids=["dtype", "rank", "negative", "beyond"],
)
def test_refusals(checksum, words, first_word, message):
    with pytest.raises(ValueError, match=message):
        checksum(words, torch.tensor([0]), first_word=first_word)
