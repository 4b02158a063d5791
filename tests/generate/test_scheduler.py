"""Decisions of the scheduler over hand-made states."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.generate import scheduler
from kvpaged.generate.scheduler import OVERTAKES, PATIENCE, Prospect, Waiting


def step(rows, *, budget=100, chunk=100):
    """`rows`: (done, known, drafts, prefilling, rank) each."""
    done, known, drafts, prefilling, rank = (np.array(x) for x in zip(*rows, strict=True))
    plan = scheduler.plan_step(
        done=done, known=known, drafts=drafts, prefilling=prefilling.astype(bool), rank=rank,
        budget=budget, chunk=chunk,
    )  # fmt: skip
    return list(zip(plan.order.tolist(), plan.counts.tolist(), strict=True))


def test_replies_come_first_and_prompts_share_the_rest_by_rank():
    rows = [(0, 50, 0, 1, 7), (9, 10, 0, 0, 9), (0, 50, 0, 1, 3), (4, 5, 0, 0, 1)]
    assert step(rows, budget=62) == [(1, 1), (3, 1), (2, 50), (0, 10)]
    assert step(rows, budget=62, chunk=20) == [(1, 1), (3, 1), (2, 20), (0, 20)]


def test_a_full_step_still_moves_a_prompt():
    rows = [(9, 10, 0, 0, 0), (9, 10, 0, 0, 1), (0, 30, 0, 1, 2)]
    assert step(rows, budget=2) == [(0, 1), (1, 1), (2, 1)]


def test_single_tokens_stand_before_drafts_and_chunks():
    rows = [(9, 10, 3, 0, 0), (29, 30, 0, 1, 1), (0, 30, 0, 1, 2), (9, 10, 0, 0, 3)]
    assert step(rows) == [(3, 1), (1, 1), (0, 4), (2, 30)]


def test_empty_rows_take_no_part():
    assert step([(0, 0, 0, 0, 0), (5, 5, 0, 0, 1)]) == []


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_step_spends_its_budget_and_loses_nobody(data):
    rows = []
    for rank in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["reply", "prompt", "empty"]))
        rest = data.draw(st.integers(1, 40))
        drafts = data.draw(st.integers(0, 3))
        rows.append(
            {"reply": (5, 6, drafts, 0, rank), "prompt": (2, 2 + rest, 0, 1, rank),
             "empty": (0, 0, 0, 0, rank)}[kind]
        )  # fmt: skip
    budget, chunk = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 40))
    plan = dict(step(rows, budget=budget, chunk=chunk))
    replies = [i for i, row in enumerate(rows) if row[1] > row[0] and not row[3]]
    prompts = [i for i, row in enumerate(rows) if row[3]]
    assert all(plan[i] == 1 + rows[i][2] for i in replies)
    spent = sum(plan[i] for i in replies)
    assert all(1 <= plan[i] <= min(chunk, rows[i][1] - rows[i][0]) for i in prompts if i in plan)
    assert sum(plan.values()) <= max(budget, spent + 1)
    if prompts:
        assert prompts[0] in plan  # the first in the line always moves
        wanted = sum(min(chunk, rows[i][1] - rows[i][0]) for i in prompts)
        assert sum(plan.values()) >= min(spent + wanted, budget)
    served = [i for i in prompts if i in plan]
    assert served == prompts[: len(served)]


def admit(waiting, *, slots=100, room=(100,), computing=(), need=None, found=None):
    waiting.sort(key=lambda w: w.rank)

    def prospect(place):
        rank = waiting[place].rank
        return Prospect((found or {}).get(rank, 0), ((need or {}).get(rank, 1),))

    chosen = scheduler.admit(
        waiting, slots=slots, room=room, computing=computing, prospect=prospect
    )
    return [waiting[place].rank for place in chosen]


def test_priority_moves_up_the_line_by_a_bounded_number():
    assert scheduler.rank_of(300, 1) < scheduler.rank_of(45, 0)
    assert scheduler.rank_of(45 + PATIENCE + 1, 1) > scheduler.rank_of(45, 0)


def test_admission_stops_at_rows_and_pages():
    line = [Waiting(rank, 1, ()) for rank in range(5)]
    assert admit(line, slots=3) == [0, 1, 2]
    assert admit(line, room=(5,), need=dict.fromkeys(range(5), 2)) == [0, 1]
    assert admit([Waiting(0, 3, ()), Waiting(1, 1, ())], slots=2) == [1]


def test_who_shares_a_prefix_being_computed_waits_for_it():
    line = [Waiting(0, 1, (1, 2, 3)), Waiting(1, 1, (1, 2, 4)), Waiting(2, 1, (9,))]
    assert admit(line) == [0, 2]
    assert admit(line, computing={1, 2, 3}) == [2]
    assert admit(line, computing={3}, found={0: 2, 1: 2}) == [1, 2]
    assert admit(line, found={0: 3, 1: 2}) == [0, 1, 2]


def test_who_shares_a_first_page_goes_together():
    line = [Waiting(0, 1, (1,)), Waiting(1, 1, (2,)), Waiting(2, 1, (1,)), Waiting(3, 1, (2,))]
    found = dict.fromkeys(range(4), 1)
    assert admit(line, found=found) == [0, 2, 1, 3]


def test_nobody_is_overtaken_for_ever():
    """One that needs the whole pool among ever new ones that need a page each."""
    number = 1
    admitted: list[int] = []
    line = [Waiting(0, 1, ())]
    while 0 not in admitted:
        line.append(Waiting(number, 1, ()))
        number += 1
        running = 50 if len(admitted) < OVERTAKES else 0  # those that run end, sooner or later
        chosen = admit(line, room=(100 - running,), need={0: 100})
        line = [w for w in line if w.rank not in chosen]
        admitted += chosen
        assert number < 3 * OVERTAKES, "starved"
    assert admitted.index(0) <= OVERTAKES


def test_the_victim_is_last_in_the_line():
    assert scheduler.choose_victim(np.array([0, 2, 3]), np.array([5, 99, 8, 7])) == 2
