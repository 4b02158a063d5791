"""Block tables: per sequence, which page holds which tokens, on the host and on the device."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kvpaged.pages.extents import Ids


class Change(NamedTuple):
    """Entries of the device table that are to be written: flat positions and values, int32 both."""

    places: Ids
    values: Ids


def _zeros(rows: int, width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # else the table could only be written in that mode
        return torch.zeros((rows, width), dtype=torch.int32, device=device)


class Successor(NamedTuple):
    """A compressed page that is to take the place of a row's open one once the step that fills it
    counts.

    Attributes:
        row, place: which.
        page: of the compressed class.
        coded: its bytes are written while the step runs, layer by layer; else once it counts.
    """

    row: int
    place: int
    page: int
    coded: bool


class BlockTable:
    """Logical page -> physical page for the rows of a batch; the device copy is brought up to date
    incrementally.

    Row `r` holds logical pages `first[r]` to `count[r]` (exclusive); those before `first` have left
    the window and were given back. `pages[r, i]` is a page id, `entries` the device's int32 `[rows,
    width]` of block-table entries.

    Invariant: after the changes of `take_changes` are written to `entries`, it equals the entries
    of `pages` wherever a row holds a page, but where a coded successor waits.

    Attributes:
        successors: compressed pages that rows hold beside the open ones they follow.
    """

    def __init__(self, rows: int, *, device: torch.device, width: int = 8) -> None:
        self.device = device
        self.pages: npt.NDArray[np.int32] = np.zeros((rows, width), np.int32)
        self.count: npt.NDArray[np.int64] = np.zeros(rows, np.int64)
        self.first: npt.NDArray[np.int64] = np.zeros(rows, np.int64)
        self.entries = _zeros(rows, width, device)
        self.successors: list[Successor] = []
        self._places: list[npt.NDArray[np.int64]] = []
        self._values: list[Ids] = []

    @property
    def rows(self) -> int:
        """Sequences the table has rows for."""
        return len(self.count)

    def held(self, row: int) -> Ids:
        """The page ids a row holds, in logical order."""
        return self.pages[row, self.first[row] : self.count[row]]

    def all_held(self) -> Ids:
        """The page ids of all rows, shared pages as often as rows hold them."""
        columns = np.arange(self.pages.shape[1])
        inside = (columns >= self.first[:, None]) & (columns < self.count[:, None])
        held: Ids = self.pages[inside]
        if self.successors:
            more = np.array([each.page for each in self.successors], np.int32)
            held = np.concatenate((held, more))
        return held

    def show(self, row: int, place: int, entry: int) -> None:
        """Have the device see another entry in a place than that of the page a row holds there."""
        self._note(np.array([row * self.pages.shape[1] + place]), np.array([entry], np.int32))

    def extend(self, row: int, ids: Ids, entries: Ids) -> None:
        """Append pages to a row."""
        start = int(self.count[row])
        stop = start + len(ids)
        if stop > self.pages.shape[1]:
            self._widen(stop)
        self.pages[row, start:stop] = ids
        self.count[row] = stop
        self._note(row * self.pages.shape[1] + np.arange(start, stop), entries)

    def append_each(self, rows: npt.NDArray[np.int64], ids: Ids, entries: Ids) -> None:
        """Append one page to each of some rows."""
        places = self.count[rows]
        if int(places.max()) >= self.pages.shape[1]:
            self._widen(int(places.max()) + 1)
        self.pages[rows, places] = ids
        self.count[rows] = places + 1
        self._note(rows * self.pages.shape[1] + places, entries)

    def begin_at(self, row: int, first: int) -> None:
        """Let a row without pages hold its logical pages from `first` on."""
        assert self.count[row] == 0
        self.first[row] = self.count[row] = first

    def replace(self, row: int, place: int, page: int, entry: int) -> None:
        """Put another page in the place of one a row holds."""
        assert self.first[row] <= place < self.count[row]
        self.pages[row, place] = page
        self.show(row, place, entry)

    def cut(self, row: int, count: int) -> Ids:
        """Forget a row's logical pages from `count` on; returns their ids."""
        gone = self.pages[row, max(count, int(self.first[row])) : self.count[row]].copy()
        self.count[row] = min(int(self.count[row]), count)
        self.first[row] = min(int(self.first[row]), count)
        return gone

    def drop_first(self, row: int, first: int) -> Ids:
        """Forget a row's logical pages before `first` (they have left the window); returns their
        ids.
        """
        gone = self.pages[row, self.first[row] : first].copy()
        self.first[row] = max(first, int(self.first[row]))
        return gone

    def select(self, rows: npt.NDArray[np.int64], entries_of: npt.NDArray[np.int32]) -> None:
        """Make the table that of `rows` of this one, in that order (rows may repeat, or go).

        Args:
            rows: indices into the present rows.
            entries_of: int32, the entries of `pages[rows]`, same shape: what the device has to
                hold.
        """
        before, old = self.pages, self.entries
        limit = len(rows) * before.shape[1]
        kept_places = [place < limit for place in self._places]
        self._values = [v[k] for v, k in zip(self._values, kept_places, strict=True)]
        self._places = [p[k] for p, k in zip(self._places, kept_places, strict=True)]
        self.pages, self.count, self.first = before[rows], self.count[rows], self.first[rows]
        width = before.shape[1]
        if len(rows) != len(before):
            self.entries = _zeros(len(rows), width, self.device)
            self.entries[: min(len(rows), len(before))] = old[: min(len(rows), len(before))]
        kept = np.zeros((len(rows), width), bool)
        common = min(len(rows), len(before))
        kept[:common] = before[:common] == self.pages[:common]
        changed = np.flatnonzero(~kept)
        self._note(changed, entries_of.reshape(-1)[changed])

    def take_changes(self) -> Change | None:
        """What has to be written to `entries` since the last call, and forget it; `None`:
        nothing.
        """
        if not self._places:
            return None
        places = np.concatenate(self._places)
        values = np.concatenate(self._values)
        if (
            len(self._places) > 1
        ):  # the last value of a place counts: the device writes in any order
            _, last = np.unique(places[::-1], return_index=True)
            chosen = len(places) - 1 - last
            places, values = places[chosen], values[chosen]
        self._places.clear()
        self._values.clear()
        return Change(places.astype(np.int32), values.astype(np.int32))

    def _note(self, places: npt.NDArray[np.int64], values: Ids) -> None:
        self._places.append(places)
        self._values.append(values)

    def _widen(self, width: int) -> None:
        rows, old = self.pages.shape
        new = max(width, 2 * old)
        pages = np.zeros((rows, new), np.int32)
        pages[:, :old] = self.pages
        self.pages = pages
        entries = _zeros(rows, new, self.device)
        entries[:, :old] = self.entries
        self.entries = entries
        self._places = [place // old * new + place % old for place in self._places]
