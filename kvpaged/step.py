"""A step: the tokens a forward pass adds to the rows of a batch, and what kernels need to know of
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged import ops
from kvpaged.config import Backend
from kvpaged.group_rows import GroupRows
from kvpaged.ops import LayerPages, Options
from kvpaged.pages.stage import Stage
from kvpaged_kernels.checks import MAX_DECODE_QUERIES
from kvpaged_kernels.cpu.lane import Lane, attend_lane, fits_lane, write_lane
from kvpaged_kernels.cpu.plan import DecodePlan, SpanPlan

if TYPE_CHECKING:
    from kvpaged_kernels.gpu.plan import DecodePlan as SharePlan

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class GroupStep:
    """A step as one layer group sees it.

    Attributes:
        table: int32 `[rows, width]` on the device.
        lengths: int32 `[rows]`, new tokens included.
        cu_q: int32 `[rows + 1]`, where each row's new tokens begin.
        positions, owners: int32 `[tokens]`, each new token's place in its row, and its row.
        page_size: token slots a page.
        max_len: the longest row.
        hint: the plan of the step before, if this one is that one a token on.
        decode_plan, lanes, spans: the CPU's calls, made when first needed and shared by the group's
            layers.
        shares: how a GPU's programs share a decode, by the number of query heads.
    """

    table: Tensor
    lengths: Tensor
    cu_q: Tensor
    positions: Tensor
    owners: Tensor
    page_size: int
    max_len: int
    decode_plan: DecodePlan | None = None
    spans: SpanPlan | None = None
    lanes: list[Lane] | None = None
    hint: DecodePlan | None = None
    shares: dict[int, "SharePlan"] = field(default_factory=dict)
    _slots: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """Where the new tokens go, int64 `[tokens]`: worked out once, when first asked for."""
        if self._slots is None:
            entry = self.table[self.owners, self.positions // self.page_size]
            self._slots = entry.long() * self.page_size + self.positions % self.page_size
        return self._slots


@dataclass(slots=True)
class Step:
    """New tokens of every row, with pages to hold them.

    Attributes:
        counts: new tokens a row, int64 `[rows]` on the host.
        starts: tokens a row had before.
        decode: every row has exactly one new token.
        total: new tokens of all rows.
        max_q: the most new tokens a row has.
        groups: one for each layer group.
        positions: int32 `[tokens]` on the first group's device: `starts[row] ..` of each row.
        cu_seqlens: int32 `[rows + 1]` there: where each row's tokens begin.
        tokens: int32 `[tokens]` there, or empty: their ids, where `begin` was told them.
        attended: layers whose attention ran.
        written: layers whose K and V are in the pages.
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
    attended: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


def make_step(
    counts: Ints,
    starts: Ints,
    groups: Sequence[GroupRows],
    stages: dict[torch.device, Stage],
    hints: Sequence[DecodePlan | None],
    ids: npt.NDArray[np.int32] | None = None,
) -> Step:
    """Tell each device of a step, in one transfer a device: lengths, positions, and what changed in
    its tables.

    `hints`: the plans of the step before, where every row has grown by one token since.
    `ids`: token ids that the first group's device should have too.
    """
    rows = len(counts)
    tokens = int(counts.sum())
    cu_q = np.zeros(rows + 1, np.int32)
    np.cumsum(counts, out=cu_q[1:])
    row_of = np.repeat(np.arange(rows, dtype=np.int32), counts)
    position = np.arange(tokens, dtype=np.int32) - np.repeat(cu_q[:-1] - starts, counts).astype(
        np.int32
    )
    lengths = (starts + counts).astype(np.int32)
    tables = [group.table for group in groups]
    steps: list[GroupStep | None] = [None] * len(tables)
    first: tuple[Tensor, Tensor, Tensor] | None = None
    for device, stage in stages.items():
        mine = [i for i, table in enumerate(tables) if table.device == device]
        changes = [tables[i].take_changes() for i in mine]
        extra = [array for change in changes if change for array in change]
        wanted = ids if ids is not None and tables[0].device == device else row_of[:0]
        sent = stage.send([cu_q, lengths, position, row_of, wanted, *extra])
        cu, lens, positions, owners = sent[:4]
        extras = iter(sent[5:])
        for i, change in zip(mine, changes, strict=True):
            entries = tables[i].entries
            if change:
                places, values = next(extras), next(extras)
                entries.view(-1)[places.long()] = values
            steps[i] = GroupStep(
                table=entries, lengths=lens, cu_q=cu, positions=positions, owners=owners,
                page_size=groups[i].page_class.geometry.page_size,
                max_len=int(lengths.max(initial=0)),
                hint=None if change else hints[i],
            )  # fmt: skip
        if tables[0].device == device:
            first = positions, cu, sent[4]
    assert first is not None
    return Step(
        counts=counts,
        starts=starts,
        decode=bool((counts == 1).all()),
        total=tokens,
        max_q=int(counts.max(initial=0)),
        groups=[step for step in steps if step is not None],
        positions=first[0],
        cu_seqlens=first[1],
        tokens=first[2],
    )


def write_layer(
    step: Step,
    group: GroupStep,
    layers: Sequence[LayerPages],
    place: int,
    k: Tensor,
    v: Tensor | None,
    *,
    backend: Backend,
    window: int | None,
) -> None:
    """Put a layer's new K and V (`[tokens, kv_heads, width]`) into the pages of a step."""
    pages = layers[place]
    if backend == "cpu" and not torch.compiler.is_compiling():
        plan_layers(step, group, layers, window)
        if group.lanes is not None and v is not None:
            lane, rows = group.lanes[place], len(step.counts)
            k_rows, v_rows = _by_rows(k, rows), _by_rows(v, rows)
            if fits_lane(lane, k_rows, v_rows):
                write_lane(lane, k_rows, v_rows)
                return
    ops.append(pages, k, v, group.slots, backend=backend, spans=group.spans)


def _by_rows(tokens: Tensor, rows: int) -> Tensor:
    """`[tokens, heads, dim]` of rows with equally many tokens as `[rows, heads, new, dim]`."""
    by_rows: Tensor = tokens.unflatten(0, (rows, -1)).transpose(1, 2)
    return by_rows


def attend_layer(
    step: Step,
    group: GroupStep,
    layers: Sequence[LayerPages],
    place: int,
    q: Tensor,
    options: Options,
    *,
    backend: Backend,
) -> Tensor:
    """Attention of a step's queries (`[tokens, q_heads, width]`) over what is in the pages by
    now.
    """
    pages = layers[place]
    _check_queries(step, pages, q)
    plain = options.softcap is None and options.sinks is None and options.alibi_slopes is None
    if group.lanes is not None and plain:
        out = attend_lane(_by_rows(q, len(step.counts)), group.lanes[place], options.scale)
        return out.transpose(1, 2).flatten(0, 1)
    few = backend != "cpu" and 0 < step.max_q <= MAX_DECODE_QUERIES
    if step.decode or few:
        cu_q = None if step.decode else group.cu_q
        plan: DecodePlan | SharePlan | None = group.decode_plan
        if backend == "triton":
            plan = group.shares.get(q.shape[1])
            if plan is None and not torch.compiler.is_compiling():
                plan = _shares(step, group, pages, q.shape[1], options.window)
        return ops.decode(
            pages, q, group.table, group.lengths, options,
            backend=backend, cu_q=cu_q, max_q=step.max_q, plan=plan,
        )  # fmt: skip
    return ops.prefill(
        pages, q, group.table, group.cu_q, group.lengths, options,
        max_q=step.max_q, max_len=group.max_len, backend=backend, spans=group.spans,
    )  # fmt: skip


def _shares(
    step: Step, group: GroupStep, pages: LayerPages, q_heads: int, window: int | None
) -> "SharePlan":
    """The plan of a step for layers of these heads, made for the first of them."""
    cu_q = None if step.decode else group.cu_q
    plan = ops.plan_shares(pages, q_heads, group.lengths, window, cu_q=cu_q, max_q=step.max_q)
    group.shares[q_heads] = plan
    return plan


def _check_queries(step: Step, pages: LayerPages, q: Tensor) -> None:
    """Raise ValueError unless queries are one for each new token, and fit the keys."""
    kv_heads, width = pages.k_pages.shape[1], pages.k_pages.shape[3]
    fits = q.ndim == 3 and q.shape[2] == width and q.dtype == pages.flat.dtype
    if not fits or q.shape[0] != step.total or not q.shape[1] or q.shape[1] % kv_heads:
        raise ValueError(
            f"queries must be [{step.total} tokens, a multiple of {kv_heads} heads, {width}] of "
            f"{pages.flat.dtype}, got {tuple(q.shape)} of {q.dtype}"
        )


def plan_layers(
    step: Step, group: GroupStep, layers: Sequence[LayerPages], window: int | None
) -> None:
    """Plan a step on a CPU, once for all layers of its group; its lanes too, if it has some."""
    if group.decode_plan is not None or group.spans is not None:
        return
    whole = window is None or group.max_len <= window
    if step.decode:
        hint = group.hint
        if hint is not None and hint.has_lane and whole:
            plan = hint.one_token_on()
        else:
            plan = ops.plan_decode(layers[0], group.table, group.lengths, window)
        group.decode_plan = plan
        lanes = [ops.decode_lane(pages, plan) for pages in layers]
    else:
        spans = ops.plan_spans(layers[0], group.table, group.cu_q, group.lengths, window)
        group.spans = spans
        lanes = [ops.prefill_lane(pages, spans) for pages in layers] if whole else []
    group.lanes = [lane for lane in lanes if lane is not None] or None
    if not layers[0].joined and group.spans is None:
        group.spans = ops.plan_spans(layers[0], group.table, group.cu_q, group.lengths, window)
