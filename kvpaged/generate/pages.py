"""How many pages requests take, and how many there are."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvpaged.books import CacheBooks
from kvpaged.config import format_bytes
from kvpaged.errors import OutOfPagesError
from kvpaged.generate.requests import Reply
from kvpaged.generate.scheduler import Prospect
from kvpaged.keys import Salt, encode_salt, encode_tokens
from kvpaged.pages.allocator import SEALED
from kvpaged.pages.trail import Trail
from kvpaged.slot_batch import SlotBatch

Ints = npt.NDArray[np.int64]


class PageNeeds:
    """Pages of a cache, as admission counts them: in each layer group."""

    def __init__(self, cache: CacheBooks) -> None:
        self._cache = cache
        self.page_size = cache.config.page_size

    @property
    def has_tiers(self) -> bool:
        """Whether there is anything below the pool."""
        return self._cache.mover is not None

    def note_pass(self, tokens: int, seconds: float) -> None:
        """See `CacheBooks.note_pass`."""
        self._cache.note_pass(tokens, seconds)

    def chain(self, ids: Ints, salt: Salt) -> tuple[int, ...]:
        """Numbers that stand for the beginnings of `ids` by whole pages: equal for equal ones."""
        if self._cache.private is not None:
            return ()
        tokens = encode_tokens(ids[:-1])
        width = 4 * self.page_size
        numbers, before = [], hash(encode_salt(salt))
        for start in range(0, len(tokens) - width + 1, width):
            before = hash((before, tokens[start : start + width]))
            numbers.append(before)
        return tuple(numbers)

    def pages(self, group: int, tokens: int, chunk: int) -> int:
        """The most pages a sequence of `tokens` holds in a group while it is computed by `chunk`
        tokens a step.
        """
        whole = -(-tokens // self.page_size)
        window = self._cache.groups[group].window
        if window is None:
            return whole
        return min(whole, -(-(window + chunk) // self.page_size) + 1 + self._cache.spare)

    def _cost(self, group: int, tokens: int, chunk: int) -> int:
        """The same in the units that a group is counted in."""
        return self._cache.classes[group].cost(self.pages(group, tokens, chunk))

    def trails(self, replies: Sequence[Reply]) -> list[Trail | None]:
        """Where waiting replies begin in the prefix index, by a look at what its pages are valid
        for.
        """
        if not replies:
            return []
        return self._cache.trails(len(replies), [reply.request.salt for reply in replies])

    def ahead(self, reply: Reply, trail: Trail | None) -> None:
        """Have what lower tiers have of a waiting reply come up to the first."""
        cache, mover = self._cache, self._cache.mover
        if mover is None or trail is None or len(reply.ids) <= self.page_size:
            return
        tokens = encode_tokens(reply.ids)
        with cache.lock:
            match = cache.index.find(trail, tokens, len(reply.ids) - 1)
            mover.demoter.note_ahead(mover.search.below(trail, match, tokens))

    def prospect(self, reply: Reply, trail: Trail | None, slots: int, chunk: int) -> Prospect:
        """What `scheduler.admit` asks of a waiting reply that takes `slots` rows."""
        cache, ids = self._cache, reply.ids
        held = [0] * len(cache.groups)
        found = 0
        if trail is not None and len(ids) > 1:
            with cache.lock:
                match = cache.index.find(trail, encode_tokens(ids), len(ids) - 1)
                found = match.longest(len(ids) - 1) // self.page_size
                for group in range(len(held)):
                    states = cache.classes[group].allocator.states
                    pages = [node.pages[group] for node in match.nodes[:found]]
                    first = match.first_page(group, found * self.page_size)
                    held[group] = sum(
                        page is not None and states[page] == SEALED for page in pages[first:]
                    )
        need = tuple(
            max(self._cost(group, len(ids) + 1, chunk) - held[group], 0)
            + (slots - 1) * cache.classes[group].open_cost
            for group in range(len(held))
        )
        return Prospect(found, need)

    def room(self, batch: SlotBatch, running: Ints, prefilling: npt.NDArray[np.bool_]) -> list[int]:
        """Units of each group that are available, less what running prompts have still to take and
        an open page for each that runs (at most a sixteenth of all).
        """
        left = []
        prompts = np.flatnonzero(prefilling)
        with self._cache.lock:
            self._cache.collect_garbage()
            for group, held in enumerate(batch.pages_held()):
                pages = self._cache.classes[group]
                need = -(-(batch.known[prompts] + 1) // self.page_size)
                promised = int(np.maximum(need - held[prompts], 0).sum())
                if self._cache.groups[group].window is not None:
                    promised = min(promised, len(prompts))
                kept = min(len(running) * pages.open_cost, pages.units() // 16)
                left.append(pages.available_units() - promised - kept)
        return left

    def excess(self, reply: Reply, chunk: int) -> OutOfPagesError | None:
        """Why a request could not run in the pool if it were alone, if so; computed by `chunk`
        tokens a step.
        """
        tokens = len(reply.ids) + 1
        needs = [self._cost(group, tokens, chunk) for group in range(len(self._cache.classes))]
        sizes = [pages.units() for pages in self._cache.classes]
        lacks = [
            (need - size, group)
            for group, (need, size) in enumerate(zip(needs, sizes, strict=True))
        ]
        missing, group = max(lacks, default=(0, 0))
        if missing <= 0:
            return None
        return self._error(tokens, needs[group], sizes[group], group)

    def most_replies(self, reply: Reply, chunk: int) -> int:
        """How many replies to one prompt the pool could hold at once, each with a page of its own,
        at least 1.
        """
        tokens = len(reply.ids) + 1
        rooms = [
            (pages.units() - self._cost(group, tokens, chunk)) // pages.open_cost
            for group, pages in enumerate(self._cache.classes)
        ]
        return max(min(rooms) + 1, 1)

    def shortage(self, reply: Reply) -> OutOfPagesError:
        """Why a request can't run though nothing else does."""
        tokens = len(reply.ids) + 1
        lacks = []
        for group, page_class in enumerate(self._cache.classes):
            need, available = self._cost(group, tokens, tokens), page_class.available_units()
            lacks.append((need - available, need, available, group))
        _, need, available, group = max(lacks)
        return self._error(tokens, need, available, group)

    def _error(self, tokens: int, need: int, available: int, group: int) -> OutOfPagesError:
        page_class = self._cache.classes[group]
        capacity, missing = page_class.units(), need - available
        others = f", others hold {capacity - available}" if capacity > available else ""
        return OutOfPagesError(
            f"a request of {tokens - 1} tokens needs {need} pages of {self.page_size} tokens to "
            f"begin its reply and {available} are there: {missing} pages or "
            f"{format_bytes(missing * page_class.unit_bytes)} too few (the pool has "
            f"{capacity}{others})",
            needed=need,
            available=available,
        )
