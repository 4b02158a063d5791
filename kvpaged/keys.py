"""Page keys: 128-bit chained hashes that name the tokens of a prefix, the same in every process.

    region key   = BLAKE2b-256(namespace, extra)            pages without a salt
                 = BLAKE2b-256(key = region key; page key of the page before, salt)      salted ones
    page key i   = BLAKE2b-128(key = region key; page key i - 1, tokens of page i)

`extra` is what else the bytes depend on for the whole of a sequence (the regime of a rotary
embedding whose angles change with the length). Tokens are hashed as big-endian uint32, so encoded
tokens also sort as the tokens do.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from kvpaged.errors import UsageError

KEY_BYTES = 16
TOKEN_BYTES = 4
NO_PAGE = bytes(KEY_BYTES)
"""What stands for the page key before the first page of a region."""

Salt = bytes | str | None


def encode_tokens(ids: npt.NDArray[np.integer]) -> bytes:
    """Token ids as they are hashed and compared: 4 bytes each, big-endian.

    Raises:
        UsageError: an id is negative or does not fit 32 bits.
    """
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
        raise UsageError(
            f"token ids lie in 0..{2**32 - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    return ids.astype(">u4").tobytes()


def encode_known(ids: npt.NDArray[np.integer]) -> bytes:
    """`encode_tokens` of ids that have been checked when they came."""
    return ids.astype(">u4").tobytes()


def namespace_digest(namespace: bytes) -> bytes:
    """16 bytes that tell a namespace from others, where something is kept for one by name."""
    return blake2b(namespace, digest_size=KEY_BYTES, person=b"kvpaged name").digest()


def encode_salt(salt: Salt) -> bytes | None:
    """A salt as bytes (`str`: UTF-8); `None` stays.

    Raises:
        UsageError: neither bytes nor text, or empty (no salt is `None`).
    """
    if salt is None:
        return None
    if not isinstance(salt, bytes | str):
        raise UsageError(f"a salt is bytes, text or None, got {type(salt).__name__}")
    if not salt:
        raise UsageError("an empty salt is no salt: give None")
    return salt.encode() if isinstance(salt, str) else salt


class Region:
    """Pages whose keys hang together: those of a namespace, or of a salt from some page on.

    Immutable. `first` is the key that stands before its first page.
    """

    __slots__ = ("_hasher", "_key", "first")

    def __init__(self, key: bytes, first: bytes = NO_PAGE) -> None:
        self._key = key
        self._hasher = blake2b(digest_size=KEY_BYTES, key=key)
        self.first = first

    @classmethod
    def of(cls, namespace: bytes, extra: bytes = b"") -> "Region":
        """The region of a namespace's unsalted pages."""
        length = len(namespace).to_bytes(8, "big")  # so that no two pairs give the same bytes
        return cls(blake2b(length + namespace + extra, digest_size=32, person=b"kvpaged").digest())

    def salted(self, salt: bytes, before: bytes) -> "Region":
        """The region of a salt, whose first page comes after the page of key `before`."""
        return Region(blake2b(before + salt, digest_size=32, key=self._key).digest(), before)

    def page_key(self, before: bytes, tokens: bytes) -> bytes:
        """The key of a page of encoded `tokens` that follows the page of key `before`."""
        hasher = self._hasher.copy()  # a third cheaper than giving the key each time
        hasher.update(before + tokens)
        return hasher.digest()

    def page_keys(self, tokens: bytes, page_size: int) -> Iterator[bytes]:
        """The keys of the full pages of encoded `tokens`, from the region's first page on."""
        width, key = page_size * TOKEN_BYTES, self.first
        for start in range(0, len(tokens) - width + 1, width):
            key = self.page_key(key, tokens[start : start + width])
            yield key
