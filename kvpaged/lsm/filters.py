"""Bloom filters of many segments, read across: which of them may hold a key.

A filter is `bits` bits, of which each key sets `PROBES`. The filters of all segments are kept bit
by bit: row `i` is an integer whose bit `s` is bit `i` of segment `s`. So a key asks `PROBES` rows,
ANDed, and not each segment: a store of 4,000 segments answers as fast as one of ten (the layout is
known as a bit-sliced signature file).

There are two sizes: `SMALL` bits for up to 256 keys, `LARGE` for up to `MOST_KEYS`, so at least 16
bits a key: at most 0.1 % of segments are asked in vain (`(1 - e^(-6/16))^6`; Bloom, 1970).
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from xxhash import xxh3_128_intdigest

PROBES = 6
SMALL, LARGE = 1 << 12, 1 << 16
MOST_KEYS = LARGE // 16
"""Keys of a segment, at most."""

Owner = TypeVar("Owner", bound=Hashable)
Bits = np.ndarray[Any, np.dtype[np.uint8]]


def bits_for(keys: int) -> int:
    """The size of the filter of so many keys."""
    assert keys <= MOST_KEYS, keys
    return SMALL if keys <= SMALL // 16 else LARGE


def make(keys: Iterable[bytes], bits: int) -> Bits:
    """A filter's bytes; bit `i` is bit `i % 8` of byte `i // 8`."""
    rows = np.zeros(bits, np.uint8)
    raw = b"".join(xxh3_128_intdigest(key).to_bytes(16, "little") for key in keys)
    places = np.frombuffer(raw, np.uint16).reshape(-1, 8)[:, :PROBES] & (bits - 1)
    rows[places.reshape(-1)] = 1
    return np.packbits(rows, bitorder="little")


class Filters(Generic[Owner]):
    """The filters of all owners. Not thread-safe.

    Invariants:
        1. Bit `s` of every row belongs to `owners[s]`; where that is `None` it is masked out.
        2. A key that an owner's filter was made of always finds that owner.
    """

    def __init__(self) -> None:
        self._sizes = {bits: _Slices[Owner](bits) for bits in (SMALL, LARGE)}
        self._all = tuple(self._sizes.values())

    def add(self, added: Iterable[tuple[Owner, Bits]]) -> None:
        """Take owners with their filters in, all at once: rows are made anew for each call."""
        for bits, slices in self._sizes.items():
            slices.add([(owner, data) for owner, data in added if 8 * len(data) == bits])

    def remove(self, owner: Owner) -> None:
        """Never name it again."""
        for slices in self._sizes.values():
            slices.remove(owner)

    def owners(self, key: bytes) -> Sequence[Owner]:
        """Those that may hold the key, the latest added first of each size."""
        places = xxh3_128_intdigest(key)
        found: Sequence[Owner] = ()
        for slices in self._all:
            if slices.alive and (more := slices.owners(places)):
                found = [*found, *more]
        return found


class _Slices(Generic[Owner]):
    """Filters of one size."""

    def __init__(self, bits: int):
        self.bits = bits
        self.rows: list[int] = []
        self.slots: list[Owner | None] = []
        self.alive = 0  # bit s: slot s has an owner

    def add(self, added: list[tuple[Owner, Bits]]) -> None:
        if not added:
            return
        if not self.rows:
            self.rows = [0] * self.bits
        if len(self.slots) > 2 * self.alive.bit_count() + 64:
            self._pack()
        shift = len(self.slots)
        table = np.stack([np.unpackbits(data, bitorder="little") for _, data in added], axis=1)
        columns = np.packbits(table, axis=1, bitorder="little")
        for row in np.flatnonzero(columns.any(axis=1)).tolist():
            self.rows[row] |= int.from_bytes(columns[row].tobytes(), "little") << shift
        for owner, _ in added:
            self.alive |= 1 << len(self.slots)
            self.slots.append(owner)

    def remove(self, owner: Owner) -> None:
        if owner in self.slots:
            slot = self.slots.index(owner)
            self.slots[slot] = None
            self.alive &= ~(1 << slot)

    def _pack(self) -> None:
        """Leave the slots out that nobody owns: rows stay as short as owners are many."""
        kept = [slot for slot, owner in enumerate(self.slots) if owner is not None]
        size = max(1, -(-len(self.slots) // 8))
        raw = b"".join(row.to_bytes(size, "little") for row in self.rows)
        table = np.unpackbits(
            np.frombuffer(raw, np.uint8).reshape(self.bits, size), axis=1, bitorder="little"
        )
        columns = np.packbits(table[:, kept], axis=1, bitorder="little")
        self.rows = [int.from_bytes(row.tobytes(), "little") for row in columns]
        self.slots = [self.slots[slot] for slot in kept]
        self.alive = (1 << len(kept)) - 1

    def owners(self, places: int) -> Sequence[Owner]:
        rows, mask = self.rows, self.bits - 1
        found = self.alive
        for _ in range(PROBES):
            found &= rows[places & mask]
            if not found:
                return ()
            places >>= 16
        owners = []
        while found:
            slot = found.bit_length() - 1
            found ^= 1 << slot
            owner = self.slots[slot]
            assert owner is not None
            owners.append(owner)
        return owners
