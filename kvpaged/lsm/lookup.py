"""The reading face of a store, which its snapshots have as well."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor

from kvpaged.errors import ConfigError, KVPagedError
from kvpaged.lsm.files import Bytes
from kvpaged.lsm.layout import Entry
from kvpaged.lsm.lock import StoreLock
from kvpaged.lsm.reader import Fetch, Reader, outputs, pin
from kvpaged.lsm.segment import check_payload
from kvpaged.lsm.stats import ValueInfo, info_of
from kvpaged.lsm.tree import Found, InSegment
from kvpaged.lsm.values import check_key, chosen, destination, lying

Value: TypeAlias = Any
"""What was put, a tensor or a dict of them by name, or `None` for nothing. Who reads a key knows
which; types do not.
"""
Destination = Tensor | Mapping[str, Tensor] | Callable[[Entry], Tensor | Mapping[str, Tensor]]
OnDamage = Literal["raise", "miss"]
"""What to do with a value that is not what its checksums say: raise an `IntegrityError` (or a
`StorageError` where it can't be read at all), or take it for one that is not there."""

ITEMS = 32
"""Values that `items` reads at a time."""


class Lookup:
    """Finds and reads values. Any thread may call."""

    def __init__(self, cond: StoreLock, reader: Reader):
        self._cond, self._reader = cond, reader

    # What a store and a snapshot do differently; `_find` and `_touch` run under the store's lock.

    def _check_open(self) -> None:
        raise NotImplementedError

    def _find(self, key: bytes) -> Found | None:
        raise NotImplementedError

    def _touch(self, found: Found) -> None:
        raise NotImplementedError

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, Found]]:
        raise NotImplementedError

    def _damaged(self, found: Found, *, drop: bool) -> None:
        raise NotImplementedError

    # -- one ---------------------------------------------------------------------------------------

    def get(
        self, key: bytes, parts: Sequence[str] | None = None, *, out: Destination | None = None,
        damaged: OnDamage = "raise",
    ) -> Value:  # fmt: skip
        """A value, or `None` where there is none.

        Args:
            key: of the value.
            parts: names of the tensors that are wanted, of a value that is a dict; `None`: all.
            out: tensors to read into, of the same dtypes and shapes, contiguous, on the CPU; then
                the names of `out` are the parts. Or a function that is given what is known of the
                value (dtypes and shapes: `entry.forms`) and returns them.
            damaged: see `OnDamage`.

        Returns:
            The tensor, or the dict of tensors, that was put; their memory is the caller's.

        Raises:
            IntegrityError: the value is damaged; the message names file, key and part.
            StorageError: it cannot be read.
            ConfigError: it has no part of a name, or `out` is of another dtype or shape.
        """
        check_key(key)
        with self._cond:  # as `_pinned` does, but a key that is not there costs as little as it can
            self._check_open()
            found = self._find(key)
            if found is None:
                self._reader.counts.misses += 1
                return None
            self._reader.counts.hits += 1
            self._touch(found)
            held = [self._pin(found)]
        return self._fetched(held, parts, None if out is None else [out], damaged)[0]

    def view(
        self, key: bytes, parts: Sequence[str] | None = None, *, damaged: OnDamage = "raise"
    ) -> Value:
        """A value without copying it, where it is stored raw in a sealed file; else as `get`.

        The tensors are the file's own bytes, through the page cache: reading them may read from
        disk, later. They stay valid for ever, whatever becomes of the value or the store, and keep
        its file on disk meanwhile. They must not be written to: other views would see it (the file
        would not). Checksums are verified when a value is first viewed.
        """
        check_key(key)
        with self._cond:
            self._check_open()
            found = self._find(key)
            if isinstance(found, InSegment):
                counts = self._reader.counts
                counts.hits += 1
                counts.viewed += 1
                self._touch(found)
        if isinstance(found, InSegment):
            return self._viewed(found, parts, damaged)
        return self.get(key, parts, damaged=damaged)

    def contains(self, key: bytes) -> bool:
        """Whether there is a value; it does not count as asked for."""
        check_key(key)
        with self._cond:
            self._check_open()
            return self._find(key) is not None

    def __contains__(self, key: bytes) -> bool:
        return self.contains(key)

    def info(self, key: bytes) -> ValueInfo | None:
        """What is known of a value without reading it: sizes, codecs, metadata, parent."""
        check_key(key)
        with self._cond:
            self._check_open()
            found = self._find(key)
        return None if found is None else info_of(found)

    # -- many --------------------------------------------------------------------------------------

    def contains_many(self, keys: Iterable[bytes]) -> list[bool]:
        """`contains` of each."""
        with self._cond:
            self._check_open()
            return [self._find(_checked(key)) is not None for key in keys]

    def get_many(
        self, keys: Sequence[bytes], parts: Sequence[str] | None = None, *,
        out: Sequence[Destination | None] | None = None, damaged: OnDamage = "raise",
    ) -> list[Value]:  # fmt: skip
        """`get` of each, with many reads in flight; values that lie behind each other are one read.

        Raises:
            IntegrityError, StorageError: of the first value that has one; the rest was read, into
                `out` where given.
            ConfigError: a destination or a part does not fit; nothing was read.
        """
        if out is not None and len(out) != len(keys):
            raise ConfigError(f"{len(out)} destinations for {len(keys)} keys")
        pinned = self._pinned(keys)
        return self._fetched(pinned, parts, out, damaged)

    def view_many(
        self, keys: Sequence[bytes], parts: Sequence[str] | None = None, *,
        damaged: OnDamage = "raise",
    ) -> list[Value]:  # fmt: skip
        """`view` of each."""
        with self._cond:
            self._check_open()
            found = [self._find(_checked(key)) for key in keys]
            sealed = [one for one in found if isinstance(one, InSegment)]
            for one in sealed:
                self._touch(one)
            self._reader.counts.hits += len(sealed)
            self._reader.counts.viewed += len(sealed)
        return [
            self._viewed(one, parts, damaged) if isinstance(one, InSegment)
            else self.get(key, parts, damaged=damaged)
            for key, one in zip(keys, found, strict=True)
        ]  # fmt: skip

    def scan(self, prefix: bytes = b"") -> Iterator[bytes]:
        """The keys that begin so, ascending, as they were when this was called."""
        found = self._scan(prefix)
        return (key for key, _ in found)

    def items(
        self, prefix: bytes = b"", parts: Sequence[str] | None = None, *,
        damaged: OnDamage = "raise",
    ) -> Iterator[tuple[bytes, Value]]:  # fmt: skip
        """Keys and values, ascending, as they were when this was called; read some at a time."""
        return self._items(self._scan(prefix), parts, damaged)

    def _items(
        self, scan: Iterator[tuple[bytes, Found]], parts: Sequence[str] | None, damaged: OnDamage
    ) -> Iterator[tuple[bytes, Value]]:
        while True:
            some = [item for _, item in zip(range(ITEMS), scan, strict=False)]
            if not some:
                return
            with self._cond:
                held = [self._pin(found) for _, found in some]
            values = self._fetched(held, parts, None, damaged)
            for (key, _), value in zip(some, values, strict=True):
                if value is not None:
                    yield key, value

    def stored(self, prefix: bytes = b"") -> Iterator[tuple[Entry, Bytes]]:
        """Values as they are stored, by ascending keys: entry and payload, uint8 [bytes].

        Raises:
            IntegrityError: one is damaged.
            StorageError: one cannot be read.
        """
        for _, found in self._scan(prefix):
            entry = found.entry
            payload = self._payload(found, entry)
            check_payload(entry, payload, found.where)
            yield entry, payload

    def entries(self, prefix: bytes = b"") -> Iterator[Entry]:
        """What is known of values without reading them, by ascending keys, as it was when this was
        called.
        """
        found = self._scan(prefix)
        return (one.entry for _, one in found)

    # -- how ---------------------------------------------------------------------------------------

    def _payload(self, found: Found, entry: Entry) -> Bytes:
        with self._cond:
            one = self._pin(found)
        if one.slab is None or one.memory is None:
            return self._reader.payload(found, entry)
        payload = one.memory.copy()  # not written yet, perhaps
        with self._cond:
            one.slab.pins -= 1
        return payload

    def _pinned(self, keys: Sequence[bytes]) -> list[Fetch | None]:
        held: list[Fetch | None] = []
        with self._cond:
            self._check_open()
            counts = self._reader.counts
            for key in keys:
                found = self._find(_checked(key))
                if found is None:
                    counts.misses += 1
                    held.append(None)
                    continue
                counts.hits += 1
                self._touch(found)
                held.append(self._pin(found))
        return held

    def _pin(self, found: Found) -> Fetch:
        one = Fetch(found)
        pinned = pin(found)
        if pinned is not None:
            one.memory, one.slab = pinned
        return one

    def _fetched(
        self, held: Sequence[Fetch | None], parts: Sequence[str] | None,
        out: Sequence[Destination | None] | None, damaged: OnDamage,
    ) -> list[Value]:  # fmt: skip
        fetches = [one for one in held if one is not None]
        try:
            for number, one in enumerate(held):
                if one is not None:
                    _prepare(one, parts, None if out is None else out[number])
            self._reader.fetch(fetches)
        finally:
            with self._cond:
                for one in fetches:
                    if one.slab is not None:
                        one.slab.pins -= 1
                        one.slab = one.memory = None
        with self._cond:
            self._reader.counts.asked_bytes += sum(
                len(raw) for one in fetches if one.error is None for raw in one.out.values()
            )
        for one in fetches:
            if one.error is not None:
                self._damaged(one.found, drop=damaged == "miss")
                if damaged == "raise":
                    raise one.error
        return [None if one is None or one.error is not None else one.tensors() for one in held]

    def _viewed(self, found: InSegment, parts: Sequence[str] | None, damaged: OnDamage) -> Value:
        segment, row = found
        checked = segment.checked[row]
        if checked and parts is None and (lone := segment.lone(row)) is not None:
            return lone
        entry = segment.entry(row)
        payload = segment.payload(entry)
        if not checked:
            try:
                check_payload(entry, payload, segment.where)
            except KVPagedError:
                self._damaged(found, drop=damaged == "miss")
                if damaged == "raise":
                    raise
                return None
            segment.checked[row] = True
        return lying(entry, payload, chosen(entry, parts))


def _checked(key: bytes) -> bytes:
    check_key(key)
    return key


def _prepare(one: Fetch, parts: Sequence[str] | None, out: Destination | None) -> None:
    entry = one.found.entry
    one.entry = entry
    if out is None:
        one.numbers = chosen(entry, parts)
        one.out = outputs(entry, one.numbers)
    else:
        one.out = destination(out(entry) if callable(out) else out, entry)
        one.numbers = list(one.out)
