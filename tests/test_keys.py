"""Page keys: the same in every process, another for anything that differs."""

import hashlib

import numpy as np
import pytest

from kvpaged.errors import UsageError
from kvpaged.keys import NO_PAGE, Region, encode_salt, encode_tokens


def keys(tokens: list[int], *, namespace: bytes = b"n", extra: bytes = b"") -> list[bytes]:
    region = Region.of(namespace, extra)
    return list(region.page_keys(encode_tokens(np.array(tokens)), 16))


def test_keys_are_what_the_docstring_says():
    """Computed here from hashlib alone: what another process, or another language, must find."""
    tokens = list(range(100, 140))
    plain = hashlib.blake2b(
        (1).to_bytes(8, "big") + b"n" + b"x", digest_size=32, person=b"kvpaged"
    ).digest()
    before, expected = bytes(16), []
    for page in (tokens[:16], tokens[16:32]):
        data = b"".join(token.to_bytes(4, "big") for token in page)
        before = hashlib.blake2b(before + data, digest_size=16, key=plain).digest()
        expected.append(before)
    assert keys(tokens, extra=b"x") == expected


def test_a_fixed_prompt_has_a_fixed_key():
    """Pages on disk are found by it: it may not change."""
    assert keys(list(range(16)))[0].hex() == "6273a1a4d8d4a4e233183b636726d8fe"


def test_every_part_counts():
    tokens = list(range(48))
    other = [*tokens[:20], 7, *tokens[21:]]
    base = keys(tokens)
    assert len(set(base)) == 3
    assert [a == b for a, b in zip(base, keys(other), strict=True)] == [True, False, False]
    for changed in (keys(tokens, namespace=b"m"), keys(tokens, extra=b"long")):
        assert not set(base) & set(changed)
    assert keys(tokens, namespace=b"ab", extra=b"c") != keys(tokens, namespace=b"a", extra=b"bc")


def test_a_salt_makes_a_region_of_its_own():
    region = Region.of(b"n")
    data = encode_tokens(np.arange(16))
    salted = region.salted(b"tenant", NO_PAGE)
    found = {
        region.page_key(NO_PAGE, data),
        salted.page_key(NO_PAGE, data),
        region.salted(b"tenant2", NO_PAGE).page_key(NO_PAGE, data),
        region.salted(b"tenant", bytes(15) + b"1").page_key(NO_PAGE, data),
        Region.of(b"m").salted(b"tenant", NO_PAGE).page_key(NO_PAGE, data),
    }
    assert len(found) == 5
    assert region.salted(b"tenant", NO_PAGE).page_key(NO_PAGE, data) in found


def test_encoded_tokens_sort_as_tokens_do():
    rows = [[1, 2], [1, 300], [2, 0], [256, 1], [2**31, 5]]
    encoded = [encode_tokens(np.array(row)) for row in rows]
    assert encoded == sorted(encoded)
    assert encode_tokens(np.array([], np.int64)) == b""


@pytest.mark.parametrize("ids", [[-1], [2**32], [1, 2**40]])
def test_tokens_that_do_not_fit_are_named(ids):
    with pytest.raises(UsageError, match=r"token ids lie in 0\.\.4294967295"):
        encode_tokens(np.array(ids))


def test_salts_are_bytes_or_text_and_not_empty():
    assert encode_salt("é") == encode_salt("é".encode())
    assert encode_salt(None) is None
    for wrong in ("", b"", 5):
        with pytest.raises(UsageError, match="salt"):
            encode_salt(wrong)  # type: ignore[arg-type]
