"""The format of `lossless`, what it saves, and which planes it chooses."""

import struct
from unittest import mock

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.codecs import Bytes, Lossless, lossless
from kvpaged.codecs.planes import merge, split
from tests.codecs.contents import anything, bytes_of, noise, normal

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def read(stored: bytes, size: int) -> bytes:
    """The format once more, element by element, from its description."""
    version, width, log_block, zero, value_bytes = struct.unpack_from("<BBBBQ", stored)
    assert (version, zero, value_bytes) == (1, 0, size)
    whole, block = size - size % (2 * width), 1 << log_block
    lengths = [min(block, whole - at) for at in range(0, whole, block)]
    sizes = struct.unpack_from(f"<{len(lengths) * width}I", stored, 12)
    kept = 12 + 4 * len(sizes)
    frames = kept + sum(
        lengths[number // width] // width for number, coded in enumerate(sizes) if not coded
    )
    value = b""
    for number, length in enumerate(lengths):
        planes = []
        for coded in sizes[number * width : (number + 1) * width]:
            if coded:
                frame = stored[frames : frames + coded]
                planes.append(zstandard.ZstdDecompressor().decompress(frame))
                frames += coded
            else:
                planes.append(stored[kept : kept + length // width])
                kept += length // width
        value += joined(planes)
    return value + stored[frames:]


def joined(planes: list[bytes]) -> bytes:
    """Elements of `len(planes)` bytes, `j` and `j + h` from the `j`-th pair of words."""
    width = len(planes)
    if width == 1:
        return planes[0]
    low, high = joined(planes[: width // 2]), joined(planes[width // 2 :])
    first, second, half = [], [], width // 2
    for at in range(0, len(low), width):
        first.append(low[at : at + half] + high[at : at + half])
        second.append(low[at + half : at + width] + high[at + half : at + width])
    return b"".join(first + second)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("elements", [10, 4097, 20_000])
def test_the_format_is_as_described(dtype, elements):
    data = normal(elements, dtype)
    with mock.patch.object(lossless, "LOG_BLOCK", 14):
        stored = Lossless().encode(data, dtype)
    if stored is None:
        assert elements == 10  # header and table take more than there is to save
        return
    assert read(stored.tobytes(), len(data)) == data.tobytes()


STORED = bytes.fromhex(
    "01020e000201000000000000000000002d00000000c097572eeec5855c1cf3b38a4a21e1b8784f0f"
    "e6a67d3d14d4ab6b4202d999703007c79e5e35f5cc8c6323faba915128e8bf7f5616edad84441bdb"
    "b2724909e0a077370ecea5653cfcd3936a2a01c198582fefc6865d1df4b48b4b22e2b9795010e7a7"
    "7e3e15d5ac6c4303da9a713108c89f5f36f6cd8d6424fbbb925229e928b52ffd2080250100b840bf"
    "bf3f3f3f3fbfbf3f3f3f3f4040bfbf40403f3f40400400d8140200120089c3a50e803f"
)
"""129 elements of 2 bytes: low bytes kept, high ones a frame, the last element as it is."""


def test_what_was_once_written_can_be_read():
    j = np.arange(129)
    high = np.where(j * j % 7 == 0, 0x40, np.where(j % 3 == 1, 0xBF, 0x3F))
    expected = np.stack([151 * j % 256, high], 1).astype(np.uint8).reshape(-1)
    out = np.empty(258, np.uint8)
    Lossless().decode_into(np.frombuffer(STORED, np.uint8), out, torch.bfloat16)
    assert np.array_equal(out, expected)
    assert read(STORED, 258) == expected.tobytes()
    assert STORED[20:24] == bytes([0, 151 * 64 % 256, 151, 151 * 65 % 256])  # pairs are (j, j + 64)


@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.bfloat16, 1.49), (torch.float16, 1.18), (torch.float32, 1.19), (torch.float64, 1.07)],
)
def test_exponents_of_normal_numbers_are_saved(dtype, least):
    data = bytes_of(torch.randn(1 << 19, generator=torch.Generator().manual_seed(3)).to(dtype))
    if dtype == torch.float64:  # of which the lower half would be zeros
        data = np.random.default_rng(3).normal(size=1 << 18).view(np.uint8)
    stored = Lossless().encode(data, dtype)
    assert stored is not None
    assert len(data) / len(stored) > least
    out = np.empty_like(data)
    Lossless().decode_into(stored, out, dtype)
    assert np.array_equal(out, data)


def test_numbers_from_a_narrower_format_are_as_small_as_there():
    numbers = torch.randn(1 << 17, generator=torch.Generator().manual_seed(4)).bfloat16()
    narrow = Lossless().encode(bytes_of(numbers), torch.bfloat16)
    wide = Lossless().encode(bytes_of(numbers.float()), torch.float32)
    assert narrow is not None
    assert wide is not None
    assert len(wide) < 1.01 * len(narrow)


def test_a_half_filled_page_is_half_as_large():
    page = normal(1 << 18, torch.bfloat16).copy()
    full = Lossless().encode(page, torch.bfloat16)
    page[len(page) // 2 :] = 0
    half = Lossless().encode(page, torch.bfloat16)
    assert full is not None
    assert half is not None
    assert len(half) < 0.55 * len(full)


def test_token_ids_are_saved_too():
    ids = torch.randint(0, 49152, (1 << 16,), generator=torch.Generator().manual_seed(5))
    stored = Lossless().encode(bytes_of(ids), torch.int64)
    assert stored is not None
    assert len(stored) < 0.27 * ids.nbytes


def test_planes_are_chosen_by_a_sample():
    data = normal(1 << 16, torch.float32)
    assert lossless.worthwhile(data, 4) == [False, False, False, True]
    assert lossless.worthwhile(noise(1 << 16), 4) == [False] * 4
    wide = torch.from_numpy(data.view(np.float32).copy()).bfloat16().float()
    assert lossless.worthwhile(bytes_of(wide), 4) == [True, True, False, True]
    assert lossless.worthwhile(np.empty(0, np.uint8), 4) == [False] * 4


def test_a_sample_sees_every_channel():
    # One channel of 128 differs: a sample at every 256th element would see it always or never.
    numbers = np.full((4096, 128), 1, np.uint16)
    numbers[:, 0] = np.random.default_rng(0).integers(0, 1 << 16, 4096)
    assert lossless.worthwhile(numbers.view(np.uint8).reshape(-1), 2) == [True, True]


def test_the_entropy_of_a_sample():
    assert lossless.entropy(np.zeros(100, np.uint8)) == 0
    assert lossless.entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8)
    assert lossless.entropy(np.array([1, 2, 3, 4] * 10, np.uint8)) == pytest.approx(2)
    assert lossless.entropy(np.empty(0, np.uint8)) == 8


@settings(deadline=None)
@given(anything(), st.sampled_from([1, 2, 4, 8]))
def test_planes_hold_bytes_of_one_place(data, width):
    block: Bytes = data[: len(data) - len(data) % (2 * width)].copy()
    planes = split(block, width)
    assert len(planes) == width
    for place, plane in enumerate(planes):
        assert np.array_equal(np.sort(plane), np.sort(block[place::width]))
    out = np.empty_like(block)
    merge(planes, out)
    assert np.array_equal(out, block)
