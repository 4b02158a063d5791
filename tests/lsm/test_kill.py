"""kill -9 of a real process, at random points: what it acknowledged is there."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpaged.lsm.store import TensorStore
from tests.lsm.small import number_of, options

ROOT = Path(__file__).resolve().parents[2]


def kill_once(path: Path, durability: str, seed: int, after_s: float) -> dict[str, int]:
    """What a process had acknowledged when it was killed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lsm.crashing", str(path), durability, str(seed)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )
    assert process.stdout is not None
    lines = [process.stdout.readline()]  # it has begun
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    acknowledged = {}
    for line in lines:
        key, _, number = line.decode().strip().rpartition(" ")
        if key:
            acknowledged[key] = int(number)
    return acknowledged


@pytest.mark.parametrize(
    ("kills", "durability"),
    [(3, "process"), (1, "power"), pytest.param(100, "process", marks=pytest.mark.soak)],
)
def test_what_a_killed_process_acknowledged_is_there(tmp_path, kills, durability):
    rng = random.Random(kills)
    known: dict[str, int] = {}
    for seed in range(1, kills + 1):
        known |= kill_once(tmp_path / "store", durability, seed, rng.uniform(0, 0.4))
        with TensorStore(tmp_path / "store", options=options(codec="raw")) as store:
            store.check_integrity()
            assert store.verify() == []
            found = {key.decode(): number_of(value) for key, value in store.items()}
        unsure = 0
        for key in {*known, *found}:
            here, acknowledged = found.get(key) or 0, known.get(key, 0)
            if here != acknowledged:  # the one put that was under way, or a batch of two
                unsure += 1
                assert here == 0 or here > acknowledged, key
                assert here != 0 or not key.startswith("with "), key
            if key.startswith("with "):
                assert found.get(key) == found.get(key.removeprefix("with ")), "half a batch"
        assert unsure <= 2
        known = {key: number or 0 for key, number in found.items()}
