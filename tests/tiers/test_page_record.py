import struct
from hashlib import blake2b

import numpy as np
import pytest
import torch

from kvpaged.errors import IntegrityError
from kvpaged.geometry import PageGeometry
from kvpaged.tiers.record import Head, body_bytes, dtype_of, record_key
from tests.tiers.pages import head_of

GEOMETRIES = [
    PageGeometry(layers=1, kv_heads=1, head_dim=8, page_size=16),
    PageGeometry(layers=30, kv_heads=3, head_dim=64, page_size=64, dtype=torch.float16),
    PageGeometry(layers=2, kv_heads=1, head_dim=256, v_dim=0, page_size=256, dtype=torch.float32),
    PageGeometry(layers=3, kv_heads=2, head_dim=24, v_dim=16, page_size=32, layout="layer-major"),
]


def sealed(text: bytes) -> bytes:
    """With a checksum that is right."""
    return text[:-8] + blake2b(text[:-8], digest_size=8).digest()


def changed(text: bytes, offset: int, form: str, number: int) -> bytes:
    data = bytearray(text)
    struct.pack_into(form, data, offset, number)
    return sealed(bytes(data))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_head_comes_back(geometry):
    head = head_of(geometry, 7, group=3)
    text = head.encode()
    found = Head.decode(text)
    for name in ("group", "depth", "key", "before", "tokens"):
        assert getattr(found, name) == getattr(head, name), name
    assert np.array_equal(found.sums, head.sums)
    assert found.fits(geometry)
    assert head.fits(found.geometry)
    assert found.encode() == text
    assert len(text) == 72 + 8 * geometry.layers + 4 * geometry.page_size + 8
    assert dtype_of(text) == dtype_of(text + b"more") == geometry.dtype


def test_each_byte_that_is_wrong_is_noticed():
    text = head_of(GEOMETRIES[0], 1).encode()
    for at in range(len(text)):
        wrong = bytearray(text)
        wrong[at] ^= 1 << at % 8
        with pytest.raises(IntegrityError, match="page record"):
            Head.decode(bytes(wrong))


@pytest.mark.parametrize("size", [0, 7, 8, 79, 100, -1])
def test_a_head_that_was_cut_or_went_on_is_noticed(size):
    text = head_of(GEOMETRIES[0], 1).encode()
    with pytest.raises(IntegrityError, match="page record"):
        Head.decode(text[:size])
    with pytest.raises(IntegrityError, match="has 152 bytes, this one 153"):
        Head.decode(text + b"\0")


@pytest.mark.parametrize(
    ("offset", "form", "number", "message"),
    [
        (8, "<H", 2, "version 2; this release reads version 1"),
        (12, "<H", 6, "format 6 and dtype 0"),
        (14, "<H", 3, "format 0 and dtype 3"),
        (16, "<I", 2, "of 2 layers and 16 tokens has 160 bytes, this one 152"),
        (24, "<I", 0, "no page there can be: kv_heads must be at least 1, got 0"),
        (28, "<I", 9, "no page there can be: head_dim must be a multiple of 8 up to 256, got 9"),
        (20, "<I", 17, "of 1 layers and 17 tokens has 156 bytes"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_name(offset, form, number, message):
    text = changed(head_of(GEOMETRIES[0], 1).encode(), offset, form, number)
    with pytest.raises(IntegrityError, match=message):
        Head.decode(text)
    if offset in (8, 12, 14):
        assert dtype_of(text) is None


def test_what_is_no_head_has_no_dtype():
    assert dtype_of(b"") is None
    assert dtype_of(b"kvpgrec1") is None
    assert dtype_of(bytes(200)) is None


def test_other_geometries_do_not_fit():
    first = Head.decode(head_of(GEOMETRIES[0], 1).encode())
    assert not any(first.fits(other) for other in GEOMETRIES[1:])
    assert body_bytes(GEOMETRIES[3]) == 3 * 2 * 32 * (24 + 16) * 2


def test_keys_of_records_are_apart():
    keys = {record_key(bytes([n]) * 16, group) for n in range(4) for group in (0, 1, 256)}
    assert len(keys) == 12
    assert all(key.startswith(b"p") and len(key) == 19 for key in keys)
