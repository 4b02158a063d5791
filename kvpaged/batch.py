"""A batch: sequences that take their steps together, and the pages they hold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.books import CacheBooks
from kvpaged.errors import OutOfPagesError, UsageError
from kvpaged.growth import take_all, take_each
from kvpaged.mixed_step import attend_mixed, plan_mixed, single_rows, write_mixed
from kvpaged.ops import Options
from kvpaged.pages.mixed import MixedClass
from kvpaged.pages.stage import Stage
from kvpaged.pages.trail import Trail
from kvpaged.sequences import Sequences
from kvpaged.step import Ints, Step, as_index, make_step, next_step
from kvpaged.step_layers import attend_layer, plan_layers, write_layer
from kvpaged.tokens import Ids as TokenIds
from kvpaged_kernels.cpu.lane import Lane
from kvpaged_kernels.cpu.plan import DecodePlan

_NONE: Ints = np.empty(0, np.int64)


class Batch(Sequences):
    """Sequences (rows) in the pages of a cache.

    One thread at a time may use a batch; several batches of one cache may be used by several
    threads. Invariants:
      1. Every page a row holds has one reference for that row.
      2. Between steps a row of `n` tokens holds the pages of tokens `first .. n - 1`, and no more.
      3. A page that takes new tokens is held by one row only (else it is copied first).
      4. When `begin` raises, rows and pages are as before.
      5. Full pages of a row whose tokens are known are in the prefix index, and the row holds the
          index's pages: those before `settled[row]`. A row without a trail has nothing there.

    A step goes `begin` (pages for the new tokens), `write` and `attend` for each layer, `commit`
    (the tokens count), `publish` (others may have its full pages). A step that is not committed is
    forgotten by the next `begin`.

    Attributes:
        lengths: tokens of each row, int64 `[rows]`.
        logs: their ids, as far as known.
        owed: of each row, the ids of tokens that come next because they were computed before: a
            compressed page is rewound whole. Whoever begins the next step computes them first.
        private: why nothing more of it goes into the prefix index, or `None`.
        filled: int64, rows whose last page the last step filled, if it gave each row one token.
    """

    def __init__(
        self, cache: CacheBooks, rows: int, trails: Sequence[Trail | None] | None = None
    ) -> None:
        """`trails`: where each row stands in the prefix index (`CacheBooks.trails`); `None`: its
        pages are nobody else's.
        """
        super().__init__(cache, rows, trails)
        self.step: Step | None = None
        self._plans: list[DecodePlan | None] = [None] * len(self._groups)
        self._loose = False  # pages past the rows' ends are held
        self._begun: Ints | None = None  # counts of a step that has not been committed
        # A committed step of one token a row, as long as nothing but publishing has happened since.
        self._last: Step | None = None
        self.filled: Ints = _NONE
        self._stages = {group.device: Stage(group.device) for group in cache.groups}

    def transfers(self) -> int:
        """Host-to-device copies its steps have made so far."""
        return sum(stage.transfers for stage in self._stages.values())

    def spawn(self, rows: Sequence[int]) -> "Batch":
        """A new batch of the sequences `rows` (indices; they may repeat), sharing their pages.

        Raises:
            UsageError: a step is running, or no such row.
        """
        self.check_open()
        if self.step is not None:
            raise UsageError("a step is running: branch between steps")
        chosen = self._chosen(rows)
        trails = [trail and trail.copy() for trail in (self._trails[row] for row in chosen)]
        other = Batch(self._cache, len(chosen), trails)
        with self._cache.lock:
            for mine, theirs in zip(self._groups, other._groups, strict=True):
                mine.trim(self.lengths)
                for row, source in enumerate(chosen.tolist()):
                    first = int(mine.table.first[source])
                    theirs.attach(row, first, mine.table.held(source).copy())
        other.lengths = self.lengths[chosen]
        other.owed = [self.owed[row] for row in chosen]
        other.settled = self.settled[chosen]
        other.logs = [self.logs[row].copy() for row in chosen]
        other.private, other._identity = self.private, self._identity
        self._mark(chosen, unclean=False)
        other._mark(slice(None))
        return other

    # -- a step ------------------------------------------------------------------------------------

    def begin(
        self,
        counts: Ints,
        ids: npt.NDArray[np.int32] | None = None,
        *,
        order: Ints | None = None,
        more: npt.NDArray[np.int32] | None = None,
    ) -> Step:
        """Make room for `counts[row]` new tokens of each row and tell the device (their `ids` too,
        if given).

        Args:
            counts: int64 `[rows]`.
            ids: int32 `[tokens]`, in the order of the step.
            order: int64, the rows that have new tokens, each once, in the order their tokens are
                to have; `None`: all rows, as they come. Rows of few tokens are best put first: see
                `GroupStep.parts`.
            more: int32, sent along (`Step.more`).

        Raises:
            OutOfPagesError: the pool has not enough pages; nothing changed.
            UsageError: closed, or a count is negative.
        """
        self.check_open()
        if len(counts) != self.rows or (counts < 0).any():
            raise UsageError(
                f"a step has a count >= 0 for each of {self.rows} rows, got {counts.tolist()}"
            )
        self.drop_step()
        self._note_dropped()
        cache = self._cache
        touched = self._touched if self._odd else None
        single = single_rows(counts, order) if cache.compressed else None
        with cache.lock:
            cache.collect_garbage()
            for rows in self._groups if self._loose else ():
                rows.trim(self.lengths)
            self._loose = False
            try:
                growths = cache.with_room(
                    lambda: take_all(self._groups, self.lengths, counts, touched, single)
                )
            except OutOfPagesError as error:
                raise cache.shortage(error, self.memory_bytes(), counts, self.lengths) from None
            for rows, growth in zip(self._groups, growths, strict=True):
                rows.enter(growth, self.lengths, counts, touched)
        self._begun = counts
        for rows, growth in zip(self._groups, growths, strict=True):
            tails = self._unclean if self._odd else None
            rows.fill(growth, self.lengths, counts, tails=tails)
        if any(growth.copies for growth in growths):
            with cache.lock:
                for rows, growth in zip(self._groups, growths, strict=True):
                    rows.end_copies(growth)
        if self._odd:
            idle = counts == 0
            self._unclean &= idle
            self._touched &= idle
            self._odd = bool((self._unclean | self._touched).any())
        if order is not None and len(order) == self.rows and isinstance(as_index(order), slice):
            order = None
        nothing: list[DecodePlan | None] = [None] * len(self._groups)
        same = order is None and (counts == 1).all()  # a plan is of rows in their order
        hints, self._plans = (self._plans if same else nothing), nothing
        self.step = make_step(
            counts, self.lengths.copy(), self._groups, self._stages, hints, ids,
            order=order, more=more,
        )  # fmt: skip
        if single is not None:
            plan_mixed(self.step, self._groups)
        return self.step

    def again(self, more: npt.NDArray[np.int32] | None = None) -> Step | None:
        """`begin` for one more token of each row that the step before gave one, at a fraction of
        its cost; `None`, and nothing changed, where that does not hold: `begin` is to be called.

        The step's ids (`Step.tokens`) are empty.

        Args:
            more: see `begin`; `None`: what the step before was told.

        Raises:
            OutOfPagesError: the pool has not enough pages; nothing changed.
        """
        self.check_open()
        last, full, cache = self._last, self.filled, self._cache
        if last is None or self._odd or self._loose or self._begun is not None:
            return None
        filling = _NONE
        if cache.compressed:
            filling = last.at_page_end(self.lengths + last.counts, cache.config.page_size)
        if len(full) or len(filling):
            with cache.lock:
                cache.collect_garbage()
                try:
                    taken = cache.with_room(
                        lambda: take_each(self._groups, self.lengths, full, filling)
                    )
                except OutOfPagesError as error:
                    raise cache.shortage(
                        error, self.memory_bytes(), last.counts, self.lengths
                    ) from None
                for rows, (ids, successors) in zip(self._groups, taken, strict=True):
                    if len(full):
                        rows.enter_each(full, ids)
                    rows.enter_successors(successors)
            for rows, (ids, _) in zip(self._groups, taken, strict=True):
                rows.clear(ids)
        self._begun, self._last = last.counts, None
        hints = self._plans
        self._plans = [None] * len(self._groups)
        self.step = next_step(last, self._groups, self._stages, hints, more)
        return self.step

    def write(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        """Put the new tokens' K and V (`[tokens, kv_heads, width]`) of a model's layer into their
        pages.
        """
        step = self.step or self._running()
        home = self._cache.home_of(layer)
        group = step.groups[home.group]
        if isinstance(home.pages, MixedClass):
            write_mixed(group, home.pages, home.place, k, v, backend=home.backend)
        else:
            write_layer(
                group, home.layers, home.place, k, v, backend=home.backend, window=home.window
            )
        step.written.add(layer)

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
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
        step.wait_layer(home.group, home.place)
        options = Options(scale, home.window, softcap, sinks, alibi_slopes)
        group = step.groups[home.group]
        if isinstance(home.pages, MixedClass):
            out = attend_mixed(group, home.pages, home.place, q, options, backend=home.backend)
        else:
            out = attend_layer(group, home.layers, home.place, q, options, backend=home.backend)
        step.attended.add(layer)
        return out

    def lanes(self) -> dict[int, Lane] | None:
        """For a step on a CPU whose rows are alike: each layer's views, by layer.

        Who has them may write a layer's K and V and attend over it by itself, and then says so in
        `step.written` and `step.attended`. `None`: go by `write` and `attend`.
        """
        step, cache = self._running(), self._cache
        if torch.compiler.is_compiling():
            return None
        found: dict[int, Lane] = {}
        for number, group in enumerate(step.groups):
            if cache.backends[number] != "cpu" or cache.compressed:
                return None
            if group.parts:
                return None
            plan_layers(group, cache.classes[number].layers, cache.groups[number].window)
            if group.lanes is None:
                return None
            found.update(zip(cache.groups[number].layers, group.lanes, strict=True))
        return found

    def commit(self, ids: Sequence[TokenIds | None] | None = None) -> None:
        """Count a step's tokens as held and seal the pages it filled. `publish` comes after.

        Args:
            ids: the new token ids of each row, `None` where they are not known; without it whoever
                knows them keeps the logs.
        """
        step = self._running()
        before, after = step.starts, step.starts + step.counts
        self.step = self._begun = None
        if step.order is None:
            self._plans = [group.decode_plan for group in step.groups]
        self.lengths = after
        self._last = step if step.decode else None
        self.filled = _NONE
        for row, log in enumerate(self.logs if ids is not None else ()):
            if ids is not None and step.counts[row]:
                log.extend(ids[row])
        if step.decode:
            self.filled = step.at_page_end(after, self._cache.config.page_size)
            if not len(self.filled):
                return
        with self._cache.lock:
            if step.decode:
                sealed = [rows.seal_last(self.filled, after) for rows in self._groups]
            else:
                sealed = [rows.mark_sealed(before, after) for rows in self._groups]
            self._cache.counters.sealed += sum(len(ids) for ids in sealed)
        for rows, ids_sealed in zip(self._groups, sealed, strict=True):
            rows.sum_sealed(ids_sealed)
        if self._cache.compressed:
            with self._cache.lock:
                for rows in self._groups:
                    rows.end_sealing()

    def settle_computed(self) -> None:
        """Have what is computed count, as far as a step may be unfinished where it is called.

        Raises:
            UsageError: a step is running.
        """
        if self.step is not None:
            raise UsageError("a forward pass is running: its tokens do not count yet")

    def drop_step(self) -> None:
        """Forget a step that is not to count; its pages go back with the next step."""
        self._last = None
        if self.step is not None:
            self.step = None
            self._plans = [None] * len(self._groups)

    # -- rows --------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> None:
        """Become the sequences `rows` (indices; they may repeat or be left out), sharing pages, in
        that order.
        """
        self.check_open()
        chosen = self._chosen(rows)
        self.drop_step()
        self._note_dropped()
        self._plans = [None] * len(self._groups)
        with self._cache.lock:
            for group in self._groups:
                group.trim(self.lengths)
                group.select(chosen)
        self.lengths = self.lengths[chosen]
        self.owed = [self.owed[row] for row in chosen]
        self.settled = self.settled[chosen]
        self._unclean, self._touched = self._unclean[chosen], self._touched[chosen]
        self._mark(slice(None), unclean=False)
        seen: set[int] = set()
        logs, trails = [], []
        for row in chosen.tolist():
            trail = self._trails[row]
            again = row in seen
            logs.append(self.logs[row].copy() if again else self.logs[row])
            trails.append(trail.copy() if again and trail else trail)
            seen.add(row)
        self.logs, self._trails = logs, trails

    def rewind_all(self, lengths: Ints) -> None:
        """Forget each row's tokens from `lengths[row]` (int64 `[rows]`) on, and a running step.

        A row that would end within a compressed page ends before it, and owes its tokens up to
        there (`owed`).

        Raises:
            UsageError: a length is out of range, or so far back that pages it would see have left a
                window, or within a compressed page whose token ids are not known; nothing changed.
        """
        self.check_open()
        whole = self.whole()
        wrong = np.flatnonzero((lengths < 0) | (lengths > whole))
        if wrong.size:
            row = int(wrong[0])
            raise UsageError(
                f"row {row} has {whole[row]} tokens and cannot rewind to {lengths[row]}"
            )
        owed = [ids[: max(int(lengths[row] - self.lengths[row]), 0)] for row, ids in
                enumerate(self.owed)]  # fmt: skip
        asked, lengths = lengths, np.minimum(lengths, self.lengths)
        for group in self._groups:
            lengths = np.minimum(lengths, group.rewindable(self.lengths, lengths))
        for row in np.flatnonzero(lengths < np.minimum(asked, self.lengths)).tolist():
            owed[row] = self._ids_between(row, int(lengths[row]), int(asked[row]))
        for group in self._groups:
            group.check_rewind(self.lengths, lengths)
        self.drop_step()
        self._note_dropped()
        self._plans = [None] * len(self._groups)
        self._mark(lengths < self.lengths)
        full = lengths // self._cache.config.page_size
        for row in np.flatnonzero(lengths < self.lengths).tolist():
            self.logs[row].cut(int(lengths[row]))
            if (trail := self._trails[row]) is not None:
                trail.cut(int(full[row]))
                self.settled[row] = min(self.settled[row], full[row])
        self.lengths, self.owed = lengths.copy(), owed
        with self._cache.lock:
            for group in self._groups:
                group.trim(lengths)

    def _ids_between(self, row: int, start: int, stop: int) -> TokenIds:
        ids = self._known_ids(row, start)
        if ids is None or len(ids) < stop - start:
            raise UsageError(
                f"row {row} cannot rewind to {stop}, within a compressed page: its tokens from "
                f"{start} on would be computed again, and their ids are not known"
            )
        return ids[: stop - start]

    def close(self) -> None:
        """Give all pages back. Closing twice is nothing."""
        if self.closed:
            return
        self.closed = True
        self.step = None
        self._finalizer.detach()
        self._trails = [None] * self.rows
        with self._cache.lock:
            self._cache.release_tables([group.table for group in self._groups])
            self._cache.unregister(self)
        if not self._cache.closed:
            self._groups = self._cache.make_rows(self.rows)

    # -- inside ------------------------------------------------------------------------------------

    def _note_dropped(self) -> None:
        """Have the next step look for what one that was not committed has left."""
        if self._begun is not None:
            self._mark(self._begun > 0)
            self._loose, self._begun = True, None

    def _chosen(self, rows: Sequence[int]) -> Ints:
        chosen = np.asarray(rows, np.int64)
        if chosen.ndim != 1 or not len(chosen) or (chosen < 0).any() or (chosen >= self.rows).any():
            raise UsageError(f"rows to select must be in 0..{self.rows - 1}, got {list(rows)}")
        return chosen

    def _running(self) -> Step:
        self.check_open()
        if self.step is None:
            raise UsageError("no step is running: call begin first")
        return self.step
