"""Records in host memory."""

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from types import TracebackType

from torch import Tensor

from kvpaged.config import parse_bytes
from kvpaged.errors import IntegrityError
from kvpaged.tiers.arena import Arena, rounded
from kvpaged.tiers.base import KEPT, Demotion, Record, Stored, Tier, Usage, check_records

Key = bytes


class _Slot:
    """A record's place: its body's bytes, its head, how many contexts read it, and what it takes of
    the tier's bytes.
    """

    __slots__ = ("body", "cost", "gone", "head", "offset", "pins", "size")

    def __init__(self, offset: int, size: int, head: bytes) -> None:
        self.offset, self.size, self.head = offset, size, head
        self.pins = 0
        self.gone = False
        self.cost = rounded(size) + len(head)
        self.body: Tensor | None = None


class HostTier(Tier):
    """Records in one memory of fixed size, least recently used given up first.

    Bodies begin at multiples of 256 bytes. They and the heads, which are Python's, together take no
    more than `bytes`. Records that are put together lie side by side as far as there is such room,
    so that a GPU can copy them by one call. What is not read by any context, and whose key does not
    begin with `KEPT`, is given up when a put needs room, but not for another record of that put:
    the tail of a batch that is too large is refused.

    Any thread may call.

    Args:
        bytes: of everything, an int or text like `"8GiB"`.
        policy: see `Tier`.
        pin: see `Arena`.

    Invariants:
        1. A key is in `_used` (least recently put or read first) or in `_kept`, not in both.
        2. Every slot that is there, and every one that was deleted while it was read, has its piece
           of the arena, and `_taken` is the sum of their costs.
    """

    name = "host"

    def __init__(
        self, bytes: int | str, *, policy: Demotion = "write-back", pin: bool = True
    ) -> None:
        super().__init__()
        self.policy = policy
        self.capacity = parse_bytes(bytes)
        self.arena = Arena(self.capacity, pin=pin)
        self._lock = threading.Lock()
        self._used: OrderedDict[Key, _Slot] = OrderedDict()
        self._kept: dict[Key, _Slot] = {}
        self._left: set[_Slot] = set()
        self._taken = 0
        self._bytes = 0
        self._start = self.arena.memory.data_ptr()

    # -- putting -----------------------------------------------------------------------------------

    def put(self, records: Sequence[Record]) -> list[bool]:
        """See `Tier.put`."""
        check_records(records)
        with self._lock:
            self.arena.check_open()
            coming, held = self._admit(records)
        try:
            self._fill([(records[number], slot) for number, slot in coming])
        except BaseException:
            with self._lock:
                for _, slot in coming:
                    self._let_go(slot)
                self._release(held)
            raise
        with self._lock:
            for number, slot in coming:
                self._publish(records[number].key, slot)
            used, kept = self._used, self._kept
            there = [record.key in used or record.key in kept for record in records]
            self._release(held)
        return there

    def _admit(self, records: Sequence[Record]) -> tuple[list[tuple[int, _Slot]], list[_Slot]]:
        """Places for those that are new and have room; what is there already, which is held."""
        held: list[_Slot] = []
        new: dict[Key, int] = {}
        for number, record in enumerate(records):
            slot = self._find(record.key)
            if slot is None:
                new.setdefault(record.key, number)
            else:
                self._touch(record.key)
                slot.pins += 1
                held.append(slot)
        coming: list[tuple[int, _Slot]] = []
        self._place(self._make_room([(n, records[n]) for n in new.values()]), coming)
        return coming, held

    def _make_room(self, coming: list[tuple[int, Record]]) -> list[tuple[int, Record]]:
        """Give up what it takes; those that there is room for, the first of them if not all."""
        costs = [rounded(record.body.numel()) + len(record.head) for _, record in coming]
        wanted = sum(cost for cost in costs if cost <= self.capacity)
        free = room = self.capacity - self._taken
        going = []
        for key, slot in self._used.items():
            if room >= wanted:
                break
            if not slot.pins:
                room += slot.cost
                going.append((key, slot.cost))
        chosen, need = [], 0
        for one, cost in zip(coming, costs, strict=True):
            if need + cost <= room:
                need += cost
                chosen.append(one)
        for key, cost in going:  # not all of them, where some that came do not fit
            if free >= need:
                break
            self._drop(key)
            free += cost
        return chosen

    def _drop(self, key: Key) -> None:
        self._remove(key)
        self.gone.append(key)

    def _place(self, some: list[tuple[int, Record]], coming: list[tuple[int, _Slot]]) -> None:
        """Pieces of the arena for records: one for all of them, or else for each half."""
        size = sum(rounded(record.body.numel()) for _, record in some)
        offset = self.arena.alloc(size) if size else 0
        if offset is None and len(some) > 1:
            half = len(some) // 2
            self._place(some[:half], coming)
            self._place(some[half:], coming)
            return
        while offset is None:  # there are bytes enough, but no hole is as large
            key = next((key for key, slot in self._used.items() if not slot.pins), None)
            if key is None:
                return
            self._drop(key)
            offset = self.arena.alloc(size)
        for number, record in some:
            slot = _Slot(offset, record.body.numel(), Key(record.head))
            offset += rounded(slot.size)
            self._taken += slot.cost
            slot.pins = 1
            self._left.add(slot)
            coming.append((number, slot))

    def _fill(self, coming: list[tuple[Record, _Slot]]) -> None:
        """Copy bodies to their places, adjacent ones that go to adjacent places by one call."""
        target = source = size = 0
        keep = []  # what was made contiguous, until it is copied
        for record, slot in coming:
            body = record.body
            if not body.is_contiguous():
                body = body.contiguous()
                keep.append(body)
            to, come = self._start + slot.offset, body.data_ptr()
            if to == target + size and come == source + size:
                size += slot.size
                continue
            if size:
                ctypes.memmove(target, source, size)
            target, source, size = to, come, slot.size
        if size:
            ctypes.memmove(target, source, size)

    def _publish(self, key: Key, slot: _Slot) -> None:
        if self._find(key) is not None:  # another thread was faster
            self._let_go(slot)
            return
        self._left.discard(slot)
        slot.pins = 0
        self._bytes += slot.size + len(slot.head)
        (self._kept if key.startswith(KEPT) else self._used)[key] = slot

    # -- slots -------------------------------------------------------------------------------------

    def _find(self, key: Key) -> _Slot | None:
        slot = self._used.get(key)
        return self._kept.get(key) if slot is None else slot

    def _touch(self, key: Key) -> None:
        if key in self._used:
            self._used.move_to_end(key)

    def _remove(self, key: Key) -> None:
        slot = self._used.pop(key, None) or self._kept.pop(key, None)
        if slot is None:
            return
        self._bytes -= slot.size + len(slot.head)
        slot.gone = True
        if slot.pins:
            self._left.add(slot)
        else:
            self._let_go(slot)

    def _let_go(self, slot: _Slot) -> None:
        """Its bytes are free."""
        self._left.discard(slot)
        self._taken -= slot.cost
        if slot.size:
            self.arena.free(slot.offset, slot.size)

    def _release(self, held: Sequence[_Slot | None]) -> None:
        for slot in held:
            if slot is not None:
                slot.pins -= 1
                if slot.gone and not slot.pins:
                    self._let_go(slot)

    # -- the rest ----------------------------------------------------------------------------------

    def read(self, keys: Sequence[Key], room: Sequence[Tensor]) -> "_Reading":
        """See `Tier.read`: bodies are views of the arena; `room` is not used."""
        return _Reading(self, keys)

    def _begin(self, keys: Sequence[Key]) -> tuple[list[_Slot | None], list[Record | None]]:
        memory = self.arena.memory
        with self._lock:
            self.arena.check_open()
            slots = [self._find(key) for key in keys]
            records: list[Record | None] = []
            for key, slot in zip(keys, slots, strict=True):
                if slot is None:
                    records.append(None)
                    continue
                self._touch(key)
                slot.pins += 1
                if slot.body is None:
                    slot.body = memory[slot.offset : slot.offset + slot.size]
                records.append(Record(key, slot.head, slot.body))
        return slots, records

    def _end(self, slots: Sequence[_Slot | None]) -> None:
        with self._lock:
            self._release(slots)

    def delete(self, keys: Sequence[Key]) -> None:
        """See `Tier.delete`. The bytes of one that is being read come free when that ends."""
        with self._lock:
            self.arena.check_open()
            for key in keys:
                self._remove(key)

    def scan(self) -> Iterator[Stored]:
        """See `Tier.scan`: the least recently used first, saved sessions before all."""
        with self._lock:
            self.arena.check_open()
            there = [*self._kept.items(), *self._used.items()]
        return (Stored(key, len(slot.head), slot.size) for key, slot in there)

    def usage(self) -> Usage:
        """See `Tier.usage`."""
        with self._lock:
            return Usage(len(self._used) + len(self._kept), self._bytes, self.capacity)

    def check_integrity(self) -> None:
        """Check the books; raises `IntegrityError`, naming the first thing that is off."""
        with self._lock:
            slots = [*self._used.values(), *self._kept.values()]
            wrong = next((key for key in self._kept if key in self._used), None)
            if wrong is not None:
                raise IntegrityError(f"{wrong.hex()} is kept and is not")
            counted = sum(slot.size + len(slot.head) for slot in slots)
            taken = sum(slot.cost for slot in [*slots, *self._left])
            if (counted, taken) != (self._bytes, self._taken) or taken > self.capacity:
                raise IntegrityError(
                    f"{self._bytes} bytes of records and {self._taken} taken are counted, "
                    f"{counted} and {taken} are there, of {self.capacity}"
                )
            self.arena.check_integrity(
                [(slot.offset, slot.size) for slot in [*slots, *self._left] if slot.size]
            )

    def close(self) -> None:
        """See `Tier.close`."""
        with self._lock:
            self._used.clear()
            self._kept.clear()
            self._bytes = self._taken = 0
            self.arena.close()


class _Reading:
    """The context of a read: a class, for it costs a fifth of what a generator does."""

    __slots__ = ("_keys", "_slots", "_tier")

    def __init__(self, tier: HostTier, keys: Sequence[bytes]) -> None:
        self._tier, self._keys = tier, keys
        self._slots: list[_Slot | None] = []

    def __enter__(self) -> list[Record | None]:
        self._slots, records = self._tier._begin(self._keys)
        return records

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        slots, self._slots = self._slots, []
        self._tier._end(slots)
