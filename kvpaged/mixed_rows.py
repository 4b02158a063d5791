"""The pages that rows hold in a layer group whose full pages are compressed.

A row's open page is exact. Pages that a prompt fills are coded layer by layer while its step runs,
before each layer's attention; the device sees them in their places at once, and an open page that
has filled goes when the step counts. A row of one new token, served by decode, fills at most its
open page, which is coded, all layers together, when the step counts.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvpaged.config import Backend
from kvpaged.errors import OutOfPagesError
from kvpaged.group_rows import Copy, Flags, GroupRows, Growing, Growth, Ints, Needs
from kvpaged.pages.allocator import SEALED
from kvpaged.pages.classops import keep_checksums
from kvpaged.pages.coding import code_pages
from kvpaged.pages.extents import Ids
from kvpaged.pages.mixed import MixedClass
from kvpaged.pages.table import Successor


class MixedRows(GroupRows):
    """`GroupRows` where full pages are compressed, but for the first `keep` of each sequence."""

    def __init__(
        self, page_class: MixedClass, rows: int, device: torch.device, window: int | None,
        backend: Backend, spare: int = 2,
    ) -> None:  # fmt: skip
        super().__init__(page_class, rows, device, window, backend, spare)
        self.mixed = page_class
        self.few = 1
        self._filled: list[tuple[int, int]] = []  # open pages to be coded, and as which
        self._parting: list[int] = []  # open pages whose successors have taken their places

    # -- a step's pages ----------------------------------------------------------------------------

    def needs(
        self, lengths: Ints, counts: Ints, touched: Flags | None, single: Flags | None = None
    ) -> Needs:
        """See `GroupRows.needs`."""
        copies = self._copies(lengths, counts, touched)
        growing = []
        for row in np.flatnonzero(counts).tolist():
            decoded = bool(counts[row] == 1 and (single is None or single[row]))
            each = self._growing(row, int(lengths[row]), int(counts[row]), decoded)
            if each.compressed or each.closes is not None:
                growing.append(each)
        sealed = sum(sum(each.compressed) + (each.closes is not None) for each in growing)
        exact = len(copies) + sum(len(each.compressed) - sum(each.compressed) for each in growing)
        self.mixed.allocator.check_room(exact, sealed)
        return Needs(copies, [], growing)

    def _growing(self, row: int, length: int, count: int, decoded: bool) -> Growing:
        size, keep = self._size, self.mixed.keep
        first, full = length // size, (length + count) // size
        closes = first if length % size and full > first >= keep else None
        if decoded:
            fills = full > first >= keep
            return Growing(row, [] if length % size else [False], first if fills else None, False)
        places = range(-(-length // size), -(-(length + count) // size))
        return Growing(row, [keep <= place < full for place in places], closes, True)

    def take(self, needs: Needs) -> Growth:
        """See `GroupRows.take`."""
        successors: list[Successor] = []
        growth = Growth([], [], successors)
        allocator = self.mixed.allocator
        try:
            for row, place, page in needs.copies:
                before = self.page_at(row, place - 1)
                growth.copies.append(Copy(row, place, page, int(allocator.alloc(1, before)[0])))
            for row, compressed, closes, coded in needs.growing:
                if closes is not None:
                    successors.append(self._successor(row, closes, coded))
                if compressed:
                    held = self.table.held(row)
                    last = int(held[-1]) if len(held) else None
                    growth.new.append((row, allocator.alloc_both(np.array(compressed), last)))
        except OutOfPagesError:
            self.give_back(growth)
            raise
        return growth

    def _successor(self, row: int, place: int, coded: bool) -> Successor:
        before = self.page_at(row, place - 1)
        page = self.mixed.allocator.alloc_sealed(1, before)
        return Successor(row, place, int(page[0]), coded)

    def enter(self, growth: Growth, lengths: Ints, counts: Ints, touched: Flags | None) -> None:
        """See `GroupRows.enter`."""
        super().enter(growth, lengths, counts, touched)
        self.enter_successors(growth.successors)
        for row, place, page, coded in growth.successors:
            if coded:
                self.table.show(row, place, self._entry(page))

    def take_successors(self, rows: Ints, lengths: Ints) -> list[Successor]:
        """See `GroupRows.take_successors`."""
        places = lengths[rows] // self._size
        filling = ((lengths[rows] + 1) % self._size == 0) & (places >= self.mixed.keep)
        taken: list[Successor] = []
        try:
            for row, place in zip(rows[filling].tolist(), places[filling].tolist(), strict=True):
                taken.append(self._successor(row, place, False))
        except OutOfPagesError:
            self.give_back(Growth([], [], taken))
            raise
        return taken

    # -- what a step that counts leaves ------------------------------------------------------------

    def mark_sealed(self, before: Ints, after: Ints) -> Ids:
        """See `GroupRows.mark_sealed`: compressed pages take the places of the open ones."""
        filled = []
        for row in np.flatnonzero(after // self._size > before // self._size).tolist():
            first = max(int(before[row]) // self._size, int(self.table.first[row]))
            filled += [(row, place) for place in range(first, int(after[row]) // self._size)]
        return self._seal(filled)

    def seal_last(self, rows: Ints, lengths: Ints) -> Ids:
        """See `GroupRows.seal_last`."""
        places = lengths[rows] // self._size - 1
        return self._seal(list(zip(rows.tolist(), places.tolist(), strict=True)))

    def _seal(self, filled: Sequence[tuple[int, int]]) -> Ids:
        """Make the pages immutable that rows are to hold in places (row, place) that have filled;
        returns them.
        """
        waiting = {(each.row, each.place): each for each in self.table.successors}
        sealed: list[int] = []
        for row, place in filled:
            page = int(self.table.pages[row, place])
            follows = waiting.pop((row, place), None)
            if follows is not None:
                self.table.replace(row, place, follows.page, self._entry(follows.page))
                self._parting.append(page)
                if not follows.coded:
                    self._filled.append((page, follows.page))
                page = follows.page
            sealed.append(page)
        self.table.successors[:] = waiting.values()
        ids = np.array(sealed, np.int32)
        self.mixed.allocator.states[ids] = SEALED
        return ids

    def sum_sealed(self, ids: Ids) -> None:
        """Code what decode has filled; keep the checksums of pages just sealed that stay exact."""
        if self._filled:
            full, compressed = np.array(self._filled, np.int32).T
            code_pages(self.mixed, full, compressed, backend=self.backend)
            self._filled.clear()
        exact = ids[~self.mixed.allocator.is_sealed(ids)]
        if exact.size:
            keep_checksums(self.exact, exact, backend=self.backend)

    def end_sealing(self) -> None:
        """See `GroupRows.end_sealing`."""
        if self._parting:
            self.mixed.allocator.release(np.array(self._parting, np.int32))
            self._parting.clear()

    # -- rows --------------------------------------------------------------------------------------

    def trim(self, lengths: Ints) -> None:
        """See `GroupRows.trim`; open pages of a step that did not count have no successors."""
        self._forget(self.table.successors)
        super().trim(lengths)

    def rewindable(self, before: Ints, lengths: Ints) -> Ints:
        """See `GroupRows.rewindable`: not within a page that has been compressed."""
        place = lengths // self._size
        inside = (place >= self.mixed.keep) & ((place + 1) * self._size <= before)
        return np.where(inside, place * self._size, lengths)

    def drop_row(self, row: int) -> None:
        """See `GroupRows.drop_row`."""
        self._forget([each for each in self.table.successors if each.row == row])
        super().drop_row(row)

    def _forget(self, successors: Sequence[Successor]) -> None:
        for row, place, page, coded in list(successors):
            self.mixed.allocator.release(np.array([page], np.int32))
            if coded and (open_page := self.page_at(row, place)) is not None:
                self.table.show(row, place, self._entry(open_page))
        gone = {each.page for each in successors}
        self.table.successors[:] = [x for x in self.table.successors if x.page not in gone]

    def take_loading(self, known: Sequence[int | None], first: int) -> Ids | None:
        """See `GroupRows.take_loading`."""
        kinds = [first + n >= self.mixed.keep for n, page in enumerate(known) if page is None]
        shared = [page for page in known if page is not None]
        compressed = np.array(kinds, bool)
        try:
            new = self.mixed.allocator.alloc_both(compressed, shared[-1] if shared else None)
        except OutOfPagesError:
            return None
        numbers = torch.from_numpy(self.mixed.numbers(new[compressed])).long()
        self.mixed.sealed.errors[numbers] = torch.nan  # not those of what was there before
        coming = iter(new.tolist())
        return np.array([next(coming) if page is None else page for page in known], np.int32)

    def _entry(self, page: int) -> int:
        return int(self.mixed.entries(np.array([page], np.int32))[0])
