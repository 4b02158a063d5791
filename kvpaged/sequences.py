"""Sequences, and the pages of a cache that they hold: their own, and those of the prefix index."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvpaged.books import CacheBooks
from kvpaged.errors import UsageError
from kvpaged.keys import TOKEN_BYTES, encode_known, encode_tokens
from kvpaged.offload.promotion import Promotion
from kvpaged.offload.search import Offer
from kvpaged.pages.allocator import SEALED
from kvpaged.pages.extents import Ids
from kvpaged.pages.trail import Match, Node, Trail
from kvpaged.step import Ints
from kvpaged.tokens import Ids as TokenIds
from kvpaged.tokens import TokenLog

NEVER = 2**62
"""Stands for the settled pages of a row nothing more of which goes into the prefix index."""

NOTHING: TokenIds = np.empty(0, np.int64)


class Sequences:
    """The rows of a batch between steps: their lengths, their pages, their places in the prefix
    index. `Batch` has the invariants.
    """

    def __init__(
        self, cache: CacheBooks, rows: int, trails: Sequence[Trail | None] | None = None
    ) -> None:
        """`trails`: where each row stands in the prefix index (`CacheBooks.trails`); `None`: its
        pages are nobody else's.
        """
        self._cache = cache
        self._trails: list[Trail | None] = [None] * rows if trails is None else list(trails)
        self.settled: Ints = np.array([0 if trail else NEVER for trail in self._trails], np.int64)
        shared = any(self._trails)
        self.private = None if shared else cache.private or "nothing of it is kept for others"
        self._identity = next((trail.identity for trail in self._trails if trail), None)
        self.lengths: Ints = np.zeros(rows, np.int64)
        self.logs = [TokenLog() for _ in range(rows)]
        self.owed: list[TokenIds] = [NOTHING] * rows
        self.closed = False
        self._groups = cache.make_rows(rows)
        # Rows past whose ends slots may hold other than zeros; rows whose last page may be shared
        # or sealed; whether there are any of either.
        self._unclean: npt.NDArray[np.bool_] = np.zeros(rows, bool)
        self._touched: npt.NDArray[np.bool_] = np.zeros(rows, bool)
        self._odd = False
        # Pages go back also when a batch is forgotten: the collector may run anywhere, so it only
        # leaves a note.
        tables = [group.table for group in self._groups]
        self._finalizer = weakref.finalize(self, cache.leave_garbage, tables)
        cache.register(self)

    # -- what it holds -----------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many sequences."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where a step's tokens and positions are: that of the first group."""
        return self._cache.groups[0].device

    @property
    def page_size(self) -> int:
        """Token slots a page."""
        return self._cache.config.page_size

    @property
    def compressed(self) -> bool:
        """Whether full pages of some group are coded, and shared whole."""
        return self._cache.compressed

    def held(self, group: int) -> Ids:
        """Page ids of a group that rows hold, shared pages as often as they are held."""
        held: Ids = self._groups[group].table.all_held()
        return held

    def tokens_held(self, group: int) -> int:
        """Token slots of a group that rows have filled and still hold."""
        size = self._cache.classes[group].geometry.page_size
        return int(np.maximum(self.lengths - self._groups[group].table.first * size, 0).sum())

    def page_map(self, group: int = 0) -> list[Ids]:
        """Page ids of each row in a group, in order of the tokens they hold."""
        return [self._groups[group].table.held(row).copy() for row in range(self.rows)]

    def pages(self) -> int:
        """Pages held, over all groups, shared ones once."""
        return sum(len(np.unique(self.held(group))) for group in range(len(self._groups)))

    def memory_bytes(self) -> int:
        """Bytes of those pages."""
        classes = self._cache.classes
        return sum(
            classes[group].bytes_held(np.unique(self.held(group))) for group in range(len(classes))
        )

    # -- the prefix index --------------------------------------------------------------------------

    def find(self, row: int, ids: TokenIds, limit: int) -> Match | None:
        """What is in memory of the first `limit` of a row's tokens `ids`; the lock is held."""
        trail = self._trails[row]
        if trail is None or limit <= 0:
            return None
        return self._cache.index.find(trail, encode_tokens(ids), limit)

    def attach(self, row: int, match: Match, ids: TokenIds) -> None:
        """Let an empty row begin with the pages of its tokens `ids`, which `match` allows; the lock
        is held.

        The last page may hold other tokens after those: the step that writes to it copies it first.
        """
        length = len(ids)
        size = self._cache.config.page_size
        nodes = match.nodes[: -(-length // size)]
        for number, group in enumerate(self._groups):
            first = match.first_page(number, length)
            for _ in range(self._cache.spare):  # room to rewind as a row has that left its window
                if first and nodes[first - 1].pages[number] is not None:
                    first -= 1
            pages = [node.pages[number] for node in nodes[first:]]
            group.attach(row, first, np.array(pages, np.int32))
        trail = self._trails[row]
        assert trail is not None
        full = length // size
        if full:
            trail.node = nodes[full - 1]
        self._note_used(nodes[:full])
        self.settled[row] = full
        self.lengths[row] = length
        self.logs[row].extend(ids)
        self._mark(row)

    def _note_used(self, nodes: list[Node]) -> None:
        """A row begins with these pages: some tiers take what is used a second time."""
        if self._cache.mover is not None:
            self._cache.mover.demoter.note_used(nodes)

    def begin_loading(self, row: int, match: Match, ids: TokenIds, limit: int) -> Promotion | None:
        """Let an empty row begin with pages of its tokens `ids` that are in the pool and others
        that tiers have, if that is quicker than computing them; the lock is held.

        The row then holds `lengths[row]` tokens, at most `limit`, whose bytes come once the
        promotion is started: then pages before `first + outcome.pages` of the promotion may be
        entered, none if `outcome.pages` is 0. `None`: nothing is to be loaded, or there is no room
        for it; the row is empty.
        """
        mover, trail = self._cache.mover, self._trails[row]
        if mover is None or trail is None:
            return None
        offer = mover.search.look(trail, match, encode_tokens(ids), limit)
        taken = None if offer is None else self._take_loading(offer)
        if offer is None or taken is None:
            return None
        homes: dict[tuple[int, int], int] = {}
        for number, (group, pages) in enumerate(zip(self._groups, taken, strict=True)):
            first = offer.firsts[number]
            group.begin(row, first, pages)
            homes.update({(number, first + n): page for n, page in enumerate(pages.tolist())})
        # Pages that the pool has only in part are entered again, for the groups that lacked them.
        held = min(len(offer.nodes), offer.wanted[0].place)
        while held and not offer.nodes[held - 1].reachable():  # evicted for what is coming:
            held -= 1  # before what windows see a row holds nothing
        if held:
            trail.node = offer.nodes[held - 1]
        self._note_used(offer.nodes[:held])
        self.settled[row] = held
        self.lengths[row] = offer.tokens
        self.logs[row].extend(ids[: offer.tokens])
        self._mark(row)
        wanted = [one._replace(page=homes[one.group, one.place]) for one in offer.wanted]
        return mover.promote(wanted, offer.load_s)

    def _take_loading(self, offer: Offer) -> list[Ids] | None:
        """The pages of each group for an offer: those of the pool shared, others taken; `None`, and
        nothing changed, where there is no room.
        """
        taken: list[Ids] = []
        known: list[list[int | None]] = []
        for number, group in enumerate(self._groups):
            places = range(offer.firsts[number], offer.pages)
            nodes = [offer.nodes[n] if n < len(offer.nodes) else None for n in places]
            known.append([None if node is None else node.pages[number] for node in nodes])
            group.page_class.allocator.share(_ids_of(known[-1]))  # before anything is evicted
        for number, (group, pages) in enumerate(zip(self._groups, known, strict=True)):
            ids = group.take_loading(pages, offer.firsts[number])
            if ids is None:
                self._give_up(taken, known[len(taken) :])
                return None
            taken.append(ids)
        for one in offer.wanted:
            page = taken[one.group][one.place - offer.firsts[one.group]]
            self._groups[one.group].page_class.allocator.states[page] = SEALED
        return taken

    def _give_up(self, taken: list[Ids], known: list[list[int | None]]) -> None:
        """Let go of what was taken for the first groups, and of what is shared for the others."""
        held = [*taken, *map(_ids_of, known)]
        for group, ids in zip(self._groups, held, strict=True):
            group.page_class.allocator.release(ids)

    def empty(self, row: int) -> None:
        """Let go of everything a row holds, so that it can begin again; the lock is held."""
        for group in self._groups:
            group.drop_row(row)
        trail = self._trails[row]
        if trail is not None:
            trail.node = trail.root
            self.settled[row] = 0
        self.lengths[row] = 0
        self.logs[row] = TokenLog()

    def publish(self) -> None:
        """Put full pages whose tokens are known into the prefix index, give up pages that are there
        already for theirs, and give back what has left a window.
        """
        self.enter_pages(self.due())
        self.leave_windows()

    def due(self) -> list[tuple[int, int]]:
        """Rows with full pages that are to go into the prefix index, and how many full pages each
        has; those may be entered later too, for the namespace has just been looked at.
        """
        full = self.lengths // self._cache.config.page_size
        rows = np.flatnonzero(full > self.settled)
        if not len(rows) or self._cache.closed:
            return []
        if not self._cache.is_identity(self._identity):
            self.keep_private("the model or the namespace has changed since it began")
            return []
        return list(zip(rows.tolist(), full[rows].tolist(), strict=True))

    def enter_pages(self, due: Sequence[tuple[int, int]]) -> None:
        """Put pages into the prefix index: of each row those before the page named."""
        if not due:
            return
        with self._cache.lock:
            if self._cache.closed:
                return
            for row, full in due:
                self._publish_row(row, full)

    def leave_windows(self) -> None:
        """Give back pages that no later query sees."""
        if all(group.window is None for group in self._groups):
            return
        with self._cache.lock:
            if not self._cache.closed:
                for group in self._groups:
                    group.leave_window(self.lengths, self.settled)

    def _publish_row(self, row: int, full: int) -> None:
        size, begun = self._cache.config.page_size, int(self.settled[row])
        trail, ids = self._trails[row], self._known_ids(row, begun * size)
        if trail is None or ids is None:
            self.private = self.private or "a forward pass came without token ids, or out of place"
            self._lose_trail(row)
            return
        full = min(full, int(self.lengths[row]) // size, begun + len(ids) // size)
        encoded, width = encode_known(ids[: (full - begun) * size]), size * TOKEN_BYTES
        for place in range(begun, full):
            tokens = encoded[(place - begun) * width : (place - begun + 1) * width]
            pages = [group.page_at(row, place) for group in self._groups]
            node = self._cache.index.enter(trail, tokens, pages)
            if node is None:
                self._lose_trail(row)
                return
            for group, mine, theirs in zip(self._groups, pages, node.pages, strict=True):
                if mine is not None and theirs is not None and mine != theirs:
                    group.swap(row, place, theirs)
            self.settled[row] = place + 1

    def whole(self) -> Ints:
        """Tokens of each row, those it owes included."""
        return self.lengths + np.array([len(ids) for ids in self.owed], np.int64)

    def owes(self) -> bool:
        """Whether a row has tokens that are to be computed again."""
        return any(ids.size for ids in self.owed)

    def _known_ids(self, row: int, start: int) -> TokenIds | None:
        """A row's token ids from place `start` on, or `None` if some are not known."""
        ids = self.logs[row].ids
        return None if ids is None else ids[start:]

    def trail_of(self, row: int) -> Trail | None:
        """Where a row stands in the prefix index; `None`: nothing of it goes there."""
        return self._trails[row]

    def is_of(self, cache: object) -> bool:
        """Whether its pages are those of a cache."""
        return self._cache is cache

    def is_current(self) -> bool:
        """Whether what makes its pages valid is as it was when it began."""
        return self.private is not None or self._cache.is_identity(self._identity)

    def watch(self) -> bool:
        """The same, where it may change between any two passes; cheap where it can't."""
        return self._cache.watch(self._identity)

    def keep_private(self, why: str) -> None:
        """Put nothing more of it into the prefix index; what is there stays."""
        self.private = why
        for row in range(self.rows):
            self._lose_trail(row)

    def _lose_trail(self, row: int) -> None:
        self._trails[row] = None
        self.settled[row] = NEVER

    def check_open(self) -> None:
        """Raise `UsageError` if this batch or its cache is closed."""
        if self.closed or self._cache.closed:
            raise UsageError(f"the {'cache' if self._cache.closed else 'batch'} is closed")

    # -- inside ------------------------------------------------------------------------------------

    def _mark(self, rows: Any, *, unclean: bool = True) -> None:
        """Have the next step look at these rows' last pages (an index of any kind): whether others
        hold them too, and at what is behind the rows' ends.
        """
        self._touched[rows] = self._odd = True
        if unclean:
            self._unclean[rows] = True


def _ids_of(pages: Sequence[int | None]) -> Ids:
    return np.array([page for page in pages if page is not None], np.int32)
