"""What decides without doing: lines, choices, patience, pressing; the directory; staging."""

import random
import threading

import pytest

from kvpaged.offload.directory import Directory
from kvpaged.offload.policy import Line, choose, patience, pressing
from kvpaged.offload.staging import Countdown, Staging
from kvpaged.tiers.host import HostTier


def line(start: float, rate: float, amounts: tuple[float, ...] = (1e6, 4e6, 2e6)) -> Line:
    """One that was measured at some amounts, exactly."""
    found = Line()
    for amount in amounts:
        found.add(amount, start + amount / rate)
    return found


# -- lines -----------------------------------------------------------------------------------------


def test_a_line_is_what_was_measured():
    assert Line().at(5) is None
    assert Line().rate() is None
    exact = line(0.25, 1e6)
    assert exact.at(8e6) == pytest.approx(8.25)
    assert exact.at(0) == pytest.approx(0.25)


def test_one_amount_tells_a_rate_and_no_start():
    same = line(0.5, 1e6, (2e6, 2e6, 2e6))
    assert same.at(4e6) == pytest.approx(5.0)
    assert same.rate() == pytest.approx(0.8e6)


def test_no_part_of_a_line_is_negative():
    """More took less: noise. A slope below 0 would make large loads free."""
    noisy = Line()
    noisy.add(1e6, 3.0)
    noisy.add(4e6, 1.0)
    assert noisy.at(100e6) == pytest.approx(noisy.at(0))
    steep = Line()
    steep.add(1e6, 0.1)
    steep.add(4e6, 2.0)
    assert steep.at(0) == 0
    rng = random.Random(0)
    for _ in range(200):
        some = Line()
        for _ in range(rng.randrange(1, 6)):
            some.add(rng.choice([0, 1, 1e3, 1e9]), rng.random())
        values = [some.at(amount) or 0.0 for amount in (0, 1, 1e6, 1e12)]
        assert all(value >= 0 for value in values)
        assert values == sorted(values)


def test_older_measurements_fade():
    changed = line(0.0, 1e6)
    for _ in range(60):
        for amount in (1e6, 4e6):
            changed.add(amount, amount / 1e7)
    assert changed.at(1e7) == pytest.approx(1.0, rel=0.02)


# -- load or compute -------------------------------------------------------------------------------

FAST, SLOW = line(0.0, 1e9), line(0.0, 1e6)
TOKENS = line(0.0, 1000, (100, 400))
"""1,000 tokens a second: a page of 16 takes 16 ms."""


@pytest.mark.parametrize(
    ("sizes", "loads", "compute", "pages"),
    [
        ([], [FAST], TOKENS, 0),
        ([(0, 10**6)] * 3, [FAST], TOKENS, 3),
        ([(0, 10**6)] * 3, [SLOW], TOKENS, 0),
        ([(0, 10**6)] * 3, [Line()], TOKENS, 3),
        ([(0, 10**6)] * 3, [SLOW], Line(), 3),
        # The slow tier's pages are left, those of the fast one before them are not.
        ([(0, 10**6)] * 3 + [(1, 10**6)] * 2, [FAST, SLOW], TOKENS, 3),
        # Slow pages first: fast ones behind them pay for it, or do not.
        ([(1, 10**4)] + [(0, 10**6)] * 9, [FAST, SLOW], TOKENS, 10),
        ([(1, 10**6)] + [(0, 10**6)] * 9, [FAST, SLOW], TOKENS, 0),
        # A start that a few pages do not pay for.
        ([(0, 10**3)] * 2, [line(0.05, 1e9)], TOKENS, 0),
        ([(0, 10**3)] * 20, [line(0.05, 1e9)], TOKENS, 20),
    ],
)
def test_choices(sizes, loads, compute, pages):
    assert choose(sizes, loads, compute, 16).pages == pages


def test_a_choice_says_what_it_expects():
    choice = choose([(0, 10**6)] * 4, [FAST], TOKENS, 16)
    assert choice.pages == 4
    assert choice.load_s == pytest.approx(0.004)
    assert choice.compute_s == pytest.approx(0.064)


def test_the_best_of_all_ends_is_chosen():
    """Beside every end, computed plainly."""
    rng = random.Random(1)
    for _ in range(300):
        loads = [line(rng.random() / 10, 10 ** rng.uniform(6, 9)) for _ in range(3)]
        sizes = [(rng.randrange(3), rng.randrange(10**3, 10**6)) for _ in range(8)]
        sizes = [each for each in sizes for _ in range(rng.randrange(1, 4))]

        def saved(end, sizes=sizes, loads=loads):
            amounts: dict[int, int] = {}
            for tier, size in sizes[:end]:
                amounts[tier] = amounts.get(tier, 0) + size
            load = sum(loads[tier].at(amount) for tier, amount in amounts.items())
            return TOKENS.at(end * 16) - load

        ends = [n for n in range(1, len(sizes) + 1)
                if n == len(sizes) or sizes[n][0] != sizes[n - 1][0]]  # fmt: skip
        best = max([0.0, *(saved(end) for end in ends)])
        choice = choose(sizes, loads, TOKENS, 16)
        assert (saved(choice.pages) if choice.pages else 0.0) == pytest.approx(best)


@pytest.mark.parametrize(
    ("elapsed", "saved", "left"),
    [(0.0, 0.0, 1.0), (0.4, 0.0, 0.6), (2.0, 0.0, 0.0), (2.0, 1.5, 0.5), (2.0, 9.0, 1.0)],
)  # fmt: skip
def test_patience(elapsed, saved, left):
    assert patience(1.0, elapsed, saved) == pytest.approx(left)


def test_pressing():
    assert pressing(13, 100) == 0
    assert pressing(11, 100) == 25
    assert pressing(0, 3) == 0


# -- the directory ---------------------------------------------------------------------------------


def test_the_directory_beside_plain_sets():
    tiers = [HostTier(4096, pin=False) for _ in range(3)]
    directory = Directory(tiers)
    plain: list[dict[bytes, int]] = [{} for _ in tiers]
    rng = random.Random(2)
    for _ in range(2000):
        tier, key = rng.randrange(3), rng.randrange(20).to_bytes(1, "big")
        what = rng.randrange(5)
        if what < 2:
            size = rng.randrange(100)
            directory.add(tier, key, size)
            plain[tier].pop(key, None)
            plain[tier][key] = size
        elif what == 2:
            directory.remove(tier, [key])
            plain[tier].pop(key, None)
        elif what == 3:
            tiers[tier].gone.append(key)
            directory.settle()
            plain[tier].pop(key, None)
            assert not tiers[tier].gone
        else:
            directory.touch(tier, key)
            if key in plain[tier]:
                plain[tier][key] = plain[tier].pop(key)
        assert [list(held) for held in directory.held] == [list(held) for held in plain]
        assert directory.bytes == [sum(held.values()) for held in plain]
        allowed = [rng.random() < 0.7 for _ in tiers]
        first = [n for n in range(3) if allowed[n] and key in plain[n]]
        assert directory.where(key, allowed) == (first[0] if first else None)
        missing = [each for each in list(plain[0])[:5] if each not in plain[1]]
        assert list(directory.missing_below(0, 5)) == missing


# -- staging ---------------------------------------------------------------------------------------


def test_staging_is_never_exceeded_and_comes_back_once():
    staging = Staging(16384, pin=False)
    assert staging.take(1, 32768) is None
    first = staging.take(2, 4096)
    second = staging.take(1, 8192)
    assert first is not None
    assert second is not None
    room, give_back = first
    assert (tuple(room.shape), staging.used) == ((2, 4096), 16384)
    room.fill_(1)
    second[0].fill_(2)
    assert int(room.sum()) == 8192, "rooms overlap"
    assert staging.take(1, 1024) is None
    give_back()
    give_back()
    assert staging.used == 8192
    assert staging.take(1, 16384) is None
    second[1]()
    assert staging.used == 0
    assert staging.take(1, 16384) is not None


def test_who_waits_for_staging_gets_it_when_it_comes_back():
    staging = Staging(8192, pin=False)
    taken = staging.take(1, 8192)
    assert taken is not None
    assert staging.take(1, 1024, timeout=0.01) is None
    threading.Timer(0.05, taken[1]).start()
    assert staging.take(1, 8192, timeout=30) is not None


def test_a_countdown_acts_once_from_any_threads():
    calls: list[int] = []
    countdown = Countdown(8, lambda: calls.append(1))
    threads = [threading.Thread(target=countdown) for _ in range(8)]
    for number, thread in enumerate(threads):
        assert not calls or number == 8
        thread.start()
    for thread in threads:
        thread.join()
    countdown()
    assert calls == [1]
