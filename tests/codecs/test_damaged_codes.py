"""Encoded bytes that are not what was written: an error or wrong bytes, and nothing worse."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.codecs import Bytes, Codec, Lossless, Zstd
from kvpaged.codecs import zstd as zstd_module
from kvpaged.errors import IntegrityError
from tests.codecs.contents import CODECS, DTYPES, anything, bytes_of, framed, is_framed, normal

CASES = [
    (Lossless(), torch.bfloat16, 301), (Lossless(), torch.float32, 301),
    (Lossless(), torch.float64, 101), (Lossless(), torch.int16, 300), (Zstd(), torch.int16, 300),
]  # fmt: skip
IDS = [f"{coder.name} {dtype}" for coder, dtype, _ in CASES]


def small(coder: Codec, dtype: torch.dtype, elements: int) -> tuple[Bytes, Bytes]:
    """A small value and what it is encoded to."""
    if dtype.is_floating_point:
        data = normal(elements, dtype)
    else:
        data = bytes_of((torch.arange(elements) % 50).to(dtype))
    stored = coder.encode(data, dtype)
    assert stored is not None
    return data, stored


def decoded(coder: Codec, stored: Bytes, size: int, dtype: torch.dtype) -> Bytes | None:
    """What comes back; `None` for an `IntegrityError`. Anything else is a failure."""
    memory, out = framed(size)
    try:
        coder.decode_into(stored, out, dtype)
    except IntegrityError:
        return None
    finally:
        assert is_framed(memory)
    return out


@pytest.mark.parametrize(("coder", "dtype", "elements"), CASES, ids=IDS)
def test_each_byte_wrong_in_turn(coder, dtype, elements):
    data, stored = small(coder, dtype, elements)
    refused = 0
    for at in range(len(stored)):
        for flip in (*(1 << bit for bit in range(8)), 0xFF):
            wrong = stored.copy()
            wrong[at] ^= flip
            refused += decoded(coder, wrong, len(data), dtype) is None
    assert refused > 100
    again = decoded(coder, stored, len(data), dtype)
    assert again is not None
    assert np.array_equal(again, data)


@pytest.mark.parametrize(("coder", "dtype", "elements"), CASES, ids=IDS)
def test_each_truncation_and_more_than_there_was(coder, dtype, elements):
    data, stored = small(coder, dtype, elements)
    for length in range(len(stored)):
        assert decoded(coder, stored[:length], len(data), dtype) is None
    if coder.id == 2:
        longer = np.concatenate([stored, np.zeros(1, np.uint8)])
        assert decoded(coder, longer, len(data), dtype) is None


@pytest.mark.parametrize("at", range(12))
def test_each_field_of_the_header_is_named(at):
    data, stored = small(Lossless(), torch.bfloat16, 300)
    wrong = stored.copy()
    wrong[at] ^= 0x40
    names = ["version", "width", "blocks of", "fourth byte", *["value bytes"] * 8]
    with pytest.raises(IntegrityError, match=f"lossless: {names[at]}"):
        Lossless().decode_into(wrong, np.empty_like(data), torch.bfloat16)


@settings(deadline=None, max_examples=300)
@given(
    stored=anything(600),
    coder=st.sampled_from(CODECS),
    dtype=st.sampled_from(DTYPES),
    size=st.integers(0, 5000),
)
def test_anything_may_be_stored(stored, coder, dtype, size):
    found = decoded(coder, stored, size, dtype)
    assert found is None or len(found) == size


@settings(deadline=None, max_examples=300)
@given(
    data=anything(400),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.int64]),
    log_block=st.integers(0, 255),
    sizes=st.lists(st.sampled_from([0, 1, 9, 40, 2**31, 2**32 - 1]), max_size=16),
    size=st.integers(0, 5000),
)
def test_any_table_may_be_stored(data, dtype, log_block, sizes, size):
    header = struct.pack("<BBBBQ", 1, dtype.itemsize, log_block, 0, size)
    table = np.array(sizes, np.uint32).tobytes()
    stored = np.frombuffer(header + table + data.tobytes(), np.uint8)
    found = decoded(Lossless(), stored, size, dtype)
    assert found is None or len(found) == size


def frame_claiming(size: int, window_log: int) -> Bytes:
    """A zstd frame whose header says `size` bytes and a window of `2**window_log`; one block."""
    header = struct.pack("<IBBQ", 0xFD2FB528, 0b1100_0000, (window_log - 10) << 3, size)
    return np.frombuffer(header + struct.pack("<I", (1 | 1 << 1 | 5 << 3))[:3] + b"x", np.uint8)


def frame_of(size: int) -> Bytes:
    return np.frombuffer(zstd_module.compress(np.zeros(size, np.uint8), level=1), np.uint8)


@pytest.mark.parametrize("cut", [0, 1], ids=["whole", "cut off"])
@pytest.mark.parametrize(
    ("claims", "wanted", "window_log"), [(1 << 40, 1000, 10), (1000, 1000, 27), (1000, 1000, 41)]
)
def test_a_frame_that_claims_much_costs_no_memory(claims, wanted, window_log, cut):
    frame = frame_claiming(claims, window_log)
    frame = frame[: len(frame) - cut]
    vars(zstd_module._local).clear()
    zstd_module.decompress_into(frame_of(1000), np.empty(1000, np.uint8))
    tracemalloc.start()
    with pytest.raises(IntegrityError, match="zstd"):
        zstd_module.decompress_into(frame, np.empty(wanted, np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak + zstd_module._local.decoder.memory_size() < 1 << 20


def test_a_frame_that_does_not_say_its_size_is_refused():
    coder = zstandard.ZstdCompressor(write_content_size=False)
    frame = np.frombuffer(coder.compress(bytes(1000)), np.uint8)
    with pytest.raises(IntegrityError, match="1000 were coded"):
        zstd_module.decompress_into(frame, np.empty(1000, np.uint8))


def test_a_decoder_works_on_after_an_error():
    data, stored = small(Zstd(), torch.int16, 300)
    for _ in range(3):
        assert decoded(Zstd(), stored[:-5], len(data), torch.int16) is None
        found = decoded(Zstd(), stored, len(data), torch.int16)
        assert found is not None
        assert np.array_equal(found, data)
