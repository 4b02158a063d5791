"""A batch: sequences that take their steps together, and the pages they hold."""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.errors import OutOfPagesError, UsageError
from kvpaged.ops import Options
from kvpaged.pages.allocator import OPEN, Ids
from kvpaged.pages.classops import clear_pages, copy_pages, seal_pages
from kvpaged.pages.stage import Stage
from kvpaged.pages.table import BlockTable
from kvpaged.step import Ints, Step, attend_layer, make_step, plan_decode, write_layer
from kvpaged.tokens import Ids as TokenIds
from kvpaged.tokens import TokenLog
from kvpaged_kernels.cpu.decode import Lane
from kvpaged_kernels.cpu.plan import DecodePlan

if TYPE_CHECKING:
    from kvpaged.cache import PagedKVCache


class Batch:
    """Sequences (rows) in the pages of a cache.

    One thread at a time may use a batch; several batches of one cache may be used by several
    threads. Invariants:
      1. Every page a row holds has one reference for that row.
      2. Between steps a row of `n` tokens holds the pages of tokens `first .. n - 1`, and no more.
      3. A page that takes new tokens is held by one row only (else it is copied first).
      4. When `begin` raises, rows and pages are as before.

    A step goes `begin` (pages for the new tokens), `write` and `attend` for each layer, `commit`
    (the tokens count). A step that is not committed is forgotten by the next `begin`.
    """

    def __init__(self, cache: "PagedKVCache", rows: int) -> None:
        self._cache = cache
        self.lengths: Ints = np.zeros(rows, np.int64)
        self.logs = [TokenLog() for _ in range(rows)]
        self.step: Step | None = None
        self.closed = False
        self._tables = [BlockTable(rows, device=group.device) for group in cache.groups]
        self._plans: list[DecodePlan | None] = [None] * len(self._tables)
        self._stages = {group.device: Stage(group.device) for group in cache.groups}
        # Pages go back also when a batch is forgotten: the collector may run anywhere, so it only
        # leaves a note.
        self._finalizer = weakref.finalize(self, cache.leave_garbage, self._tables)
        cache.register(self)

    # -- what it holds -----------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many sequences."""
        return len(self.lengths)

    def held(self, group: int) -> Ids:
        """Page ids of a group that rows hold, shared pages as often as they are held."""
        return self._tables[group].all_held()

    def tokens_held(self, group: int) -> int:
        """Token slots of a group that rows have filled and still hold."""
        size = self._cache.classes[group].geometry.page_size
        return int(np.maximum(self.lengths - self._tables[group].first * size, 0).sum())

    def page_map(self, group: int = 0) -> list[Ids]:
        """Page ids of each row in a group, in order of the tokens they hold."""
        return [self._tables[group].held(row).copy() for row in range(self.rows)]

    def pages(self) -> int:
        """Pages held, over all groups, shared ones once."""
        return sum(len(np.unique(self.held(group))) for group in range(len(self._tables)))

    def memory_bytes(self) -> int:
        """Bytes of those pages."""
        classes = self._cache.classes
        return sum(
            classes[group].bytes_of(len(np.unique(self.held(group))))
            for group in range(len(classes))
        )

    def transfers(self) -> int:
        """Host-to-device copies its steps have made so far."""
        return sum(stage.transfers for stage in self._stages.values())

    # -- a step ------------------------------------------------------------------------------------

    def begin(self, counts: Ints, ids: npt.NDArray[np.int32] | None = None) -> Step:
        """Make room for `counts[row]` new tokens of each row and tell the device (their `ids` too,
        if given).

        Raises:
            OutOfPagesError: the pool has not enough pages; nothing changed.
            UsageError: closed, or a count is negative.
        """
        self.check_open()
        if len(counts) != self.rows or (counts < 0).any():
            raise UsageError(
                f"a step has a count >= 0 for each of {self.rows} rows, got {counts.tolist()}"
            )
        self.step = None
        cache = self._cache
        taken: list[tuple[int, int, Ids]] = []  # group, row, pages
        with cache.lock:
            cache.collect_garbage()
            copies: list[list[tuple[int, int, int]]] = []  # by group: row, place, new page
            try:
                for group in range(len(self._tables)):
                    copies.append(self._take_copies(group, counts, taken))
                    self._take_new(group, counts, taken)
            except OutOfPagesError as error:
                for group, _, ids in taken:
                    cache.classes[group].allocator.release(ids)
                raise self._explain(error, counts) from None
            self._apply(counts, taken, copies)
        classes = list(cache.classes)
        nothing: list[DecodePlan | None] = [None] * len(classes)
        hints, self._plans = (self._plans if (counts == 1).all() else nothing), nothing
        self.step = make_step(
            counts, self.lengths.copy(), self._tables, classes, self._stages, hints, ids
        )
        return self.step

    def write(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Put the new tokens' K and V (`[tokens, kv_heads, width]`) of a model's layer into their
        pages.
        """
        step = self.step or self._running()
        home = self._cache.home_of(layer)
        write_layer(
            step, step.groups[home.group], home.layers, home.place, k, v,
            backend=home.backend, window=home.window,
        )  # fmt: skip
        step.written.add(layer)

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the new tokens' queries (`[tokens, q_heads, width]`) over all tokens of
        their row up to their own.

        Raises:
            UsageError: this layer's K and V were not written in this step.
        """
        step = self.step or self._running()
        if layer not in step.written:
            raise UsageError(
                f"layer {layer} attends before its keys and values were written in this step"
            )
        home = self._cache.home_of(layer)
        options = Options(scale, home.window, softcap, sinks)
        group = step.groups[home.group]
        out = attend_layer(step, group, home.layers, home.place, q, options, backend=home.backend)
        step.attended.add(layer)
        return out

    def lanes(self) -> dict[int, Lane] | None:
        """For a decode step on a CPU whose rows are alike: each layer's views, by layer.

        Who has them may write a layer's K and V and attend over it by itself, and then says so in
        `step.written` and `step.attended`. `None`: go by `write` and `attend`.
        """
        step, cache = self._running(), self._cache
        if not step.decode or torch.compiler.is_compiling():
            return None
        found: dict[int, Lane] = {}
        for number, group in enumerate(step.groups):
            if cache.backends[number] != "cpu":
                return None
            if group.decode_plan is None:
                plan_decode(group, cache.classes[number].layers, cache.groups[number].window)
            if group.lanes is None:
                return None
            found.update(zip(cache.groups[number].layers, group.lanes, strict=True))
        return found

    def commit(self, ids: Sequence[TokenIds | None] | None = None) -> None:
        """Count a step's tokens as held, seal the pages it filled, and give back those that left a
        window.

        Args:
            ids: the new token ids of each row, `None` where they are not known; without it whoever
                knows them keeps the logs.
        """
        step = self._running()
        before, after = step.starts, step.starts + step.counts
        self.step = None
        self._plans = [group.decode_plan for group in step.groups]
        self.lengths = after
        for row, log in enumerate(self.logs):
            if ids is not None and step.counts[row]:
                log.extend(ids[row])
        cache = self._cache
        with cache.lock:
            for group in range(len(self._tables)):
                self._seal(group, before, after)
                self._leave_window(group)

    # -- rows --------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> None:
        """Become the sequences `rows` (indices; they may repeat or be left out), sharing pages, in
        that order.
        """
        self.check_open()
        self.step = None
        self._plans = [None] * len(self._tables)
        chosen = np.asarray(rows, np.int64)
        if chosen.ndim != 1 or (chosen < 0).any() or (chosen >= self.rows).any():
            raise UsageError(f"rows to select must be in 0..{self.rows - 1}, got {list(rows)}")
        cache = self._cache
        with cache.lock:
            for group, table in enumerate(self._tables):
                self._trim(group)
                before = table.all_held()
                page_class = cache.classes[group]
                table.select(chosen, page_class.entries(table.pages[chosen]))
                page_class.allocator.share(table.all_held())
                page_class.allocator.release(before)
        self.lengths = self.lengths[chosen]
        seen: set[int] = set()
        logs = []
        for row in chosen.tolist():
            logs.append(self.logs[row].copy() if row in seen else self.logs[row])
            seen.add(row)
        self.logs = logs

    def rewind_all(self, lengths: Ints, *, restart: bool = False) -> None:
        """Forget each row's tokens from `lengths[row]` on.

        Args:
            lengths: int64 `[rows]`, none above a row's present length.
            restart: every row becomes as new, whatever has left its window.

        Raises:
            UsageError: a length is out of range, or so far back that pages it would see have left a
                window; nothing changed.
        """
        self.check_open()
        assert not restart or not lengths.any()
        wrong = np.flatnonzero((lengths < 0) | (lengths > self.lengths))
        if wrong.size:
            row = int(wrong[0])
            raise UsageError(
                f"row {row} has {self.lengths[row]} tokens and cannot rewind to {lengths[row]}"
            )
        self.step = None
        self._plans = [None] * len(self._tables)
        for group in range(0 if restart else len(self._tables)):
            self._check_window(group, lengths)
        for row in np.flatnonzero(lengths < self.lengths).tolist():
            self.logs[row].cut(int(lengths[row]))
        self.lengths = lengths.copy()
        with self._cache.lock:
            for group in range(len(self._tables)):
                self._trim(group)

    def _check_window(self, group: int, lengths: Ints) -> None:
        """Raise `UsageError` if a row shortened to its length would see pages it gave back."""
        window, table = self._cache.groups[group].window, self._tables[group]
        size = self._cache.classes[group].geometry.page_size
        if window is None:
            return
        first = np.maximum(lengths - window + 1, 0) // size
        wrong = np.flatnonzero((first < table.first) & (lengths < self.lengths))
        if wrong.size:
            row = int(wrong[0])
            raise UsageError(
                f"row {row} cannot rewind to {lengths[row]}: a window of {window} would see "
                "tokens from "
                f"{int(first[row]) * size} on, and those before {int(table.first[row]) * size} "
                "were given back"
            )

    def close(self) -> None:
        """Give all pages back. Closing twice is nothing."""
        if self.closed:
            return
        self.closed = True
        self.step = None
        self._finalizer.detach()
        with self._cache.lock:
            self._cache.release_tables(self._tables)
            self._cache.unregister(self)
        self._tables = [BlockTable(self.rows, device=table.device) for table in self._tables]

    def check_open(self) -> None:
        """Raise `UsageError` if this batch or its cache is closed."""
        if self.closed or self._cache.closed:
            raise UsageError(f"the {'cache' if self._cache.closed else 'batch'} is closed")

    # -- inside ------------------------------------------------------------------------------------

    def _running(self) -> Step:
        self.check_open()
        if self.step is None:
            raise UsageError("no step is running: call begin first")
        return self.step

    def _explain(self, error: OutOfPagesError, counts: Ints) -> OutOfPagesError:
        cache = self._cache
        return OutOfPagesError(
            f"out of pages: {int(counts.sum())} new tokens in {self.rows} sequences (longest "
            f"{int((self.lengths + counts).max(initial=0))} tokens): {error}; the pool has "
            f"{cache.config.memory} "
            f"bytes, this batch holds {self.memory_bytes()} of them and "
            f"{cache.batches_alive() - 1} others the rest",
            needed=error.needed,
            available=error.available,
        )

    def _take_copies(
        self, group: int, counts: Ints, taken: list[tuple[int, int, Ids]]
    ) -> list[tuple[int, int, int]]:
        """Pages for rows whose last page takes new tokens and is shared."""
        table, allocator = self._tables[group], self._cache.classes[group].allocator
        size = self._cache.classes[group].geometry.page_size
        place = self.lengths // size
        rows = np.flatnonzero((counts > 0) & (self.lengths % size > 0))
        pages = table.pages[rows, place[rows]]
        shared = allocator.refs[pages] > 1
        holders: dict[int, int] = {}
        copies = []
        for row, page in zip(rows[shared].tolist(), pages[shared].tolist(), strict=True):
            left = holders.setdefault(page, int(allocator.refs[page]))
            if left > 1:  # the last row that writes to it may keep it
                holders[page] = left - 1
                ids = allocator.alloc(1)
                taken.append((group, -1, ids))
                copies.append((row, int(place[row]), int(ids[0])))
        return copies

    def _take_new(self, group: int, counts: Ints, taken: list[tuple[int, int, Ids]]) -> None:
        """Pages for tokens beyond those a row has."""
        table, allocator = self._tables[group], self._cache.classes[group].allocator
        size = self._cache.classes[group].geometry.page_size
        need = -(-(self.lengths + counts) // size) - table.count
        for row in np.flatnonzero(need > 0).tolist():
            count = int(table.count[row])
            last = int(table.pages[row, count - 1]) if count > table.first[row] else None
            taken.append((group, row, allocator.alloc(int(need[row]), last)))

    def _apply(
        self,
        counts: Ints,
        taken: list[tuple[int, int, Ids]],
        copies: list[list[tuple[int, int, int]]],
    ) -> None:
        """Enter taken pages into the tables, copy shared ones, clean those that start partly
        filled.
        """
        classes, backends = self._cache.classes, self._cache.backends
        for group, (table, page_class) in enumerate(zip(self._tables, classes, strict=True)):
            if copies[group]:
                rows, places, new = (np.array(x) for x in zip(*copies[group], strict=True))
                old = table.pages[rows, places]
                new = new.astype(np.int32)
                copy_pages(page_class, old, new, backend=backends[group])
                entries = page_class.entries(new)
                for row, place, page, entry in zip(rows, places, new, entries, strict=True):
                    table.replace(int(row), int(place), int(page), int(entry))
                page_class.allocator.release(old)
            self._reopen(group, counts)
        partial = []
        for group, row, ids in taken:
            if row < 0:
                continue
            page_class = classes[group]
            self._tables[group].extend(row, ids, page_class.entries(ids))
            if (
                backends[group] == "cpu"
                and (self.lengths[row] + counts[row]) % page_class.geometry.page_size
            ):
                partial.append((group, ids[-1:]))
        for group, page in partial:
            clear_pages(classes[group], page)

    def _reopen(self, group: int, counts: Ints) -> None:
        """Mark pages that take tokens again (after a rewind into a sealed page) as open."""
        size = self._cache.classes[group].geometry.page_size
        rows = np.flatnonzero((counts > 0) & (self.lengths % size > 0))
        pages = self._tables[group].pages[rows, self.lengths[rows] // size]
        self._cache.classes[group].allocator.states[pages] = OPEN

    def _seal(self, group: int, before: Ints, after: Ints) -> None:
        table, page_class = self._tables[group], self._cache.classes[group]
        size = page_class.geometry.page_size
        full = []
        for row in np.flatnonzero(after // size > before // size).tolist():
            first = max(int(before[row]) // size, int(table.first[row]))
            full.append(table.pages[row, first : int(after[row]) // size])
        if full:
            ids = np.concatenate(full)
            seal_pages(page_class, ids, backend=self._cache.backends[group])
            self._cache.counters.sealed += len(ids)

    def _leave_window(self, group: int) -> None:
        """Give back pages no later query sees, but for one page's worth of rewinding."""
        window = self._cache.groups[group].window
        if window is None:
            return
        table, page_class = self._tables[group], self._cache.classes[group]
        size = page_class.geometry.page_size
        first = np.maximum(self.lengths - window + 1 - size, 0) // size
        gone = [
            table.drop_first(row, int(first[row]))
            for row in np.flatnonzero(first > table.first).tolist()
        ]
        if gone:
            page_class.allocator.release(np.concatenate(gone))

    def _trim(self, group: int) -> None:
        """Give back pages beyond the rows' lengths (a step that was not committed, a rewind)."""
        table, page_class = self._tables[group], self._cache.classes[group]
        need = -(-self.lengths // page_class.geometry.page_size)
        gone = [
            table.cut(row, int(need[row])) for row in np.flatnonzero(table.count > need).tolist()
        ]
        if gone:
            page_class.allocator.release(np.concatenate(gone))
