"""Pages that have left the pool and are on their way into a tier: found meanwhile."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from kvpaged.tiers.base import Record, Stored, Tier, Usage


@dataclass(eq=False, slots=True)
class _Entry:
    record: Record
    give_back: Callable[[], None]
    readers: int = 0
    ended: bool = False


class Leaving(Tier):
    """Records in staging, the last level of a stack: what an LSM tree's sealed memtable is, which
    is read until it is written. Nothing is put here; `note` says what there is, and until when.

    Any thread may call. A record that has ended is there, and its memory is not given back, as long
    as somebody reads it.
    """

    name = "staging"

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._there: dict[bytes, _Entry] = {}

    def note(self, record: Record, give_back: Callable[[], None]) -> Callable[[], None]:
        """A record is there; what is returned says that it need not be any more (once)."""
        entry = _Entry(record, give_back)
        with self._lock:
            self._there[record.key] = entry

        def end() -> None:
            with self._lock:
                entry.ended = True
                free = not entry.readers
            if free:
                self._free(entry)

        return end

    def _free(self, entry: _Entry) -> None:
        key = entry.record.key
        with self._lock:
            if self._there.get(key) is entry:
                del self._there[key]
                self.gone.append(key)
        entry.give_back()

    @contextmanager
    def read(self, keys: Sequence[bytes], room: Sequence[Tensor]) -> Iterator[list[Record | None]]:
        """See `Tier.read`: views of staging; what is there stays there within the context."""
        with self._lock:
            entries = [self._there.get(key) for key in keys]
            for entry in entries:
                if entry is not None:
                    entry.readers += 1
        try:
            yield [None if entry is None else entry.record for entry in entries]
        finally:
            for entry in entries:
                if entry is None:
                    continue
                with self._lock:
                    entry.readers -= 1
                    free = entry.ended and not entry.readers
                if free:
                    self._free(entry)

    def put(self, records: Sequence[Record]) -> list[bool]:
        """Keeps nothing."""
        return [False] * len(records)

    def delete(self, keys: Sequence[bytes]) -> None:
        """What is wrong is found no more; it goes when it has ended."""
        with self._lock:
            for key in keys:
                self._there.pop(key, None)

    def scan(self) -> Iterator[Stored]:
        """See `Tier.scan`."""
        with self._lock:
            records = [entry.record for entry in self._there.values()]
        return iter([Stored(one.key, len(one.head), one.body.numel()) for one in records])

    def usage(self) -> Usage:
        """See `Tier.usage`."""
        stored = list(self.scan())
        return Usage(len(stored), sum(one.head_bytes + one.body_bytes for one in stored), None)

    def close(self) -> None:
        """Nothing: staging is another's."""
