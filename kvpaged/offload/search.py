"""How far the tiers go on where the pool ends."""

from collections.abc import Sequence
from typing import NamedTuple

from kvpaged.keys import TOKEN_BYTES
from kvpaged.offload.arrivals import Wanted
from kvpaged.offload.policy import Line, choose
from kvpaged.offload.pool import PoolView
from kvpaged.offload.stack import Stack
from kvpaged.pages.trail import Match, Node, Trail
from kvpaged.tiers.record import record_key

AGAIN = 16
"""Times that computing was quicker after which a load is made all the same: a tier that was slow
may be quick again, and who never loads does not learn of it.
"""


class Offer(NamedTuple):
    """What a sequence could begin with, if pages of tiers were loaded.

    Attributes:
        nodes: pages that are in the pool, in order.
        pages: logical pages in all.
        tokens: of the sequence that they hold.
        firsts: of each group, the first logical page that is needed.
        wanted: what is to be loaded, by ascending places.
        load_s: what that should take; `None`: not known.
    """

    nodes: list[Node]
    pages: int
    tokens: int
    firsts: tuple[int, ...]
    wanted: list[Wanted]
    load_s: float | None


class Search:
    """Looks sequences up in tiers, whose directory is in memory. The cache's lock is held."""

    def __init__(self, pool: PoolView, stack: Stack, compute: Line) -> None:
        self._pool, self._stack, self._compute = pool, stack, compute
        self._refused = 0
        self.declined = 0
        """Pages that were in a tier and quicker to compute."""
        windows = pool.index.windows
        self._whole = [g for g, window in enumerate(windows) if window is None] or [0]
        self._windowed = [(g, w) for g, w in enumerate(windows) if w is not None]

    def look(self, trail: Trail, match: Match, tokens: bytes, limit: int) -> Offer | None:
        """What tiers could add to what was found in the pool.

        Args:
            trail, match: of the sequence, and what the pool has of it.
            tokens: the sequence, encoded.
            limit: tokens it may begin with, at most.

        Returns:
            `None` if that is nothing, or computing it is quicker.
        """
        size = self._pool.index.page_size
        held, limit = match.tokens // size, self._pool.index.usable(limit)
        full = min(len(tokens) // (size * TOKEN_BYTES), -(-limit // size))
        if match.longest(limit) >= min(full * size, limit):
            return None
        with self._stack.lock:
            self._stack.directory.settle()
            up = self._stack.up()
            nodes = match.nodes[:held]
            keys = [node.key for node in nodes]
            found: list[list[tuple[int, int]]] = []
            for key in trail.page_keys(tokens[: full * size * TOKEN_BYTES], size, nodes):
                here = [self._stack.where(record_key(key, group), up) for group in self._whole]
                if any(one is None for one in here):
                    break
                keys.append(key)
                found.append([one for one in here if one is not None])
            sizes = [(max(n for n, _ in one), sum(size for _, size in one)) for one in found]
            choice = choose(sizes, self._stack.loads, self._compute, size)
            if choice.pages < len(sizes):
                self._refused += 1
                if self._refused % AGAIN == 0:
                    choice = choice._replace(pages=len(sizes))
            self.declined += len(sizes) - choice.pages
            pages = self._fitting(held + choice.pages, nodes, keys, up)
            if min(pages * size, limit) <= match.longest(limit):
                return None
            return self._offer(nodes, keys, pages, tokens, limit, up)

    def below(self, trail: Trail, match: Match, tokens: bytes) -> list[bytes]:
        """Keys of the records that go on from what was found in the pool and are not in the first
        tier, to be brought there ahead of their use.
        """
        size = self._pool.index.page_size
        nodes = match.nodes[: match.tokens // size]
        found: list[bytes] = []
        with self._stack.lock:
            up = self._stack.levels_up()
            if len(self._stack.levels) < 2 or not self._stack.workers[0].takes:
                return []
            for key in trail.page_keys(tokens, size, nodes):
                places = {
                    record_key(key, group): self._stack.where(record_key(key, group), up)
                    for group in range(len(self._pool.classes))
                }
                if all(at is None for at in places.values()):
                    break
                found += [name for name, at in places.items() if at is not None and at[0]]
        return found

    def _has(
        self, group: int, place: int, nodes: Sequence[Node], keys: Sequence[bytes],
        up: Sequence[bool],
    ) -> bool:  # fmt: skip
        if place < len(nodes) and nodes[place].pages[group] is not None:
            return True
        return self._stack.where(record_key(keys[place], group), up) is not None

    def _first(self, window: int, pages: int) -> int:
        size = self._pool.index.page_size
        return max(pages * size - window + 1, 0) // size

    def _fitting(
        self, pages: int, nodes: Sequence[Node], keys: Sequence[bytes], up: Sequence[bool]
    ) -> int:
        """The most pages, at most `pages`, whose groups with a window have what is seen next."""
        for group, window in self._windowed:
            place = pages - 1
            while place >= self._first(window, pages) and pages:
                if not self._has(group, place, nodes, keys, up):
                    pages = place
                place -= 1
        if not self._windowed or all(
            self._has(group, place, nodes, keys, up)
            for group, window in self._windowed
            for place in range(self._first(window, pages), pages)
        ):
            return pages
        return self._fitting(pages, nodes, keys, up)

    def _offer(
        self, nodes: list[Node], keys: list[bytes], pages: int, tokens: bytes, limit: int,
        up: Sequence[bool],
    ) -> Offer:  # fmt: skip
        size, width = self._pool.index.page_size, self._pool.index.page_size * TOKEN_BYTES
        windows = self._pool.index.windows
        firsts = tuple(0 if w is None else self._first(w, pages) for w in windows)
        wanted: list[Wanted] = []
        for place in range(pages):
            for group, first in enumerate(firsts):
                if place < first or (place < len(nodes) and nodes[place].pages[group] is not None):
                    continue
                at = self._stack.where(record_key(keys[place], group), up)
                assert at is not None
                self._stack.directory.touch(at[0], record_key(keys[place], group))  # not to go down
                text = tokens[place * width : (place + 1) * width]
                wanted.append(Wanted(place, group, keys[place], text, *at))
        amounts: dict[int, int] = {}
        for one in wanted:
            amounts[one.tier] = amounts.get(one.tier, 0) + one.size
        parts = [self._stack.loads[tier].at(amount) for tier, amount in amounts.items()]
        known = [part for part in parts if part is not None]
        load_s = sum(known) if len(known) == len(parts) else None
        return Offer(nodes, pages, min(pages * size, limit), firsts, wanted, load_s)
