"""A step: the tokens a forward pass adds to the rows of a batch, and what kernels need to know of
it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.group_rows import GroupRows
from kvpaged.offload.promotion import Promotion
from kvpaged.pages.stage import Stage
from kvpaged_kernels.cpu.lane import Lane
from kvpaged_kernels.cpu.plan import DecodePlan, SpanPlan

if TYPE_CHECKING:
    from kvpaged.mixed_step import OwnPages
    from kvpaged_kernels.gpu.plan import DecodePlan as SharePlan

Ints = npt.NDArray[np.int64]
Index = slice | Ints


@dataclass(slots=True)
class GroupStep:
    """A step, or one part of it, as one layer group sees it: some rows, and what they add.

    Attributes:
        table: int32 `[rows, width]` on the device.
        lengths: int32 `[rows]`, new tokens included.
        cu_q: int32 `[rows + 1]`, where each row's new tokens begin.
        positions, owners: int32 `[tokens]`, each new token's place in its row, and its row.
        page_size: token slots a page.
        max_len: the longest row.
        rows, total: how many rows, and new tokens.
        max_q: the most new tokens a row has.
        decode: every row has exactly one.
        parts: the same step in two, where rows of few new tokens come first and rows of many
            follow: each is served by what serves its kind fastest. Else empty.
        hint: the plan of the step before, if this one is that one a token on.
        decode_plan, lanes, spans: the CPU's calls, made when first needed and shared by the group's
            layers.
        shares: how a GPU's programs share a decode, by the number of query heads.
        picked: the batch's rows that take part, int32, if not all do.
        own: of a group whose full pages are compressed, where it isn't served by decode: the pages
            that take its new tokens.
    """

    table: Tensor
    lengths: Tensor
    cu_q: Tensor
    positions: Tensor
    owners: Tensor
    page_size: int
    max_len: int
    rows: int
    total: int
    max_q: int
    decode: bool
    parts: "tuple[GroupStep, ...]" = ()
    decode_plan: DecodePlan | None = None
    spans: SpanPlan | None = None
    lanes: list[Lane] | None = None
    hint: DecodePlan | None = None
    shares: dict[int, "SharePlan"] = field(default_factory=dict)
    picked: Tensor | None = None
    own: "OwnPages | None" = None
    _slots: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """Where the new tokens go, int64 `[tokens]`: worked out once, when first asked for."""
        if self._slots is None:
            entry = self.table[self.owners, self.positions // self.page_size]
            self._slots = entry.long() * self.page_size + self.positions % self.page_size
        return self._slots

    def skip_empty_rows(self) -> None:
        """Of a step of one token a row: what rows of length 0 have goes nowhere (slot -1)."""
        self._slots = torch.where(self.lengths > 0, self.slots, -1)


@dataclass(slots=True)
class Step:
    """New tokens of every row, with pages to hold them.

    Attributes:
        counts: new tokens of each row of the batch, int64 `[rows]` on the host.
        starts: tokens a row had before.
        order: the rows that take part, in the order of their tokens; `None`: all, as they come.
        decode: every row has exactly one new token.
        total: new tokens of all rows.
        max_q: the most new tokens a row has.
        groups: one for each layer group.
        positions: int32 `[tokens]` on the first group's device: `starts[row] ..` of each row.
        cu_seqlens: int32 `[rows + 1]` there: where the tokens of each row that takes part begin.
        tokens: int32 `[tokens]` there, or empty: their ids, where `begin` was told them.
        more: int32 there, or empty: whatever else `begin` was told to send along.
        attended: layers whose attention ran.
        written: layers whose K and V are in the pages.
        gates: promotions of pages that rows hold and that land layer by layer.
    """

    counts: Ints
    starts: Ints
    decode: bool
    total: int
    max_q: int
    groups: list[GroupStep]
    positions: Tensor
    cu_seqlens: Tensor
    tokens: Tensor
    more: Tensor
    order: Ints | None = None
    attended: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    gates: tuple[Promotion, ...] = ()

    def wait_layer(self, group: int, place: int) -> None:
        """Have attention over a layer's pages come after they have landed.

        Raises:
            LoadError: they have not.
        """
        for gate in self.gates:
            gate.wait_layer(group, place)

    def at_page_end(self, lengths: Ints, page_size: int) -> Ints:
        """Of a step of one token a row: the rows whose last page is full at these lengths."""
        if self.order is None:
            return np.flatnonzero(lengths % page_size == 0)
        rows: Ints = self.order[lengths[self.order] % page_size == 0]
        return rows


def make_step(
    counts: Ints,
    starts: Ints,
    groups: Sequence[GroupRows],
    stages: dict[torch.device, Stage],
    hints: Sequence[DecodePlan | None],
    ids: npt.NDArray[np.int32] | None = None,
    *,
    order: Ints | None = None,
    more: npt.NDArray[np.int32] | None = None,
) -> Step:
    """Tell each device of a step, in one transfer a device: lengths, positions, and what changed in
    its tables.

    Args:
        counts, starts: of each row of the batch, new tokens and those before them.
        groups: the batch's.
        stages: one a device.
        hints: the plans of the step before, where every row has grown by one token since.
        ids: token ids that the first group's device should have too, in the order of the step.
        order: see `Step.order`; every row with new tokens is in it, once.
        more: what else the first group's device should have.
    """
    new, had = (counts, starts) if order is None else (counts[order], starts[order])
    rows = len(new)
    longest = int(new.max(initial=0))
    decode = longest == 1 and int(new.min()) == 1
    lengths = (had + new).astype(np.int32)
    if decode:
        tokens, cu_q = rows, _arange(rows + 1)
        row_of, position = cu_q[:-1], had.astype(np.int32)
    else:
        cu_q = np.zeros(rows + 1, np.int32)
        np.cumsum(new, out=cu_q[1:])
        tokens = int(cu_q[-1])
        row_of = np.repeat(np.arange(rows, dtype=np.int32), new)
        position = np.arange(tokens, dtype=np.int32) - np.repeat(cu_q[:-1] - had, new).astype(
            np.int32
        )
    most = int(lengths.max(initial=0))
    tables = [group.table for group in groups]
    steps: list[GroupStep | None] = [None] * len(tables)
    nothing = row_of[:0]
    first: list[Tensor] = []
    for device, stage in stages.items():
        mine = [i for i, table in enumerate(tables) if table.device == device]
        changes = [tables[i].take_changes() for i in mine]
        extra = [array for change in changes if change for array in change]
        home = tables[0].device == device
        told = [x if x is not None and home else nothing for x in (ids, more)]
        chosen = nothing if order is None else order.astype(np.int32)
        sent = stage.send([cu_q, lengths, position, row_of, chosen, *told, *extra])
        cu, lens, positions, owners, picked = sent[:5]
        extras = iter(sent[7:])
        for i, change in zip(mine, changes, strict=True):
            entries = tables[i].entries
            if change:
                places, values = next(extras), next(extras)
                entries.view(-1).index_copy_(0, places.long(), values)
            whole = GroupStep(
                table=_table_of(entries, order, picked), lengths=lens, cu_q=cu,
                positions=positions, owners=owners,
                page_size=groups[i].page_class.geometry.page_size,
                max_len=most, rows=rows, total=tokens,
                max_q=longest, decode=decode, hint=None if change else hints[i], picked=picked,
            )  # fmt: skip
            few = groups[i].few
            steps[i] = whole if longest <= few else _in_parts(whole, new, lengths, cu_q, few)
        if home:
            first = [positions, cu, *sent[5:7]]
    return Step(
        counts=counts,
        starts=starts,
        decode=decode,
        total=tokens,
        max_q=longest,
        groups=[step for step in steps if step is not None],
        positions=first[0],
        cu_seqlens=first[1],
        tokens=first[2],
        more=first[3],
        order=order,
    )


def next_step(
    last: Step,
    groups: Sequence[GroupRows],
    stages: dict[torch.device, Stage],
    hints: Sequence[DecodePlan | None],
    more: npt.NDArray[np.int32] | None = None,
) -> Step:
    """`make_step` for one more token of each row that `last` gave one: a device works out lengths
    and positions by itself, and is told what has changed in its tables, if anything has.

    Args:
        last: a step of one token a row, committed.
        groups, stages, hints: as of `make_step`.
        more: what else the first group's device should have; `None`: what it had.
    """
    steps: dict[int, GroupStep] = {}
    told, nothing = last.more, np.empty(0, np.int32)
    for device, stage in stages.items():
        mine = [i for i, group in enumerate(groups) if group.table.device == device]
        changes = [groups[i].table.take_changes() for i in mine]
        extra = [array for change in changes if change for array in change]
        home = groups[0].table.device == device
        given = more if more is not None and home else nothing
        extras: Iterator[Tensor] = iter(())
        if extra or given.size:
            sent = stage.send([given, *extra])
            told = sent[0] if given.size else told
            extras = iter(sent[1:])
        lengths: Tensor | None = None
        for i, change in zip(mine, changes, strict=True):
            before, entries = last.groups[i], groups[i].table.entries
            lengths = before.lengths + 1 if lengths is None else lengths
            table = before.table
            if change:
                places, values = next(extras), next(extras)
                entries.view(-1).index_copy_(0, places.long(), values)
                table = _table_of(entries, last.order, before.picked)
            steps[i] = GroupStep(
                table=table, lengths=lengths, cu_q=before.cu_q, positions=before.lengths,
                owners=before.owners, page_size=before.page_size, max_len=before.max_len + 1,
                rows=before.rows, total=before.total, max_q=1, decode=True,
                hint=None if change else hints[i], picked=before.picked,
            )  # fmt: skip
    ordered = [steps[i] for i in range(len(groups))]
    return Step(
        counts=last.counts, starts=last.starts + last.counts, decode=True, total=last.total,
        max_q=1, groups=ordered, positions=ordered[0].positions, cu_seqlens=last.cu_seqlens,
        tokens=last.tokens[:0], more=told, order=last.order,
    )  # fmt: skip


def _table_of(entries: Tensor, order: Ints | None, picked: Tensor | None) -> Tensor:
    """The rows of a table that take part in a step; those side by side as a view."""
    if order is None:
        return entries
    index = as_index(order)
    return entries[index] if isinstance(index, slice) else entries[picked]


def as_index(rows: Ints) -> Index:
    """Rows of a batch, or the slice that is the same where they lie side by side."""
    count = len(rows)
    if count and int(rows[-1]) - int(rows[0]) == count - 1 and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


@lru_cache(maxsize=64)
def _arange(stop: int) -> npt.NDArray[np.int32]:
    numbers = np.arange(stop, dtype=np.int32)
    numbers.flags.writeable = False
    return numbers


def _in_parts(
    whole: GroupStep, new: Ints, lengths: npt.NDArray[np.int32], cu_q: npt.NDArray[np.int32],
    few: int,
) -> GroupStep:  # fmt: skip
    """`whole` with its parts, if it begins with rows of at most `few` new tokens and has others."""
    many = new > few
    cut = int(many.argmax())
    if not cut or not many[cut]:
        return whole
    parts = []
    for low, high in ((0, cut), (cut, whole.rows)):
        start, stop = int(cu_q[low]), int(cu_q[high])
        most = int(new[low:high].max())
        parts.append(
            GroupStep(
                table=whole.table[low:high],
                lengths=whole.lengths[low:high],
                cu_q=whole.cu_q[low : high + 1] - start,
                positions=whole.positions[start:stop],
                owners=whole.owners[start:stop] - low,
                page_size=whole.page_size,
                max_len=int(lengths[low:high].max()),
                rows=high - low,
                total=stop - start,
                max_q=most,
                decode=most == 1 and stop - start == high - low,
            )
        )
    whole.parts = tuple(parts)
    return whole
