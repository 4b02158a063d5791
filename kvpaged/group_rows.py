"""The pages that the rows of a batch hold in one layer group."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpaged.config import Backend
from kvpaged.errors import OutOfPagesError, UsageError
from kvpaged.pages.allocator import SEALED
from kvpaged.pages.classops import clear_pages, clear_tail, copy_pages, keep_checksums
from kvpaged.pages.extents import Ids
from kvpaged.pages.mixed import AnyClass
from kvpaged.pages.pool import PageClass
from kvpaged.pages.table import BlockTable, Successor
from kvpaged_kernels.checks import MAX_DECODE_QUERIES

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
"""One for each row."""


class Copy(NamedTuple):
    """A row whose last page takes new tokens and is shared: page `new` takes the place of `old`."""

    row: int
    place: int
    old: int
    new: int


class Growing(NamedTuple):
    """What a row takes for a step where full pages are compressed (`MixedRows`).

    Attributes:
        row: which.
        compressed: of each new page in order, whether it is a compressed one.
        closes: the place of its open page, if a compressed one is to follow that.
        coded: see `Successor`.
    """

    row: int
    compressed: list[bool]
    closes: int | None
    coded: bool


class Needs(NamedTuple):
    """What a step has to take: copies of last pages (row, place, page), new ones (row, count), or
    what rows grow by (`MixedRows`).
    """

    copies: list[tuple[int, int, int]]
    new: list[tuple[int, int]]
    growing: Sequence[Growing] = ()

    def pages(self) -> int:
        """How many pages that is."""
        return len(self.copies) + sum(count for _, count in self.new)


class Growth(NamedTuple):
    """Pages taken for a step, not yet entered anywhere.

    Attributes:
        copies: pages that take the place of shared ones.
        new: row and pages, for tokens beyond those the row has.
        successors: compressed pages for open ones that fill (`MixedRows`).
    """

    copies: list[Copy]
    new: list[tuple[int, Ids]]
    successors: Sequence[Successor] = ()


class GroupRows:
    """Which pages rows hold in one group, and what a step does to them.

    Used by its batch alone. The cache's lock is held around what takes or gives back pages: all but
    `fill`, `clear` and `sum_sealed`, which touch bytes of pages that only this batch can change.
    Lengths are tokens a row, int64 `[rows]`.
    """

    def __init__(
        self,
        page_class: AnyClass,
        rows: int,
        device: torch.device,
        window: int | None,
        backend: Backend,
    ) -> None:
        self.page_class: AnyClass = page_class
        self.exact: PageClass = page_class.exact
        self.window = window
        self.backend = backend
        self.table = BlockTable(rows, device=device)
        self.page_size = self._size = page_class.geometry.page_size
        self.few = 1 if backend == "cpu" else MAX_DECODE_QUERIES
        """New tokens of a row up to which decode serves it."""

    # -- a step's pages ----------------------------------------------------------------------------

    def needs(
        self, lengths: Ints, counts: Ints, touched: Flags | None, single: Flags | None = None
    ) -> Needs:
        """What `counts` new tokens a row need; nothing changes.

        `touched`: rows whose last page may be shared, or sealed; `None`: no row. `single`: rows of
        one new token that are served by decode; `None`: all (`MixedRows`).

        Raises:
            OutOfPagesError: more than could be had, with all that nobody holds evicted.
        """
        needs = Needs(self._copies(lengths, counts, touched), self._new(lengths, counts))
        self.page_class.allocator.check_room(needs.pages())
        return needs

    def take(self, needs: Needs) -> Growth:
        """Take those pages; only the allocator changes.

        Raises:
            OutOfPagesError: another group took what this one counted on; nothing is held.
        """
        growth = Growth([], [])
        allocator = self.page_class.allocator
        try:
            for row, place, page in needs.copies:
                before = self.page_at(row, place - 1)  # the copy should continue its run
                growth.copies.append(Copy(row, place, page, int(allocator.alloc(1, before)[0])))
            for row, count in needs.new:
                held = self.table.held(row)
                last = int(held[-1]) if len(held) else None
                growth.new.append((row, allocator.alloc(count, last)))
        except OutOfPagesError:
            self.give_back(growth)
            raise
        return growth

    def give_back(self, growth: Growth) -> None:
        """Undo `take`."""
        for copy in growth.copies:
            self.page_class.allocator.release(np.array([copy.new], np.int32))
        for _, ids in growth.new:
            self.page_class.allocator.release(ids)
        for each in growth.successors:
            self.page_class.allocator.release(np.array([each.page], np.int32))

    def enter(self, growth: Growth, lengths: Ints, counts: Ints, touched: Flags | None) -> None:
        """Put taken pages into the table, and mark open again what takes tokens after a rewind."""
        entries = self.page_class.entries
        for copy in growth.copies:
            entry = entries(np.array([copy.new], np.int32))
            self.table.replace(copy.row, copy.place, copy.new, int(entry[0]))
        if touched is not None:
            rows = self._rows_in_a_page(lengths, counts, touched)
            pages = self.table.pages[rows, lengths[rows] // self._size]
            self.page_class.allocator.reopen(pages)
        for row, ids in growth.new:
            self.table.extend(row, ids, entries(ids))

    def take_each(self, rows: Ints) -> Ids:
        """Take a page for each of some rows, to follow its last; only the allocator changes.

        Raises:
            OutOfPagesError: fewer could be had; nothing is held.
        """
        last = self.table.pages[rows, self.table.count[rows] - 1]
        return self.page_class.allocator.alloc_each(last.tolist())

    def take_successors(self, rows: Ints, lengths: Ints) -> list[Successor]:
        """Take what open pages are to be followed by that one more token a row fills; only the
        allocator changes (`MixedRows`).

        Raises:
            OutOfPagesError: fewer could be had; nothing is held.
        """
        return []

    def enter_successors(self, successors: Sequence[Successor]) -> None:
        """Let rows hold what `take_successors` took."""
        self.table.successors.extend(successors)

    def enter_each(self, rows: Ints, ids: Ids) -> None:
        """Let rows hold what `take_each` took."""
        self.table.append_each(rows, ids, self.page_class.entries(ids))

    def clear(self, ids: Ids) -> None:
        """Zero pages of this batch that are to be partly filled, where `fill` would."""
        if self.backend == "cpu":
            used = ids[self.page_class.allocator.generations[ids] > 0]  # a pool begins as zeros
            if len(used):
                clear_pages(self.exact, used)

    def fill(self, growth: Growth, lengths: Ints, counts: Ints, *, tails: Flags | None) -> None:
        """Copy what is shared, and zero what a step leaves partly filled.

        The CPU path masks slots past a row's end by adding -inf to their scores, which a NaN left
        there by somebody else would survive. `tails`: rows past whose present lengths slots may
        hold what a rewind or a step that did not count left there; `None`: none.
        """
        if growth.copies:
            old, new = (np.array([copy[i] for copy in growth.copies], np.int32) for i in (2, 3))
            copy_pages(self.exact, old, new, backend=self.backend)
        if self.backend != "cpu":
            return
        partly = [ids[-1] for row, ids in growth.new if (lengths[row] + counts[row]) % self._size]
        if partly:
            self.clear(np.array(partly, np.int32))
        if tails is not None:
            for row in self._rows_in_a_page(lengths, counts, tails).tolist():
                place, slot = divmod(int(lengths[row]), self._size)
                clear_tail(self.exact, int(self.table.pages[row, place]), slot)

    def end_copies(self, growth: Growth) -> None:
        """Let go of the pages that copies took the place of."""
        if growth.copies:
            old = np.array([copy.old for copy in growth.copies], np.int32)
            self.page_class.allocator.release(old)

    # -- what a step that counts leaves ------------------------------------------------------------

    def mark_sealed(self, before: Ints, after: Ints) -> Ids:
        """Make the pages that rows have filled between two lengths immutable; returns them."""
        full = []
        for row in np.flatnonzero(after // self._size > before // self._size).tolist():
            first = max(int(before[row]) // self._size, int(self.table.first[row]))
            full.append(self.table.pages[row, first : int(after[row]) // self._size])
        ids = np.concatenate(full) if full else np.empty(0, np.int32)
        self.page_class.allocator.states[ids] = SEALED
        return ids

    def seal_last(self, rows: Ints, lengths: Ints) -> Ids:
        """Make the last pages of some rows, full at these lengths, immutable; returns them."""
        ids: Ids = self.table.pages[rows, lengths[rows] // self._size - 1]
        self.page_class.allocator.states[ids] = SEALED
        return ids

    def sum_sealed(self, ids: Ids) -> None:
        """Keep the checksums of pages just sealed."""
        if ids.size:
            keep_checksums(self.exact, ids, backend=self.backend)

    def end_sealing(self) -> None:
        """Let go of open pages that compressed ones have followed."""

    def leave_window(self, lengths: Ints, settled: Ints) -> None:
        """Give back pages no later query sees, but for one page's worth of rewinding.

        `settled`: logical pages of each row of which it is known whether others may have them, so
        that what leaves goes to those.
        """
        if self.window is None:
            return
        first = np.maximum(lengths - self.window + 1 - self._size, 0) // self._size
        first = np.minimum(first, settled)
        rows = np.flatnonzero(first > self.table.first).tolist()
        self._release([self.table.drop_first(row, int(first[row])) for row in rows])

    # -- rows --------------------------------------------------------------------------------------

    def trim(self, lengths: Ints) -> None:
        """Give back pages beyond the lengths: of a rewind, or of a step that did not count."""
        need = -(-lengths // self._size)
        rows = np.flatnonzero(self.table.count > need).tolist()
        self._release([self.table.cut(row, int(need[row])) for row in rows])

    def drop_row(self, row: int) -> None:
        """Give back all pages of a row."""
        self._release([self.table.cut(row, 0)])

    def select(self, rows: Ints) -> None:
        """Become the rows `rows`, sharing their pages."""
        before = self.table.all_held()
        self.table.select(rows, self.page_class.entries(self.table.pages[rows]))
        self.page_class.allocator.share(self.table.all_held())
        self.page_class.allocator.release(before)

    def rewindable(self, before: Ints, lengths: Ints) -> Ints:
        """Where rows that had `before` tokens can really end, to have no more than `lengths`."""
        return lengths

    def check_rewind(self, before: Ints, lengths: Ints) -> None:
        """Raise `UsageError` if a row shortened to its length would see pages it gave back."""
        if self.window is None:
            return
        first = np.maximum(lengths - self.window + 1, 0) // self._size
        wrong = np.flatnonzero((first < self.table.first) & (lengths < before) & (lengths > 0))
        if wrong.size:
            row = int(wrong[0])
            raise UsageError(
                f"row {row} cannot rewind to {lengths[row]}: a window of {self.window} would see "
                f"tokens from {int(first[row]) * self._size} on, and those before "
                f"{int(self.table.first[row]) * self._size} were given back"
            )

    # -- sharing with others -----------------------------------------------------------------------

    def attach(self, row: int, first: int, pages: Ids) -> None:
        """Let a row without pages hold these, from its logical page `first` on."""
        self.page_class.allocator.share(pages)
        self.begin(row, first, pages)

    def take_loading(self, known: Sequence[int | None], first: int) -> Ids | None:
        """Pages for a row that begins, at its logical page `first`, with some of the pool (which it
        shares already) and others, `None` in `known`, that are taken and whose bytes are to come;
        `None`, and nothing changed, if there is no room.
        """
        shared = [page for page in known if page is not None]
        try:
            last = shared[-1] if shared else None
            new = self.page_class.allocator.alloc(len(known) - len(shared), last)
        except OutOfPagesError:
            return None
        coming = iter(new.tolist())
        pages: Ids = np.array([next(coming) if p is None else p for p in known], np.int32)
        return pages

    def begin(self, row: int, first: int, pages: Ids) -> None:
        """Let a row without pages hold these, whose references it has already."""
        self.table.begin_at(row, first)
        self.table.extend(row, pages, self.page_class.entries(pages))

    def page_at(self, row: int, place: int) -> int | None:
        """The page a row holds at a logical place, if it still does."""
        if self.table.first[row] <= place < self.table.count[row]:
            return int(self.table.pages[row, place])
        return None

    def swap(self, row: int, place: int, page: int) -> None:
        """Hold another page of the same bytes in a place."""
        old = np.array([self.table.pages[row, place]], np.int32)
        new = np.array([page], np.int32)
        self.page_class.allocator.share(new)
        self.table.replace(row, place, page, int(self.page_class.entries(new)[0]))
        self.page_class.allocator.release(old)

    # -- inside ------------------------------------------------------------------------------------

    def _rows_in_a_page(self, lengths: Ints, counts: Ints, among: Flags) -> Ints:
        """Rows whose new tokens begin in the middle of a page."""
        rows: Ints = np.flatnonzero(among & (counts > 0) & (lengths % self._size > 0))
        return rows

    def _copies(
        self, lengths: Ints, counts: Ints, touched: Flags | None
    ) -> list[tuple[int, int, int]]:
        """Rows whose new tokens go into a page that others hold, or that is in the prefix index."""
        if touched is None:
            return []
        rows = self._rows_in_a_page(lengths, counts, touched)
        places = lengths[rows] // self._size
        pages = self.table.pages[rows, places]
        allocator = self.page_class.allocator
        shared = (allocator.refs[pages] > 1) | (allocator.depths[pages] > 0)
        if not shared.any():
            return []
        copies = []
        holders: dict[int, int] = {}
        for row, place, page in zip(
            rows[shared].tolist(), places[shared].tolist(), pages[shared].tolist(), strict=True
        ):
            left = holders.setdefault(page, int(allocator.refs[page]))
            if left > 1 or allocator.depths[page]:  # of a private page the last writer keeps it
                holders[page] = left - 1
                copies.append((row, place, page))
        return copies

    def _new(self, lengths: Ints, counts: Ints) -> list[tuple[int, int]]:
        ends, held = lengths + counts, self.table.count
        rows = np.flatnonzero(ends > held * self._size)
        if not len(rows):
            return []
        need = -(-ends[rows] // self._size) - held[rows]
        return list(zip(rows.tolist(), need.tolist(), strict=True))

    def _release(self, gone: list[Ids]) -> None:
        if gone:
            self.page_class.allocator.release(np.concatenate(gone))
