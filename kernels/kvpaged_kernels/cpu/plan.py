"""Which attention calls read which pages: planned once a step, pure, on host integers.

A *part* is a run of adjacent pages of one row. A *grid* is a set of parts of equal size at equal
distances, so that one strided view, and hence one attention call, covers all of them:

    pages     | a0 | a1 | b0 | a2 | -- | c0 | b1 | c1 |        rows a, b, c; -- belongs to nobody
    grid        *    *    *    *    .    *    *    *           one call over 8 cells, one is a hole

Cells that nobody asked about are holes: computed, and dropped. Tokens a row does not see within
its cells (past its end, before its window) are masked.

Pages that several rows hold are read once for all of them: a *trunk* is a run of pages with the
same holders, whose queries go into one call. Rows that share a prefix, and their branches, form a
tree of trunks with the rows' own parts as leaves.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PART_TOKENS = 256
"""Tokens of the runs that pages are joined to where adjacent: longer parts gain nothing more."""

MAX_GAP = 8
GAP_BYTES = 400_000
"""Holes in a row that are cheaper to compute than another call (about 40 microseconds): so many
pages, and so many bytes of K and V.
"""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells at entries `start + i * step`, `i < count`, each the first `tokens` slots from there.

    - `cells`: int64, the cells that are parts; None: all of them.
    - `owners`: int64, the row of each part; `rows`: the row each cell's query comes from (holes:
      any); None: cell `i` is row `i`'s.
    - `bias`: additive mask `[count, 1, 1, tokens]` in the model's dtype; None: all tokens seen.
    """

    start: int
    step: int
    count: int
    tokens: int
    cells: Tensor | None
    owners: Tensor
    rows: Tensor | None
    bias: Tensor | None


class Trunk(NamedTuple):
    """`tokens` tokens from entry `start` on that all of `rows` (int64) see whole."""

    start: int
    tokens: int
    rows: Tensor


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The calls of one decode step. `direct`: one grid, the rows in order, nothing to merge."""

    rows: int
    grids: tuple[Grid, ...]
    direct: bool
    trunks: tuple[Trunk, ...] = ()

    @property
    def has_lane(self) -> bool:
        """Whether all rows are of one length in one grid: new tokens and old are plain views."""
        return self.direct and self.grids[0].bias is None

    def one_token_on(self) -> "DecodePlan":
        """The plan of the next step: each row a token longer, in the same pages, no window cut."""
        assert self.has_lane
        grid = self.grids[0]
        return replace(self, grids=(replace(grid, tokens=grid.tokens + 1),))


class Run(NamedTuple):
    """Positions `[first, last)` of a row whose slots are adjacent, from flat slot `slot` on."""

    first: int
    last: int
    slot: int


class RowSpan(NamedTuple):
    """Queries `[q_first, q_last)` of the step: the last positions of a row of `length` tokens."""

    q_first: int
    q_last: int
    length: int
    runs: tuple[Run, ...]


class Uniform(NamedTuple):
    """Rows of `tokens` new tokens each, one run each, `distance` slots apart: one call. What they
    have before those is in trunks.
    """

    rows: int
    tokens: int
    slot: int
    distance: int


class SpanPlan(NamedTuple):
    """Where a step's ragged queries read and write; `uniform` says the same where it is simple.

    Runs leave out what `trunks` have; `trunk_queries`: the queries of each trunk's rows, int64.
    """

    rows: tuple[RowSpan, ...]
    uniform: Uniform | None
    trunks: tuple[Trunk, ...] = ()
    trunk_queries: tuple[Tensor, ...] = ()


def plan_decode(
    table: npt.NDArray[np.int32],
    lengths: Ints,
    *,
    page_size: int,
    step: int,
    joined: bool,
    dtype: torch.dtype,
    window: int | None = None,
    page_bytes: int = 0,
) -> DecodePlan:
    """Plan the calls for one query a row.

    - `table`: int32 `[rows, width]` of entries; `lengths`: int64 `[rows]`, the query's token
      included.
    - `step`: entries between adjacent pages. `joined`: adjacent pages are one run of slots within
      a head (layer-major), so a part may have several.
    - `dtype`: of the bias.
    - `page_bytes`: of a page's K and V in one layer, which bounds the holes that are computed.
    """
    seen = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
    first, last = seen // page_size, -(-lengths // page_size)
    counts = last - first
    columns = np.arange(int(last.max(initial=0)))
    inside = (columns >= first[:, None]) & (columns < last[:, None])
    row, page = np.nonzero(inside)
    entry = table[row, page].astype(np.int64)
    trunks: tuple[Trunk, ...] = ()
    if len(lengths) > 1 and len(row):
        whole = ((page + 1) * page_size <= lengths[row]) & (page * page_size >= seen[row])
        trunks, alone = _trunks(row, page, entry, whole, page_size, step if joined else None)
        row, page, entry = row[alone], page[alone], entry[alone]
    if not len(row):
        return DecodePlan(len(lengths), (), direct=False, trunks=trunks)
    if trunks:
        counts = np.bincount(row, minlength=len(lengths))
        first[row[::-1]] = page[::-1]
    follows = np.empty(len(row), bool)  # does a page lie right after the page before it in its row?
    follows[0] = False
    follows[1:] = (
        (entry[1:] - entry[:-1] == step) & (row[1:] == row[:-1]) & (page[1:] - page[:-1] == 1)
    )
    gap = min(MAX_GAP, GAP_BYTES // page_bytes) if page_bytes else MAX_GAP
    maker = _GridMaker(lengths, seen, page_size, step, dtype, gap)
    breaks = int((~follows).sum())
    if joined and breaks == len(lengths) and (counts == counts[0]).all():
        starts = entry[~follows]
        order = np.argsort(starts, kind="stable")
        gaps = np.diff(starts[order])
        if len(gaps) == 0 or (gaps[0] > 0 and (gaps == gaps[0]).all()):
            rows = row[~follows][order]
            stride = int(gaps[0]) if len(gaps) else step
            grid = maker.make(starts[order], rows, first[rows], int(counts[0]), stride)
            direct = not trunks and bool((order[:-1] < order[1:]).all())
            return DecodePlan(len(lengths), (grid,), direct, trunks)
    grids = []
    join = PART_TOKENS // page_size if joined else 1
    if join > 1:
        place = page - first[row]
        heads = place % join == 0
        ends = np.flatnonzero(heads) + join - 1
        whole = ends < len(row)
        run = np.cumsum(~follows)
        at = np.flatnonzero(heads)[whole]
        ends = ends[whole]
        at = at[(row[ends] == row[at]) & (run[ends] == run[at])]
        taken = np.zeros(len(row), bool)
        taken[(at[:, None] + np.arange(join)).ravel()] = True
        for residue in np.unique(entry[at] // step % join):
            some = at[entry[at] // step % join == residue]
            grids += maker.cut(entry[some], row[some], page[some], join, step * join)
        rest = ~taken
    else:
        rest = np.ones(len(row), bool)
    grids += maker.cut(entry[rest], row[rest], page[rest], 1, step)
    return DecodePlan(len(lengths), tuple(grids), direct=False, trunks=trunks)


def _trunks(
    row: Ints,
    page: Ints,
    entry: Ints,
    whole: npt.NDArray[np.bool_],
    page_size: int,
    step: int | None,
) -> tuple[tuple[Trunk, ...], npt.NDArray[np.bool_]]:
    """Runs of pages that the same rows, more than one, see whole, and which parts are in none.

    Parts are pages `entry` of rows `row`, the row's `page`-th. Pages whose entries are `step` apart
    make one run; `step` None: no two do.
    """
    alone = np.ones(len(row), bool)
    pages, held, count = np.unique(entry, return_inverse=True, return_counts=True)
    if int(count.max()) < 2:
        return (), alone
    seen_whole = np.bincount(held, weights=whole) == count
    shared = (count > 1) & seen_whole
    # Holders of a page, told apart by the sum of a random number for each row.
    mark = np.random.default_rng(0).integers(0, 2**62, int(row.max()) + 1, dtype=np.uint64)
    holders = np.zeros(len(pages), np.uint64)
    np.add.at(holders, held, mark[row])
    place = np.zeros(len(pages), np.int64)
    place[held] = page
    chosen = np.flatnonzero(shared)
    order = chosen[np.lexsort((place[chosen], holders[chosen]))]
    follows = np.zeros(len(order), bool)
    if step is not None:
        follows[1:] = (
            (np.diff(pages[order]) == step)
            & (np.diff(place[order]) == 1)
            & (holders[order][1:] == holders[order][:-1])
        )
    trunks = []
    for run in np.split(order, np.flatnonzero(~follows))[1:]:
        rows = np.sort(row[held == run[0]])
        trunks.append(Trunk(int(pages[run[0]]), len(run) * page_size, torch.from_numpy(rows)))
    return tuple(trunks), ~shared[held]


class _GridMaker:
    """Turns parts (entry, row, first logical page) into grids with masks."""

    def __init__(
        self,
        lengths: Ints,
        seen: Ints,
        page_size: int,
        step: int,
        dtype: torch.dtype,
        gap: int,
    ) -> None:
        self.lengths, self.seen = lengths, seen
        self.page_size, self.step, self.dtype, self.gap = page_size, step, dtype, gap

    def cut(self, entry: Ints, row: Ints, page: Ints, pages: int, stride: int) -> list[Grid]:
        """Grids of parts of `pages` pages at multiples of `stride` from one another."""
        grids = []
        while len(entry):
            order = np.argsort(entry, kind="stable")
            entry, row, page = entry[order], row[order], page[order]
            again = np.zeros(len(entry), bool)  # a page that several rows share: next round
            again[1:] = entry[1:] == entry[:-1]
            mine = np.flatnonzero(~again)
            breaks = np.flatnonzero(
                (np.diff(entry[mine]) > (self.gap * self.step // stride + 1) * stride)
                | (np.diff(entry[mine]) % stride != 0)
            )
            for part in np.split(mine, breaks + 1):
                grids.append(self.make(entry[part], row[part], page[part], pages, stride))
            entry, row, page = entry[again], row[again], page[again]
        return grids

    def make(self, entry: Ints, row: Ints, page: Ints, pages: int, stride: int) -> Grid:
        """One grid over parts at ascending entries."""
        cell = (entry - entry[0]) // stride
        count = int(cell[-1]) + 1
        start = page * self.page_size
        low = np.maximum(self.seen[row] - start, 0)
        high = np.minimum(self.lengths[row] - start, pages * self.page_size)
        tokens = int(high.max())
        bias = None
        if (low > 0).any() or (high < tokens).any():
            slot = np.arange(tokens)
            hidden = np.zeros((count, tokens), bool)
            hidden[cell] = (slot < low[:, None]) | (slot >= high[:, None])
            bias = torch.zeros((count, 1, 1, tokens), dtype=self.dtype)
            bias.masked_fill_(torch.from_numpy(hidden)[:, None, None], -torch.inf)
        rows = np.zeros(count, np.int64)
        rows[cell] = row
        in_order = count == len(self.lengths) and bool((rows == np.arange(count)).all())
        return Grid(
            start=int(entry[0]),
            step=stride,
            count=count,
            tokens=tokens,
            cells=None if count == len(cell) else torch.from_numpy(cell),
            owners=torch.from_numpy(row),
            rows=None if in_order else torch.from_numpy(rows),
            bias=bias,
        )


def plan_spans(
    table: npt.NDArray[np.int32],
    lengths: Ints,
    cu_q: Ints,
    *,
    page_size: int,
    step: int,
    joined: bool,
    window: int | None = None,
) -> SpanPlan:
    """The runs that ragged queries read and write, row by row.

    - `table`, `lengths`, `page_size`, `step`, `joined`, `window`: as in `plan_decode`.
    - `cu_q`: int64 `[rows + 1]`; row `i`'s queries are `[cu_q[i], cu_q[i + 1])`.
    """
    starts = lengths - np.diff(cu_q)
    trunks, alone = _history_trunks(
        table, starts, cu_q, page_size, step if joined else None, window
    )
    spans = []
    for row, length in enumerate(lengths.tolist()):
        q_first, q_last = int(cu_q[row]), int(cu_q[row + 1])
        low = 0 if window is None else max(0, int(starts[row]) - window + 1)
        page = np.arange(low // page_size, -(-length // page_size))
        if trunks:
            page = page[alone[row, page]]
        entry = table[row, page].astype(np.int64)
        cuts = np.diff(page) != 1
        cuts |= np.diff(entry) != step if joined else True
        bounds = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(entry)]
        runs = tuple(
            Run(
                int(page[a]) * page_size,
                min((int(page[b - 1]) + 1) * page_size, length),
                int(entry[a]) * page_size,
            )
            for a, b in itertools.pairwise(bounds)
            if b > a
        )
        spans.append(RowSpan(q_first, q_last, length, runs))
    queries = tuple(
        torch.cat([torch.arange(*cu_q[row : row + 2].tolist()) for row in trunk.rows.tolist()])
        for trunk in trunks
    )
    return SpanPlan(tuple(spans), _uniform(spans) if joined else None, trunks, queries)


def _history_trunks(
    table: npt.NDArray[np.int32],
    starts: Ints,
    cu_q: Ints,
    page_size: int,
    step: int | None,
    window: int | None,
) -> tuple[tuple[Trunk, ...], npt.NDArray[np.bool_]]:
    """Trunks among the pages before each row's new tokens, and which of `table` are in none.

    `starts`: tokens before the new ones, int64 `[rows]`. Rows without new tokens take no part, nor
    does anything under a window, which each query sees from elsewhere on.
    """
    alone = np.ones(table.shape, bool)
    full = np.where(np.diff(cu_q) > 0, starts // page_size, 0)
    if window is not None or int((full > 0).sum()) < 2:
        return (), alone
    row, page = np.nonzero(np.arange(table.shape[1]) < full[:, None])
    entry = table[row, page].astype(np.int64)
    trunks, apart = _trunks(row, page, entry, np.ones(len(row), bool), page_size, step)
    alone[row, page] = apart
    return trunks, alone


def _uniform(spans: list[RowSpan]) -> Uniform | None:
    """What all rows have in common, if they are alike, regularly placed, and have nothing before
    their new tokens that is not in a trunk.
    """
    tokens = spans[0].q_last - spans[0].q_first
    alike = all(
        tokens == span.q_last - span.q_first
        and len(span.runs) == 1
        and span.runs[0].first == span.length - tokens
        for span in spans
    )
    if not alike or not tokens:
        return None
    slots = [span.runs[0].slot for span in spans]
    distances = {b - a for a, b in itertools.pairwise(slots)} or {0}
    if len(distances) > 1 or min(distances) < 0:
        return None
    return Uniform(len(spans), tokens, slots[0], distances.pop())


def trunk_tokens(pages: Tensor, trunk: Trunk) -> Tensor:
    """The tokens of a trunk, `[1, kv_heads, tokens, dim]`, as a view."""
    stride_entry, stride_head, stride_slot, _ = pages.stride()
    _, heads, _, dim = pages.shape
    return pages.as_strided(
        (1, heads, trunk.tokens, dim),
        (0, stride_head, stride_slot, 1),
        pages.storage_offset() + trunk.start * stride_entry,
    )


def cell_tokens(pages: Tensor, grid: Grid) -> Tensor:
    """The tokens of a grid's cells, `[count, kv_heads, tokens, dim]`, as a view."""
    stride_entry, stride_head, stride_slot, _ = pages.stride()
    _, heads, _, dim = pages.shape
    return pages.as_strided(
        (grid.count, heads, grid.tokens, dim),
        (grid.step * stride_entry, stride_head, stride_slot, 1),
        pages.storage_offset() + grid.start * stride_entry,
    )


def uniform_tokens(pages: Tensor, uniform: Uniform) -> Tensor:
    """All rows' tokens where they are uniform, `[rows, kv_heads, tokens, dim]`, as a view."""
    _, heads, _, dim = pages.shape
    _, stride_head, stride_slot, _ = pages.stride()
    return pages.as_strided(
        (uniform.rows, heads, uniform.tokens, dim),
        (uniform.distance * stride_slot, stride_head, stride_slot, 1),
        pages.storage_offset() + uniform.slot * stride_slot,
    )
