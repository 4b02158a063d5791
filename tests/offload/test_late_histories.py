"""Random histories over a device whose copies end late, wrong or never: no wrong byte is seen."""

import gc
import random

import pytest

from kvpaged.errors import OutOfPagesError
from kvpaged.testing.dense import PAGE
from tests.offload.late import OPTIONS, Device
from tests.offload.tiered import (
    cache_of,
    check,
    host,
    run,
    scramble,
    words,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def history(device: Device, seed: int, steps: int, groups: str) -> dict[str, int]:
    """Sequences that go on from each other, in a pool too small for them, over a tier."""
    rng = random.Random(seed)
    tier = host(60, policy=rng.choice(["write-through", "write-back"]))
    cache = cache_of([tier], pages=24, groups=groups, options=OPTIONS)
    prompts = [words(number, 6 * PAGE + 3) for number in range(3)]
    found = {"reused": 0, "runs": 0, "out of pages": 0}
    for _ in range(steps):
        prompt = rng.choice(prompts)
        if rng.random() < 0.2:
            prompt = prompt[: rng.randrange(len(prompt))] + words(rng.randrange(99), 2 * PAGE)
            prompts.append(prompt[: 10 * PAGE])
        try:
            found["reused"] += run(cache, prompt[: 10 * PAGE], more=rng.randrange(3))
            found["runs"] += 1
        except OutOfPagesError:  # copies that never end keep their pages
            gc.collect()
            found["out of pages"] += 1
        if rng.random() < 0.5:
            cache.flush(0.2)
            cache.clear()
            scramble(cache)
    stats = check(cache)
    found |= {"promoted": stats.tiers[0].promoted, "failed": stats.promotions_failed}
    for copies in device.copies:
        copies.close()
    cache.close()
    return found


@pytest.mark.parametrize(
    ("shares", "seeds"),
    [({}, 2), ({"corrupts": 0.1}, 2), ({"fails": 0.1}, 2), ({"never": 0.02}, 2),
     ({"corrupts": 0.05, "fails": 0.05, "never": 0.01}, 2)],
)  # fmt: skip
@pytest.mark.parametrize("groups", ["full", "full and window"])
def test_no_wrong_bytes_whatever_copies_do(monkeypatch, caplog, shares, seeds, groups):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    total: dict[str, int] = {}
    for seed in range(seeds):
        with monkeypatch.context() as patch:
            device = Device(patch, "thread", seed, delay=2e-4, **shares)
            for name, count in history(device, seed, 25, groups).items():
                total[name] = total.get(name, 0) + count
    assert total["runs"] > 10 * seeds
    assert total["promoted"] > 0
    if "never" not in shares:
        assert total["out of pages"] == 0
    if "corrupts" in shares or "fails" in shares:
        assert total["failed"] > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_no_wrong_bytes_for_long(monkeypatch, caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    rng = random.Random(0)
    for seed in range(200):
        shares = {name: rng.choice([0, 0.02, 0.1]) for name in ("corrupts", "fails", "never")}
        with monkeypatch.context() as patch:
            device = Device(patch, "thread", seed, delay=2e-4, **shares)
            assert history(device, seed, 60, rng.choice(["full", "full and window"]))["runs"]
