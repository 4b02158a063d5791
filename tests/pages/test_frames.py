"""Cutting a budget into frames: exact, and wasting under 3 % where there is room to choose."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.errors import ConfigError
from kvpaged.pages.frames import MAX_WASTE, FrameBudget, plan_frames


def test_one_class_wastes_less_than_a_page():
    plan = plan_frames(1000, [7])
    assert plan.frames == 1
    assert plan.pages_per_frame == (142,)
    assert 1000 - plan.frames * plan.frame_bytes < 7


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=4),
    unit=st.sampled_from([1, 256]),
)
def test_several_classes_waste_under_three_percent(sizes, unit):
    pages = [size * 256 for size in sizes]
    budget = 400 * sum(pages)
    plan = plan_frames(budget, pages, unit=unit)
    assert plan.frame_bytes % unit == 0
    assert plan.frames * plan.frame_bytes <= budget
    for size, count in zip(pages, plan.pages_per_frame, strict=True):
        assert count * size <= plan.frame_bytes
        rounding = 1 - count * size / plan.frame_bytes
        unused = 1 - plan.frames * plan.frame_bytes / budget
        assert rounding + unused < MAX_WASTE


def test_a_budget_below_one_page_of_each_class_is_named():
    with pytest.raises(ConfigError, match=r"pool of 29 B \(29 bytes\) .* \(10 \+ 20 bytes"):
        plan_frames(29, [10, 20])


def test_frames_run_out():
    budget = FrameBudget(1)

    class Owner:
        def surrender_frame(self) -> int | None:
            return None

        def empty_frames(self) -> int:
            return 0

        def emptiable_frames(self) -> int:
            return 0

        def oldest(self) -> int | None:
            return None

        def evict_oldest(self) -> bool:
            return False

    owner = Owner()
    budget.register(owner)
    assert budget.obtainable(owner) == 1
    assert budget.take(owner) == 0
    assert budget.take(owner) is None
