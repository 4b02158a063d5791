"""What every codec promises: the same bytes back, whatever they are and wherever they lie."""

import inspect
import sys
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.codecs import Codec, Lossless, Raw, Zstd, codec, codec_by_id, lossless, names, register
from kvpaged.codecs import zstd as zstd_module
from kvpaged.errors import ConfigError, IntegrityError
from tests.codecs.contents import (
    CODECS,
    DTYPES,
    anything,
    framed,
    is_framed,
    noise,
    normal,
    unaligned,
)


@settings(deadline=None, max_examples=400)
@given(
    data=anything(),
    coder=st.sampled_from(CODECS),
    dtype=st.sampled_from(DTYPES),
    offsets=st.tuples(*[st.integers(0, 15)] * 2),
)
def test_any_bytes_come_back(data, coder, dtype, offsets):
    source = unaligned(data, offsets[0])
    source.flags.writeable = False
    stored = coder.encode(source, dtype)
    if stored is None:
        return
    assert len(stored) <= 0.97 * len(data)
    memory, out = framed(len(data))
    coder.decode_into(unaligned(stored, offsets[1]), out, dtype)
    assert np.array_equal(out, data)
    assert is_framed(memory)
    elsewhere = unaligned(np.zeros_like(data), offsets[1])
    coder.decode_into(stored, elsewhere, dtype)
    assert np.array_equal(elsewhere, data)


@pytest.mark.parametrize("coder", CODECS[1:], ids=["zstd", "zstd 7", "lossless"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_something_is_saved_of_zeros(coder, dtype):
    data = np.zeros(100_001, np.uint8)
    stored = coder.encode(data, dtype)
    assert stored is not None
    assert len(stored) < 1000
    out = np.ones_like(data)
    coder.decode_into(stored, out, dtype)
    assert not out.any()


@pytest.mark.parametrize("coder", CODECS, ids=["raw", "zstd", "zstd 7", "lossless"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_saves_less_than_three_percent_is_refused(coder, dtype):
    assert coder.encode(noise(50_000), dtype) is None
    assert coder.encode(np.empty(0, np.uint8), dtype) is None
    assert coder.encode(np.zeros(3, np.uint8), dtype) is None


def test_two_percent_are_not_worth_it():
    data = noise(1 << 20)
    data[:21_000] = 0  # 2 %
    assert Zstd().encode(data, torch.uint8) is None
    assert Lossless().encode(data, torch.float32) is None
    data[:60_000] = 0
    assert Zstd().encode(data, torch.uint8) is not None


@pytest.mark.parametrize("coder", CODECS, ids=["raw", "zstd", "zstd 7", "lossless"])
def test_another_length_is_an_error(coder):
    data = normal(500, torch.float32)
    stored = coder.encode(data, torch.float32)
    stored = data if stored is None else stored
    for size in (0, 1, len(data) - 8, len(data) - 1, len(data) + 1, len(data) + 8):
        memory, out = framed(size)
        with pytest.raises(IntegrityError, match=coder.name if coder.id != 1 else "zstd"):
            coder.decode_into(stored, out, torch.float32)
        assert is_framed(memory)


def test_raw_is_a_copy():
    data = noise(1000)
    out = np.zeros_like(data)
    Raw().decode_into(data, out, torch.uint8)
    assert np.array_equal(out, data)


def test_higher_levels_of_zstd_are_smaller_and_read_alike():
    text = inspect.getsource(inspect) + inspect.getsource(threading)
    data = np.frombuffer(text.encode(), np.uint8)
    fast, slow = Zstd().encode(data, torch.uint8), Zstd(level=12).encode(data, torch.uint8)
    assert fast is not None
    assert slow is not None
    assert len(slow) < len(fast)
    out = np.empty_like(data)
    Zstd().decode_into(slow, out, torch.uint8)
    assert np.array_equal(out, data)


def test_any_thread_may_call_and_several_at_once():
    values = [normal(40_000 + 2 * seed, torch.bfloat16, seed) for seed in range(4)]
    wrong: list[object] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        data, coder = values[number % 4], (Lossless(), codec("zstd"))[number // 4]
        out = np.empty_like(data)
        start.wait()
        for _ in range(20):
            stored = coder.encode(data, torch.bfloat16)
            assert stored is not None
            out[:] = 0
            coder.decode_into(stored, out, torch.bfloat16)
            if not np.array_equal(out, data):
                wrong.append(number)
            with pytest.raises(IntegrityError):
                coder.decode_into(stored[:-1], out, torch.bfloat16)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_incompressible_floats_are_refused_after_a_look():
    with mock.patch.object(lossless, "compress_entropy") as compress:
        assert Lossless().encode(noise(1 << 20), torch.bfloat16) is None
    assert compress.call_count == 0


# -- names and ids ---------------------------------------------------------------------------------


def test_ids_are_what_they_always_were():
    assert {name: codec(name).id for name in ("raw", "zstd", "lossless")} == {
        "raw": 0, "zstd": 1, "lossless": 2
    }  # fmt: skip
    assert [codec_by_id(number).name for number in (0, 1, 2)] == ["raw", "zstd", "lossless"]
    assert names() == ["lossless", "raw", "zstd"]


def test_unknown_names_and_ids_are_errors():
    with pytest.raises(ConfigError, match="no codec 'gzip'; there are lossless, raw, zstd"):
        codec("gzip")
    with pytest.raises(IntegrityError, match="no codec has id 77"):
        codec_by_id(77)


class Inverted(Codec):
    """Of bytes of which less than half are set: how many, and their places."""

    id = 200
    name = "places"

    def encode(self, data, dtype):
        places = np.flatnonzero(data).astype(np.uint32)
        if 5 * len(places) > 0.97 * len(data):
            return None
        return np.concatenate([places.view(np.uint8), data[places]])

    def decode_into(self, stored, out, dtype):
        count = len(stored) // 5
        places = stored[: 4 * count].view(np.uint32)
        if len(stored) % 5 or (places >= len(out)).any():
            raise IntegrityError(f"places: {len(stored)} bytes for {len(out)}")
        out[:] = 0
        out[places] = stored[4 * count :]


@pytest.fixture
def registry():
    from kvpaged import codecs

    with mock.patch.dict(codecs._BY_ID), mock.patch.dict(codecs._BY_NAME):
        yield


@pytest.mark.usefixtures("registry")
def test_a_codec_of_ones_own_is_found_by_name_and_id():
    own = Inverted()
    register(own)
    assert codec("places") is own
    assert codec_by_id(200) is own
    assert names() == ["lossless", "places", "raw", "zstd"]
    data = np.zeros(1000, np.uint8)
    data[[3, 999]] = 7
    stored = codec("places").encode(data, torch.uint8)
    assert stored is not None
    assert len(stored) == 10
    out = np.ones_like(data)
    codec_by_id(200).decode_into(stored, out, torch.uint8)
    assert np.array_equal(out, data)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("number", "name", "said"),
    [
        (2, "places", "has id 2; ids of one's own are 128 to 255"),
        (127, "places", "128 to 255"),
        (256, "places", "128 to 255"),
        (201, "zstd", "'zstd' with id 1 is there"),
        (200, "other", "'places' with id 200 is there"),
    ],
)
def test_an_id_or_name_that_is_taken_or_not_ones_own_is_an_error(number, name, said):
    register(Inverted())
    own = type("Own", (Inverted,), {"id": number, "name": name})
    before = names()
    with pytest.raises(ConfigError, match=said):
        register(own())
    assert names() == before


def test_without_zstandard_raw_works_and_the_others_say_what_is_missing():
    data, out = np.zeros(100, np.uint8), np.ones(100, np.uint8)
    missing = mock.patch.dict(sys.modules, zstandard=None)
    with missing, mock.patch.object(zstd_module, "_local", threading.local()):
        codec("raw").decode_into(data, out, torch.uint8)
        for call in (codec("zstd").encode, codec("lossless").encode):
            with pytest.raises(ConfigError, match="need the package zstandard"):
                call(data, torch.int16)
        with pytest.raises(ConfigError, match="need the package zstandard"):
            codec("zstd").decode_into(data, out, torch.uint8)
    assert not out.any()


def test_frames_of_zstd_carry_their_size_and_no_checksum():
    frame = np.frombuffer(zstd_module.compress(np.zeros(100, np.uint8), level=1), np.uint8)
    assert len(frame) < 20
    out = np.ones(100, np.uint8)
    zstd_module.decompress_into(frame, out)
    assert not out.any()
