"""What each tier holds, known without asking it."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from kvpaged.tiers.base import Tier


class Directory:
    """The keys of each tier of a stack, those used longest ago first, as its `put`, `delete`,
    `gone` and `scan` tell. Used under its owner's lock.
    """

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self._tiers = tuple(tiers)
        self.held: tuple[OrderedDict[bytes, int], ...] = tuple(OrderedDict() for _ in tiers)
        """Of each tier: bytes of the records, by key."""
        self.bytes = [0] * len(self._tiers)

    def add(self, tier: int, key: bytes, size: int) -> None:
        """A tier has taken a record, or is found to have it."""
        held = self.held[tier]
        self.bytes[tier] += size - held.get(key, 0)
        held[key] = size
        held.move_to_end(key)

    def remove(self, tier: int, keys: Iterable[bytes]) -> None:
        """A tier has these no longer."""
        for key in keys:
            self.bytes[tier] -= self.held[tier].pop(key, 0)

    def settle(self) -> None:
        """Take out what tiers have given up by themselves."""
        for number, tier in enumerate(self._tiers):
            while tier.gone:
                self.remove(number, [tier.gone.popleft()])

    def where(self, key: bytes, allowed: Sequence[bool]) -> int | None:
        """The first tier, of those allowed, that has a key."""
        for number, held in enumerate(self.held):
            if allowed[number] and key in held:
                return number
        return None

    def touch(self, tier: int, key: bytes) -> None:
        """A record was used."""
        if key in self.held[tier]:
            self.held[tier].move_to_end(key)

    def missing_below(self, tier: int, most: int) -> Iterator[bytes]:
        """Of the `most` keys of a tier used longest ago, those that the next one lacks."""
        below = self.held[tier + 1]
        for key, _ in zip(self.held[tier], range(most), strict=False):
            if key not in below:
                yield key
