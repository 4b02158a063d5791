"""What a promotion asks tiers for, where they read it to, and what came."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import numpy as np
from torch import Tensor

from kvpaged.offload.copies import Sums
from kvpaged.offload.staging import Staging
from kvpaged.pages.extents import Ids
from kvpaged.tiers.base import Record
from kvpaged.tiers.record import Head


class Wanted(NamedTuple):
    """A page to load.

    Attributes:
        place: its place in its sequence.
        group: the layer group.
        key, tokens: its page key, and its encoded tokens.
        tier, size: who has it, and the bytes it takes there.
        page: where it is to go.
    """

    place: int
    group: int
    key: bytes
    tokens: bytes
    tier: int
    size: int
    page: int = -1


class Rooms(Sequence[Tensor]):
    """Staging for the records of a call, taken when a tier first asks for it: those of a group side
    by side.
    """

    def __init__(self, staging: Staging, sizes: Sequence[int], timeout: float) -> None:
        self._staging, self._sizes, self._timeout = staging, sizes, timeout
        self._rooms: list[Tensor] | None = None
        self.short = False
        """There was none: no fault of the tier, whatever it raises then."""
        self.give_back: Callable[[], None] = _nothing

    def _take(self) -> list[Tensor]:
        taken = self._staging.take(1, sum(self._sizes), self._timeout)
        if taken is None:
            self.short = True
            raise MemoryError(f"no {sum(self._sizes):,} bytes of staging in {self._timeout:g} s")
        room, self.give_back = taken
        return list(room[0].split(list(self._sizes)))

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        if self._rooms is None:
            self._rooms = self._take()
        return self._rooms[place]

    def __len__(self) -> int:
        return len(self._sizes)


class Bundle(NamedTuple):
    """Records of a group that lie at one stride, and the pages they go to."""

    group: int
    bodies: Tensor
    sums: Sums
    ids: Ids


def _nothing() -> None:
    """Nothing is to be given back."""


def bundles(group: int, call: list[Wanted], found: list[Record | None]) -> list[Bundle]:
    """The records of a group, those at one stride from each other together."""
    mine = [
        (one, record) for one, record in zip(call, found, strict=False)
        if one.group == group and record is not None
    ]  # fmt: skip
    found_bundles: list[Bundle] = []
    start = 0
    while start < len(mine):
        stop, stride = start + 1, 0
        base = mine[start][1].body
        while stop < len(mine):
            body, before = mine[stop][1].body, mine[stop - 1][1].body
            step = body.data_ptr() - before.data_ptr()
            same = body.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
            alike = body.numel() == base.numel()
            if not (same and alike) or step < base.numel() or (stride and step != stride):
                break
            stride, stop = step, stop + 1
        some = mine[start:stop]
        size = base.numel()
        bodies = base.as_strided((len(some), size), (stride or size, 1), base.storage_offset())
        sums = np.stack([Head.decode(record.head).sums for _, record in some])
        ids = np.array([one.page for one, _ in some], np.int32)
        found_bundles.append(Bundle(group, bodies, sums, ids))
        start = stop
    return found_bundles
