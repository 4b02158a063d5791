"""Any history of sequences over tiers that fail, hang, lie and recover: never a wrong byte."""

from collections import Counter

import pytest

from kvpaged.testing.shapes import COMPRESSED, SHAPES
from kvpaged.testing.tiered_histories import FAULTS, TIER_RULES, drive_tiers
from kvpaged.tiers.base import DEMOTIONS

STEPS, SEEDS = 200, 400
"""Steps of a history; histories of the soak."""

pytestmark = pytest.mark.usefixtures("one_thread")

POLICIES = [(first, second) for first in DEMOTIONS for second in DEMOTIONS]


@pytest.mark.parametrize("name", SHAPES)
def test_any_history_over_tiers(name, caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    counts: Counter[str] = Counter()
    for policies in (("write-back", "write-through"), ("write-through", "write-back")):
        drive_tiers(SHAPES[name], STEPS, list(SHAPES).index(name), counts, policies=policies)
    assert counts["steps"] == 2 * STEPS
    assert counts["hits"] > 10
    assert counts["promoted"] > 10
    assert counts["failures"] > 0


@pytest.mark.parametrize("name", list(COMPRESSED)[1::3])
def test_any_history_of_compressed_pages_over_tiers(name, caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    counts: Counter[str] = Counter()
    drive_tiers(COMPRESSED[name], STEPS, list(COMPRESSED).index(name), counts)
    assert counts["steps"] == STEPS
    assert counts["hits"] > 5
    assert counts["promoted"] > 5


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_histories_over_tiers(caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    counts: Counter[str] = Counter()
    shapes = [*SHAPES.values(), *COMPRESSED.values()]
    for seed in range(SEEDS):
        policies = POLICIES[seed % len(POLICIES)]
        drive_tiers(shapes[seed % len(shapes)], 2 * STEPS, seed, counts, policies=policies)
    print(", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
    for what in (*TIER_RULES, "promoted", "missed", "timeouts", *(f"fault: {x}" for x in FAULTS)):
        assert counts[what], f"no {what} in {counts['steps']} steps"
