"""What sequences in a cache must hold, as plain dense arrays, and which of their pages others may
find: worked out from token ids alone.

K and V of a token are a hash of the ids up to it and of the namespace it was computed under, so
that what a shared page must hold is known, whoever computed it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvpaged.keys import NO_PAGE, Region, encode_tokens

PAGE, DIM, LAYERS = 16, 8, 2
WIDTH = LAYERS * 2 * DIM
"""Numbers a token has: K and V of each layer."""
SEGMENT = 7
"""Tokens after which prompts may part: in the middle of pages, mostly."""
ALPHABET = (5, 6, 261, 65541, 2**31 - 1, 2**24, 0)
"""Ids that differ in one byte or another, as their order in the index depends on all of them."""
NAMESPACES = (b"one", b"two")

_random = np.random.default_rng(0)
_SPREAD = _random.integers(1, 2**63, WIDTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def token(path: int, place: int) -> int:
    """The id at a place of a prompt; bit `i` of `path` says which way it went at part `i`."""
    part = place // SEGMENT
    return ALPHABET[(place * 3 + part + 2 * (path >> part & 1)) % len(ALPHABET)]


class Row:
    """What a row must hold, and what of it others may have.

    Attributes:
        tokens: its ids.
        hashes: of its ids up to and with each.
        dense: K and V of each token, float32 `[tokens, WIDTH]`.
        origin: namespace, salt and the salt's first page.
        keys: of its pages that are offered to others.
        shared: whether further ones will be.
        owed: ids that come next, because they were computed before.
    """

    def __init__(self, origin: "Origin", *, shared: bool = True) -> None:
        self.tokens: list[int] = []
        self.hashes: list[int] = []
        self.dense = np.empty((0, WIDTH), np.float32)
        self.origin = origin
        self.keys: list[bytes] = []
        self.shared = shared
        self.owed: list[int] = []

    def copy(self) -> "Row":
        """One that goes its own way."""
        other = Row(self.origin, shared=self.shared)
        other.tokens, other.hashes, other.keys = self.tokens[:], self.hashes[:], self.keys[:]
        other.dense, other.owed = self.dense, self.owed[:]
        return other

    def next(self, ids: Sequence[int], namespace: bytes) -> tuple[list[int], np.ndarray]:
        """Hashes of further tokens and their K and V, as computed under a namespace."""
        value = self.hashes[-1] if self.hashes else 1
        seed = namespace[0]
        hashes = []
        for x in ids:
            value = ((value ^ (x + 1)) * 0x9E3779B97F4A7C15 + seed) & (2**64 - 1)
            value ^= value >> 29
            hashes.append(value)
        words = np.array(hashes, np.uint64)[:, None] * _SPREAD
        return hashes, (words >> np.uint64(40)).astype(np.float32) * 2.0**-23 - np.float32(1)

    def add(self, ids: Sequence[int], new: tuple[list[int], np.ndarray]) -> None:
        """Append tokens and what `next` said of them."""
        self.tokens += ids
        self.hashes += new[0]
        self.dense = np.concatenate((self.dense, new[1]))
        self.owed = []

    def rewind(self, length: int, keep: int | None) -> None:
        """Forget the tokens from `length` on, with `keep` those of the whole page where that lies
        within a full one behind the first `keep`: the page is compressed, and the ones up to
        `length` are owed.
        """
        size, begin = len(self.tokens), length // PAGE * PAGE
        if length >= size:
            self.owed = self.owed[: length - size]
            return
        whole = keep is not None and begin >= keep * PAGE and begin + PAGE <= size
        start = begin if whole else length
        self.owed = self.tokens[start:length]
        self.cut(start)

    def cut(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        del self.tokens[length:], self.hashes[length:], self.keys[length // PAGE :]
        self.dense = self.dense[:length]


class Origin(NamedTuple):
    """Where the pages of a sequence belong."""

    namespace: bytes
    salt: bytes | None
    salt_page: int

    def of(self, page: int, before: bytes) -> tuple[bytes, bytes | None, bytes]:
        """The place among all pages of those that follow the page of key `before`."""
        return self.namespace, None if page < self.salt_page else self.salt, before


class Found(NamedTuple):
    """Offered pages that agree with a sequence: whole ones, then those that share most with its
    next tokens, and how many tokens they share.
    """

    path: list[bytes]
    nearest: list[bytes]
    shared: int

    @property
    def tokens(self) -> int:
        """How many tokens agree."""
        return len(self.path) * PAGE + self.shared


class Offers:
    """Every page that was ever offered to others: keys, bytes, and who follows whom."""

    def __init__(self, extra: bytes = b"") -> None:
        """`extra`: what its pages depend on beside a namespace."""
        self._extra = extra
        self.dense: dict[bytes, np.ndarray] = {}
        self._next: dict[tuple[bytes, bytes | None, bytes], dict[tuple[int, ...], bytes]] = {}
        self._regions: dict[bytes, Region] = {}

    def add(self, row: Row) -> None:
        """Offer the full pages of a row."""
        origin = row.origin
        for page in range(len(row.keys), len(row.tokens) // PAGE):
            ids = tuple(row.tokens[page * PAGE : (page + 1) * PAGE])
            before = row.keys[-1] if page else NO_PAGE
            following = self._next.setdefault(origin.of(page, before), {})
            if ids not in following:
                region = self._region(origin, page, row.keys)
                key = region.page_key(before, encode_tokens(np.array(ids)))
                following[ids] = key
                self.dense[key] = row.dense[page * PAGE : (page + 1) * PAGE]
            row.keys.append(following[ids])

    def _region(self, origin: Origin, page: int, keys: Sequence[bytes]) -> Region:
        region = Region.of(origin.namespace, self._extra)
        if origin.salt is None or page < origin.salt_page:
            return region
        return region.salted(
            origin.salt, keys[origin.salt_page - 1] if origin.salt_page else NO_PAGE
        )

    def find(self, origin: Origin, ids: Sequence[int], among: Mapping[bytes, Any]) -> Found:
        """What agrees most with a sequence, of the offered pages that are in `among`."""
        path: list[bytes] = []
        while True:
            page = len(path)
            rest = tuple(ids[page * PAGE : (page + 1) * PAGE])
            place = origin.of(page, path[-1] if path else NO_PAGE)
            following = self._next.get(place, {})
            if len(rest) == PAGE and following.get(rest) in among:
                path.append(following[rest])
                continue
            common = {
                key: next((i for i, (a, b) in enumerate(zip(rest, other, strict=False)) if a != b),
                          len(rest))
                for other, key in following.items() if key in among
            }  # fmt: skip
            most = max(common.values(), default=0)
            nearest = [key for key, n in common.items() if n == most and most]
            return Found(path, nearest, most)


def attention(
    k: np.ndarray, v: np.ndarray, q: np.ndarray, window: int | None,
    behind: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:  # fmt: skip
    """Causal attention of the last `len(q)` of `k`'s positions over a row, scale 1, in fp64.

    All are `[tokens, DIM]`; a query sees `window` tokens, itself included. `behind`: `k` and `v` as
    queries of later pages see them, where that is otherwise.
    """
    place = np.arange(len(k))
    at = place[len(k) - len(q) :, None]
    hidden = (place > at) | (place <= at - (len(k) if window is None else window))
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    own = place // PAGE == at // PAGE
    later_k, later_v = (k, v) if behind is None else (x.astype(np.float64) for x in behind)
    scores = np.where(hidden, -np.inf, np.where(own, q @ k.T, q @ later_k.T))
    weights = np.exp(scores - scores.max(1, keepdims=True, initial=-np.inf))
    weights /= weights.sum(1, keepdims=True)
    out: np.ndarray = np.where(own, weights, 0) @ v + np.where(own, 0, weights) @ later_v
    return out
