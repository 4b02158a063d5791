"""A step over pages of which full ones are compressed: what is written, coded and attended to.

Rows of one new token, served by decode, write to their open page and attend to it and to what is
before it in the form it has. Others have the pages that take their new tokens in hand, exact, one
layer at a time: those that fill are coded from there, before the layer's attention, and each query
attends to its own page of them and to the coded form of all before it.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged import mixed_ops, ops
from kvpaged.config import Backend
from kvpaged.errors import UsageError
from kvpaged.group_rows import Flags, GroupRows
from kvpaged.mixed_rows import MixedRows
from kvpaged.ops import Options
from kvpaged.pages.coding import code_layer
from kvpaged.pages.mixed import MixedClass
from kvpaged.step import GroupStep, Ints, Step
from kvpaged.step_layers import check_queries


@dataclass(slots=True)
class OwnPages:
    """The pages that take the new tokens of some rows ("own" pages), in their order.

    Attributes:
        bounds: int32 `[rows + 1]`, where each row's begin.
        count: how many there are.
        places: int64 `[tokens]`, each new token's slot, own pages side by side.
        begun, begun_entries: int64, own pages that have older tokens, and the exact pages those
            are in.
        kept, kept_slots: int64, new tokens that go into exact pages of the pool, and where
            (`entry * page_size + slot`).
        full, full_entries, full_numbers: int64, own pages that are coded, and the compressed pages
            they become: where those are, and which.
        at_hand: K and V of the layer under way, `[count, kv_heads, page_size, width]`.
    """

    bounds: Tensor
    count: int
    places: Tensor
    begun: Tensor
    begun_entries: Tensor
    kept: Tensor
    kept_slots: Tensor
    full: Tensor
    full_entries: Tensor
    full_numbers: Tensor
    at_hand: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def single_rows(counts: Ints, order: Ints | None) -> Flags:
    """Which rows of a step are served by decode: those before the first of more new tokens, if
    each of them has one (`GroupStep.parts`).
    """
    new = counts if order is None else counts[order]
    many = new > 1
    cut = int(many.argmax()) if many.any() else len(new)
    single = np.zeros(len(counts), bool)
    if cut and int(new[:cut].min()) == 1:
        single[np.arange(len(counts)) if order is None else order] = np.arange(len(new)) < cut
    return single


def plan_mixed(step: Step, groups: list[GroupRows]) -> None:
    """Have the parts of a step that are not served by decode know their own pages."""
    rows = np.arange(len(step.counts)) if step.order is None else step.order
    for rows_of, whole in zip(groups, step.groups, strict=True):
        if not isinstance(rows_of, MixedRows):
            continue
        first = 0
        for part in whole.parts or (whole,):
            mine = rows[first : first + part.rows]
            first += part.rows
            if not part.decode:
                part.own = _own_pages(rows_of, mine, step.starts[mine], step.counts[mine])


def _own_pages(of: MixedRows, rows: Ints, starts: Ints, counts: Ints) -> OwnPages:
    size, keep, table, pages = of.page_size, of.mixed.keep, of.table, of.mixed
    coming = {(each.row, each.place): each.page for each in table.successors}
    bounds, begun, kept_places, full = [0], [], [], []
    owners, slots = [], []
    for row, start, count in zip(rows.tolist(), starts.tolist(), counts.tolist(), strict=True):
        if not count:
            bounds.append(bounds[-1])
            continue
        first, last = start // size, (start + count - 1) // size
        position = np.arange(start, start + count)
        owners.append(bounds[-1] + position // size - first)
        slots.append(position % size)
        for place in range(first, last + 1):
            own, page = bounds[-1] + place - first, int(table.pages[row, place])
            if place == first and start % size:
                begun.append((own, page))
            if keep <= place and (place + 1) * size <= start + count:
                full.append((own, coming.get((row, place), page)))
            else:
                kept_places.append((own, page))
        bounds.append(bounds[-1] + last + 1 - first)
    owner = np.concatenate(owners) if owners else np.empty(0, np.int64)
    slot = np.concatenate(slots) if slots else np.empty(0, np.int64)
    home = np.full(bounds[-1], -1, np.int64)  # entries of exact pages of the pool
    for own, page in kept_places:
        home[own] = int(pages.exact.entries(np.array([page], np.int32))[0])
    kept = np.flatnonzero(home[owner] >= 0)
    begun_own, begun_ids = _columns(begun)
    full_own, full_ids = _columns(full)
    numbers = pages.numbers(full_ids.astype(np.int32))

    def sent(array: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(table.device, non_blocking=True)

    return OwnPages(
        bounds=sent(np.array(bounds)).int(), count=bounds[-1], places=sent(owner * size + slot),
        begun=sent(begun_own),
        begun_entries=sent(pages.exact.entries(begun_ids.astype(np.int32))), kept=sent(kept),
        kept_slots=sent(home[owner[kept]] * size + slot[kept]), full=sent(full_own),
        full_entries=sent(pages.sealed.entries(numbers)), full_numbers=sent(numbers),
    )  # fmt: skip


def _columns(pairs: list[tuple[int, int]]) -> tuple[Ints, Ints]:
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def write_mixed(
    group: GroupStep, pages: MixedClass, place: int, k: Tensor, v: Tensor | None, *,
    backend: Backend,
) -> None:  # fmt: skip
    """Put a layer's new K and V (`[tokens, kv_heads, width]`) into the pages of a step, and code
    those that they fill.
    """
    if v is None:
        raise UsageError("a group without V has no compressed pages")
    if group.parts:
        start = 0
        for part in group.parts:
            mine = slice(start, start := start + part.total)
            write_mixed(part, pages, place, k[mine], v[mine], backend=backend)
        return
    layer, own = pages.layers[place], group.own
    if own is None:
        ops.append(layer, k, v, group.slots, backend=backend)
        return
    assert layer.v_pages is not None
    at_hand = []
    for new, there in ((k, layer.k_pages), (v, layer.v_pages)):
        heads, size, width = there.shape[1:]
        page = new.new_zeros(own.count, size, heads, width)  # tokens lie as they came
        if own.begun.numel():
            page[own.begun] = there[own.begun_entries].transpose(1, 2)
        page.view(-1, heads, width).index_copy_(0, own.places, new)
        at_hand.append(page.transpose(1, 2))
    own.at_hand[place] = (at_hand[0], at_hand[1])
    if own.kept.numel():
        ops.append(layer, k[own.kept], v[own.kept], own.kept_slots, backend=backend)
    if own.full.numel():
        code_layer(
            pages, place, at_hand[0], at_hand[1], own.full, own.full_entries, own.full_numbers,
            backend=backend,
        )  # fmt: skip


def attend_mixed(
    group: GroupStep, pages: MixedClass, place: int, q: Tensor, options: Options, *,
    backend: Backend,
) -> Tensor:  # fmt: skip
    """Attention of a step's queries (`[tokens, q_heads, width]`): see the module."""
    check_queries(group, pages.layers[place], q)
    if group.parts:
        start, outs = 0, []
        for part in group.parts:
            mine = q[start : (start := start + part.total)]
            outs.append(attend_mixed(part, pages, place, mine, options, backend=backend))
        return torch.cat(outs)
    sealed = pages.sealed.slices[place], pages.sealed.geometry.layouts[place]
    if group.own is None:
        return mixed_ops.mixed_decode(
            pages.layers[place], *sealed, q, group.table, group.lengths, options, keep=pages.keep,
            backend=backend,
        )  # fmt: skip
    own_k, own_v = group.own.at_hand.pop(place)
    return mixed_ops.mixed_prefill(
        pages.layers[place], *sealed, q, own_k, own_v, group.own.bounds, group.table, group.cu_q,
        group.lengths, options, keep=pages.keep, max_q=group.max_q, max_len=group.max_len,
        backend=backend,
    )  # fmt: skip
