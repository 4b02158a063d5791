"""A cache, what its batches must hold, and everything that can be compared between the two."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpaged.batch import Batch
from kvpaged.errors import OutOfPagesError
from kvpaged.offload.options import OffloadOptions
from kvpaged.pages.allocator import CACHED, FREE, SEALED
from kvpaged.pages.table import BlockTable
from kvpaged.pages.trail import Node
from kvpaged.sequences import NOTHING
from kvpaged.testing.dense import (
    DIM,
    LAYERS,
    NAMESPACES,
    PAGE,
    Found,
    Offers,
    Origin,
    Row,
    attention,
)  # fmt: skip
from kvpaged.testing.shapes import GroupPages, Numbers, Shape, on_device
from kvpaged.tiers.base import Tier
from kvpaged.token_batch import TokenBatch

DEEP = 64
"""Steps between two checks of the checksums: bytes are compared after every one."""

_SLOTS = np.arange(PAGE)


@dataclass(slots=True, eq=False)
class Held:
    """A batch, and what its rows must be.

    Attributes:
        epoch: changes of the namespace before it began.
        waiting: tokens of each row in a step that has begun.
        new: what `Row.next` says of them, once they are computed.
        dropped: pages of a dropped step may still be held.
    """

    batch: Batch
    rows: list[Row]
    epoch: int
    waiting: list[list[int]] | None = None
    new: list[tuple[list[int], np.ndarray]] | None = None
    dropped: bool = False


class Witness:
    """A cache and a plain account of everything that holds pages of it. One thread.

    With tiers, what a row begins with and what is evicted when depends on them, too: then only
    that a row begins with no more than was offered is compared.

    Attributes:
        cache: to be driven.
        counts: what came of it, by name.
    """

    def __init__(
        self, shape: Shape, counts: Counter[str] | None = None, *, tiers: Sequence[Tier] = (),
        offload: OffloadOptions | None = None,
    ) -> None:  # fmt: skip
        self.cache = shape.make(tiers, offload)
        self._tiered = bool(tiers)
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._windows = shape.windows
        self._held: list[Held] = []
        self._offers = Offers(self.cache.kv_format.key())
        self._keep = self.cache.kv_format.keep if self.cache.compressed else None
        self._there: dict[bytes, list[int | None]] = {}
        self._waits: dict[bytes, int] = {}  # cached pages, and the step in which they were let go
        self._waited: set[bytes] = set()  # those of the step before
        self._fresh: list[bytes] = []  # pages offered in this step
        self._namespace, self._epoch, self._step = NAMESPACES[0], 0, 0
        self._reuse: Counter[bytes | None] = Counter()
        self._asked = self._evicted = 0
        self._pages = [GroupPages(pages, receipts=not tiers) for pages in self.cache.classes]
        each = LAYERS // len(shape.windows) * 2 * DIM
        self._columns = [slice(n * each, (n + 1) * each) for n in range(len(shape.windows))]

    # -- what happens ------------------------------------------------------------------------------

    def _compute(self, held: Held, *, attend: bool = False, count: bool = False) -> None:
        """Keys and values of a step's tokens, and attention if asked; then count them, if asked."""
        assert held.waiting is not None
        step = held.batch.step
        assert step is not None
        pairs = list(zip(held.rows, held.waiting, strict=True))
        held.new = [row.next(ids, self._namespace) for row, ids in pairs]
        flat = np.concatenate([new for _, new in held.new])
        assert held.batch.lengths.tolist() == [len(row.tokens) for row in held.rows]
        states = torch.from_numpy(flat).view(-1, LAYERS, 2, 1, DIM)
        for layer in range(LAYERS):
            k, v = states[:, layer, 0], states[:, layer, 1]
            if attend and len(k):
                out = self.cache.attend(layer, k, k, v, held.batch, scale=1.0)
                self._check_attention(held, layer, out[:, 0].numpy())
            else:
                held.batch.write(layer, k, v)
                step.attended.add(layer)
        self.counts["computed tokens"] += len(flat)
        if not isinstance(held.batch, TokenBatch):
            ids_of = [np.array(ids, np.int64) for ids in held.waiting]
            held.batch.commit(ids_of if count else None)
            if not count:  # a session on a GPU knows the ids of a pass only after the next
                held.batch.publish()
                for log, ids in zip(held.batch.logs, ids_of, strict=True):
                    log.extend(ids)
            held.batch.owed = [NOTHING] * held.batch.rows
            held.batch.publish()
            self._count(held)
        elif count:
            held.batch.commit_computed()
            self._count(held)

    def _count(self, held: Held) -> None:
        """A step counts if it was computed; full pages are others' too, unless the namespace has
        changed since the batch began.
        """
        if held.new is not None and held.waiting is not None:
            for row, ids, new in zip(held.rows, held.waiting, held.new, strict=True):
                row.add(ids, new)
            due = any(r.shared and len(r.tokens) // PAGE > len(r.keys) for r in held.rows)
            for row in held.rows:
                row.shared = row.shared and not (due and held.epoch != self._epoch)
                known = len(row.keys)
                if row.shared:
                    self._offers.add(row)
                for key in row.keys[known:]:  # perhaps taken up, and let go in the same step
                    self._waits.pop(key, None)
                self._fresh += row.keys[known:]
        held.waiting = held.new = None

    def _refused(self, error: OutOfPagesError, begins: Sequence[Found]) -> None:
        """There was no room: rightly? `begins`: pages that were taken up for it, and let go."""
        self.counts["out of pages"] += 1
        assert (error.needed or 0) > (error.available or 0)
        for found in begins:
            for key in (*found.path, *found.nearest):
                self._waits.pop(key, None)
        alone = len(self._windows) == 1 and self._keep is None
        if alone and not begins and not self._tiered:
            allocator = self.cache.classes[0].allocator
            assert error.available == int((allocator.refs == 0).sum())

    # -- what is compared --------------------------------------------------------------------------

    def check(self) -> None:
        """Compare everything.

        Raises:
            AssertionError, IntegrityError: something is not as it must be.
        """
        with self.cache.lock:
            self._check()

    def _check(self) -> None:
        self.cache.check_integrity(deep=self._step % DEEP == 0)
        self._read_tree()
        frames = 0
        for group, pages in enumerate(self._pages):
            numbers = pages.read()
            self._check_rows(group, numbers)
            self._check_tree(group, numbers)
            for allocator in pages.allocators():
                owned = allocator.pages_per_frame * len(allocator._used)
                held = int((allocator.refs > 0).sum())
                held += sum(allocator.states[page] == FREE for page in allocator._leases)
                free = allocator.free_pages + allocator.cached_pages()
                assert free + held == owned, "a page leaked"
                frames += len(allocator._used)
            if self._windows[group] is None and not self._tiered:
                self._check_order(group)
        budget = self.cache.pools[0].frames
        assert frames + len(budget.free_frames()) == budget.frames
        counters = self.cache.counters
        assert counters.reused == sum(self._reuse.values())
        assert counters.asked == self._asked
        evicted, self._evicted = self._evicted, self.cache.index.evicted
        self.counts["evicted pages"] += self._evicted - evicted
        if None in self._windows and evicted == self._evicted:  # else gone again
            for key in self._fresh:
                assert None not in self._there[key], "a full page was not kept"
        self._fresh.clear()

    def _check_rows(self, group: int, numbers: Numbers) -> None:
        """Rows hold their tokens' bytes, in pages that are theirs, full ones sealed."""
        allocator, columns = self.cache.classes[group].allocator, self._columns[group]
        window = self._windows[group]
        whole = None in self._windows
        slots, expected, full, all_pages = [], [], [], []
        for held in self._held:
            table = held.batch._groups[group].table
            assert held.batch.rows == table.rows == len(held.rows)
            waiting = held.waiting or [[]] * len(held.rows)
            coming = self._check_successors(group, held, table)
            all_pages.append(np.array([each.page for each in table.successors], np.int32))
            for number, (row, ids) in enumerate(zip(held.rows, waiting, strict=True)):
                first, count = int(table.first[number]), int(table.count[number])
                size = len(row.tokens)
                need = -(-(size + len(ids)) // PAGE)
                assert count == need or (held.dropped and count > need)
                if window is not None:
                    assert first <= max(size + 1 - window, 0) // PAGE, "the next token sees more"
                pages = table.pages[number, first:count]
                slots.append(
                    (pages[:, None] * PAGE + _SLOTS).ravel()[: max(size - first * PAGE, 0)]
                )
                expected.append(row.dense[first * PAGE :])
                full.append(pages[: max(size // PAGE - first, 0)])
                all_pages.append(pages)
                if whole and row.keys:
                    self._check_kept(group, row, pages.tolist(), first)
                for place, page in coming[number].items() if held.new else ():
                    assert held.new is not None
                    dense = np.concatenate((row.dense, held.new[number][1]))
                    slots.append(page * PAGE + _SLOTS)
                    expected.append(dense[place * PAGE : (place + 1) * PAGE])
            assert held.batch.lengths.tolist() == [len(row.tokens) for row in held.rows]
            owed = [ids.tolist() for ids in held.batch.owed]
            assert owed == [row.owed for row in held.rows], "rows owe other tokens"
        if not slots:
            assert not allocator.refs.any()
            return
        agree = numbers.agree(np.concatenate(slots), np.concatenate(expected)[:, columns])
        assert agree, "a row holds other bytes than its tokens'"
        assert (allocator.states[np.concatenate(full)] == SEALED).all()
        refs = np.bincount(np.concatenate(all_pages), minlength=allocator.capacity)
        assert np.array_equal(refs, allocator.refs), "references are not those of the rows"

    def _check_successors(
        self, group: int, held: Held, table: BlockTable
    ) -> dict[int, dict[int, int]]:
        """Full pages behind those that stay exact are compressed, others are not; what waiting
        tokens fill has a compressed page, and the device sees what it is to see.

        Returns, by row and place, the compressed pages that are coded as the step runs.
        """
        pages, keep = self._pages[group], self._pages[group].keep
        coming: dict[int, dict[int, int]] = {}
        for number, row in enumerate(held.rows):
            first, count = int(table.first[number]), int(table.count[number])
            size = len(row.tokens)
            end = size + (len(held.waiting[number]) if held.waiting else 0)
            after = {each.place: each for each in table.successors if each.row == number}
            shown = {place: each.page for place, each in after.items() if each.coded}
            mine = coming[number] = shown.copy()
            held_pages = table.pages[number].tolist()
            for place in range(first, count):
                sealed = held_pages[place] >= pages.first_sealed
                if keep is None or place < keep or (place + 1) * PAGE > end:
                    loose = held.dropped and place * PAGE + PAGE > size
                    assert loose or not (sealed or place in after), "a page is compressed"
                elif place < size // PAGE:
                    assert sealed, "a full page is not compressed"
                    assert place not in after, "a compressed page was left behind"
                else:
                    assert sealed != (place in after), "a page fills and is not to be compressed"
                    if sealed:
                        mine[place] = held_pages[place]
            there = pages.entries(table.pages[number], shown)[first:count]
            assert np.array_equal(on_device(table, number)[first:count], there), "other entries"
        rows = len(held.rows)
        assert all(s.row < rows and s.place < table.count[s.row] for s in table.successors)
        return coming

    def _check_kept(self, group: int, row: Row, pages: list[int], first: int) -> None:
        """A row's offered pages are those that are kept, where nothing it held can have gone."""
        for key, page in zip(row.keys[first:], pages, strict=False):
            assert self._there[key][group] == page, "a row holds a copy of its own"

    def _read_tree(self) -> None:
        """The pages that are kept, by key: each was offered, and can be reached."""
        there: dict[bytes, list[int | None]] = {}
        for node in self.cache.index.nodes():
            up: Node | None = node
            while up is not None and up.key not in there:
                assert up.reachable(), "a page that is kept can't be reached"
                if up.tokens:
                    assert up.key in self._offers.dense, "nobody offered this page"
                    there[up.key] = up.pages
                    for group, window in enumerate(self._windows):
                        assert up.pages[group] is not None or window is not None, "a gap"
                up = up.parent
        self._there = there

    def _check_tree(self, group: int, numbers: Numbers) -> None:
        """Kept pages hold what their tokens say; those that nobody holds are cached, no others."""
        allocator = self.cache.classes[group].allocator
        kept = np.zeros(allocator.capacity, bool)
        have = [(k, page) for k, pages in self._there.items() if (page := pages[group]) is not None]
        if have:
            ids = [page for _, page in have]
            kept[ids] = True
            assert int(kept.sum()) == len(ids), "two places for one page"
            dense = np.stack([self._offers.dense[key] for key, _ in have])
            expected = dense[:, :, self._columns[group]]
            slots = (np.array(ids)[:, None] * PAGE + _SLOTS).ravel()
            agree = numbers.agree(slots, expected.reshape(-1, expected.shape[2]))
            assert agree, "a kept page has other bytes"
        cached = allocator.states == CACHED
        assert np.array_equal(cached, kept & (allocator.refs == 0))

    def _check_order(self, group: int) -> None:
        """What was evicted had waited at least as long as what still waits."""
        states = self.cache.classes[group].allocator.states
        now = {k for k, pages in self._there.items() if states[pages[group] or 0] == CACHED}
        gone = [step for key, step in self._waits.items() if key not in self._there]
        stay = [step for key, step in self._waits.items() if key in now]
        if gone and stay:
            assert max(gone) <= min(stay), "a page went before one that had waited longer"
        # A page that is not in `_waits` though it waited: when it was let go is not known.
        self._waits = {
            key: self._waits.get(key, self._step)
            for key in now
            if key in self._waits or key not in self._waited
        }
        self._waited = now

    def _check_reused(self, reused: int, origin: Origin, prompt: list[int], found: Found) -> None:
        """A row begins with the most that is there for it, and no more than was ever offered."""
        ever = self._offers.find(origin, prompt[:-1], self._offers.dense)
        assert reused <= ever.tokens < len(prompt), "found what nobody offered"
        if not self.cache.index.evicted and not self._tiered:
            assert reused == self._whole(ever.tokens), (
                "what was offered, and never evicted, was not found"
            )
        if all(window is None for window in self._windows) and not self._tiered:
            assert reused == self._whole(found.tokens), "what is there was not found"
        nearest: list[bytes | None] = [*found.nearest] or [None]
        assert self._tiered or reused in {self._longest(found, key) for key in nearest}
        self.counts["rows opened"] += 1
        self.counts["hits"] += reused > 0
        self.counts["hits within a page"] += reused % PAGE > 0
        self.counts["reused tokens"] += reused

    def _whole(self, size: int) -> int:
        """As many of so many tokens as can be shared: compressed pages are shared whole."""
        return size if self._keep is None or size < self._keep * PAGE else size // PAGE * PAGE

    def _longest(self, found: Found, nearest: bytes | None) -> int:
        """The most tokens after which a sequence can go on, the last page being `nearest`'s: every
        group has what the next token sees.
        """
        pages = [self._there[key] for key in found.path]
        if nearest is not None:
            pages.append(self._there[nearest])

        def goes_on(size: int) -> bool:
            return all(
                pages[page][group] is not None
                for group, window in enumerate(self._windows)
                for page in range(
                    0 if window is None else max(size + 1 - window, 0) // PAGE, -(-size // PAGE)
                )
            )

        return next(size for size in range(self._whole(found.tokens), -1, -1) if goes_on(size))

    def _check_attention(self, held: Held, layer: int, out: np.ndarray) -> None:
        """Attention of a step is that over the dense rows; of compressed pages, what is stored."""
        assert held.new is not None
        group, _ = self.cache.place_of(layer)
        window = self._windows[group]
        start = 0
        coming = self._check_successors(group, held, held.batch._groups[group].table)
        for number, (row, (_, new)) in enumerate(zip(held.rows, held.new, strict=True)):
            both = np.concatenate((row.dense, new))[:, layer * 2 * DIM : (layer + 1) * 2 * DIM]
            k, v = both[:, :DIM], both[:, DIM:]
            behind = self._behind(held, number, layer, both, coming[number])
            expected = attention(k, v, k[len(row.tokens) :], window, behind)
            error = np.abs(out[start : start + len(new)] - expected).max(initial=0)
            assert error < 1e-5, f"attention is off by {error}"
            start += len(new)
        self.counts["attended steps"] += 1

    def _behind(
        self, held: Held, number: int, layer: int, both: np.ndarray, coming: dict[int, int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """K and V of a layer of a row, `both` when exact, as later pages see them."""
        group, of = self.cache.place_of(layer)
        pages, table = self._pages[group], held.batch._groups[group].table
        if pages.keep is None:
            return None
        size = len(held.rows[number].tokens)
        places = {
            place: int(table.pages[number, place])
            for place in range(max(pages.keep, int(table.first[number])), size // PAGE)
        } | coming
        ids = np.array(list(places.values()), np.int32)
        found, slack = pages.layer(of, ids)
        seen = both.copy()
        for place, k, v, most in zip(places, *found, slack, strict=True):
            part = slice(place * PAGE, (place + 1) * PAGE)
            stored = np.concatenate((k, v), axis=1)
            off = np.abs(stored - both[part]) <= most.repeat(DIM)
            assert off.all(), "what is stored is not what was computed"
            seen[part] = stored
        return seen[:, :DIM], seen[:, DIM:]
