"""Block tables: the device copy follows the host's by writing only what changed."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.pages.table import BlockTable


def bring_up_to_date(table: BlockTable) -> int:
    change = table.take_changes()
    if change is None:
        return 0
    assert len(set(change.places.tolist())) == len(change.places), "a place is written once"
    places = torch.from_numpy(change.places.astype(np.int64))
    table.entries.view(-1)[places] = torch.from_numpy(change.values)
    return len(change.places)


def assert_current(table: BlockTable, factor: int) -> None:
    for row in range(table.rows):
        first, last = int(table.first[row]), int(table.count[row])
        expected = table.pages[row, first:last] * factor
        assert table.entries[row, first:last].tolist() == expected.tolist()


actions = st.one_of(
    st.tuples(st.just("extend"), st.integers(0, 9), st.integers(1, 12)),
    st.tuples(st.just("cut"), st.integers(0, 9), st.integers(0, 12)),
    st.tuples(st.just("replace"), st.integers(0, 9), st.integers(0, 12)),
    st.tuples(st.just("drop"), st.integers(0, 9), st.integers(0, 4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.just(0)),
    st.tuples(st.just("flush"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=40))
def test_the_device_copy_follows_any_history(history):
    factor, fresh = 7, 1
    table = BlockTable(3, device=torch.device("cpu"), width=2)
    for action, a, b in history:
        if action == "flush":
            bring_up_to_date(table)
            assert_current(table, factor)
            continue
        if action == "select":
            rows = np.array([row % table.rows for row in a])
            held = [table.held(int(row)).tolist() for row in rows]
            table.select(rows, table.pages[rows] * factor)
            assert [table.held(row).tolist() for row in range(table.rows)] == held
            continue
        row = a % table.rows
        if action == "extend":
            ids = np.arange(fresh, fresh + b, dtype=np.int32)
            fresh += b
            table.extend(row, ids, ids * factor)
        elif action == "cut":
            before = table.held(row).tolist()
            gone = table.cut(row, b)
            assert table.held(row).tolist() + gone.tolist() == before
        elif action == "replace" and table.count[row] > table.first[row]:
            place = int(table.first[row]) + b % int(table.count[row] - table.first[row])
            table.replace(row, place, fresh, fresh * factor)
            fresh += 1
        elif action == "drop":
            first = min(int(table.first[row]) + b, int(table.count[row]))
            before = table.held(row).tolist()
            gone = table.drop_first(row, first)
            assert gone.tolist() + table.held(row).tolist() == before
    bring_up_to_date(table)
    assert_current(table, factor)
    assert bring_up_to_date(table) == 0


def test_only_what_changed_is_sent():
    table = BlockTable(4, device=torch.device("cpu"), width=100)
    for row in range(4):
        ids = np.arange(50, dtype=np.int32)
        table.extend(row, ids, ids)
    assert bring_up_to_date(table) == 200
    table.extend(2, np.array([7], np.int32), np.array([7], np.int32))
    assert bring_up_to_date(table) == 1
    table.select(np.array([0, 1, 3, 3]), table.pages[[0, 1, 3, 3]])
    assert bring_up_to_date(table) == 1, "row 2 became row 3, which differs in one place"
