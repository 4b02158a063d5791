"""How a decode step is shared out: against a model of it in plain integers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.configs import ITEM_COST, MIN_SHARE_TOKENS
from kvpaged_kernels.gpu.launch import Device
from kvpaged_kernels.gpu.plan import DecodePlan, Shape, plan_decode, plan_launch


def made(
    lengths: list[int],
    counts: list[int] | None = None,
    *,
    kv_heads: int = 2,
    group: int = 3,
    page_size: int = 16,
    window: int | None = None,
    multiprocessors: int = 4,
) -> DecodePlan:
    """A plan for a device of some multiprocessors."""
    max_q = 1 if counts is None else max([*counts, 1])
    shape = Shape(len(lengths), kv_heads, group, 64, 64, page_size, max_q, window, torch.bfloat16)
    cu_q = None
    if counts is not None:
        cu_q = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    device = Device("sm_80", multiprocessors, 99 * 1024)
    lens = torch.tensor(lengths, dtype=torch.int32)
    plan, launch = plan_launch(shape, lens, cu_q, device)
    launch.run(lens.device)
    return plan


def units_of(plan: DecodePlan, lengths: list[int], counts: list[int] | None) -> list[int]:
    """Tiles of tokens of each item, by the definition of a window; 0 where it has no queries."""
    tile, shape = plan.config.block_n, plan.shape
    align = min(tile, shape.page_size)
    units = []
    for row, length in enumerate(lengths):
        queries = 1 if counts is None else counts[row]
        begin = 0
        if shape.window is not None:
            begin = max(length - queries - shape.window + 1, 0) // align * align
        whole = -(-max(length - begin, 0) // tile)
        for item in range(plan.heads):
            first = item % (plan.heads // shape.kv_heads) * plan.config.block_m
            units.append(whole if first < queries * shape.group else 0)
    return units


def shares(plan: DecodePlan, units: list[int]) -> list[list[tuple[int, int, int]]]:
    """What each program does: `(item, first unit, end unit)`, as the kernel reads the records."""
    found = []
    for (item, unit, *_), (end_item, end_unit, *_) in itertools.pairwise(plan.records.tolist()):
        mine = []
        for at in range(item, end_item + (end_unit > 0)):
            first = unit if at == item else 0
            last = end_unit if at == end_item and end_unit > 0 else units[at]
            mine.append((at, first, last))
        found.append(mine)
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 2000) | st.just(0), min_size=1, max_size=12),
    kv_heads=st.sampled_from([1, 2, 5]),
    group=st.sampled_from([3, 8, 20]),
    page_size=st.sampled_from([16, 64, 256]),
    window=st.none() | st.integers(1, 500),
    ragged=st.booleans(),
    multiprocessors=st.integers(1, 9),
    data=st.data(),
)
def test_every_unit_is_done_once_and_shares_are_equal(
    lengths, kv_heads, group, page_size, window, ragged, multiprocessors, data
):
    counts = None
    if ragged:
        counts = [data.draw(st.integers(0, min(length, 16))) for length in lengths]
    plan = made(
        lengths, counts, kv_heads=kv_heads, page_size=page_size, window=window,
        multiprocessors=multiprocessors,
    )  # fmt: skip
    units = units_of(plan, lengths, counts)
    work = shares(plan, units)
    done: dict[int, list[tuple[int, int]]] = {}
    for mine in work:
        for item, first, last in mine:
            done.setdefault(item, []).append((first, last))
    # Every item, also of a row without tokens: its output is zeros, and someone writes them.
    assert sorted(done) == list(range(len(lengths) * plan.heads))
    for item, parts in done.items():
        ends = [0, *(last for _, last in parts)]
        assert [first for first, _ in parts] == ends[:-1]
        assert ends[-1] == units[item]
    costs = [sum(last - first + ITEM_COST * (first == 0) for _, first, last in m) for m in work]
    total = sum(units) + ITEM_COST * len(units)
    least = -(-max(MIN_SHARE_TOKENS, 2 * page_size) // plan.config.block_n) + ITEM_COST
    share = max(-(-total // plan.programs), least)
    assert sum(costs) == total
    assert max(costs) <= share + ITEM_COST
    # The merge of an item reads the parts that these records name.
    records = plan.records.tolist()
    for item, parts in done.items():
        holders = [p for p, mine in enumerate(work) if any(i == item for i, *_ in mine)]
        assert holders == list(range(holders[0], holders[0] + len(parts)))
        inside = [r for r in records[1:-1] if r[0] == item and r[1] > 0]
        assert len(inside) == len(parts) - 1
        assert all(r[2] == holders[-1] for r in inside)


def test_a_long_row_among_short_ones_keeps_nobody_waiting():
    """1 of 128k tokens among 31 of 4k on 132 multiprocessors: shares as even as those of a uniform
    batch of the same bytes, where a split by row would be 8 times over the mean.
    """
    mixed, uniform = [2**17, *[4096] * 31], [8064] * 32
    assert abs(sum(mixed) - sum(uniform)) < 128
    most = []
    for lengths in (mixed, uniform):
        plan = made(lengths, kv_heads=8, page_size=64, multiprocessors=132)
        work = shares(plan, units_of(plan, lengths, None))
        most.append(max(sum(last - first for _, first, last in mine) for mine in work))
    assert most[0] <= 1.05 * most[1]


def test_a_tile_without_queries_costs_nothing_to_speak_of():
    """One row of 16 queries among rows of one: their second tiles of queries read nothing."""
    lengths, counts = [8192] * 32, [16] + [1] * 31
    plan = made(lengths, counts, kv_heads=8, group=8, page_size=64, multiprocessors=132)
    assert plan.heads == 16
    work = shares(plan, units_of(plan, lengths, counts))
    each = [sum(last - first for _, first, last in mine) for mine in work]
    assert max(each) <= 1.1 * sum(each) / len(each)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 1000])
def test_any_number_of_rows(rows):
    lengths = [(7 * i) % 90 for i in range(rows)]
    plan = made(lengths, kv_heads=1)
    assert plan.records[0].tolist()[:2] == [0, 0]
    assert plan.records[-1].tolist()[:2] == [rows, 0]
    starts = [item * 1000 + unit for item, unit, *_ in plan.records.tolist()]
    assert starts == sorted(starts)


def test_lengths_beyond_int32_in_sum():
    """A total cost over 2**31 does not overflow: 64 rows of 2**29 tokens on 128 heads."""
    plan = made([2**29] * 64, kv_heads=128, page_size=256)
    items = [item for item, *_ in plan.records.tolist()]
    assert items == [64 * 128 * p // plan.programs for p in range(plan.programs + 1)]


def test_records_of_an_earlier_plan():
    lens = torch.tensor([100, 7], dtype=torch.int32)
    shape = Shape(2, 2, 3, 64, 64, 16, 1, None, torch.bfloat16)
    plan = plan_decode(shape, lens)
    again = plan_decode(shape, lens, records=plan.records)
    assert again == plan
    strided = torch.zeros(*plan.records.shape, 2, dtype=torch.int32)[..., 0]
    for records in (plan.records[1:], plan.records.long(), strided, plan.records.to("meta")):
        with pytest.raises(ValueError, match="records of a plan"):
            plan_decode(shape, lens, records=records)
    with pytest.raises(ValueError, match="seq_lens has 1 rows, expected 2"):
        plan_decode(shape, lens[:1])
