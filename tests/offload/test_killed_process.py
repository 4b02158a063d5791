"""kill -9 of a process that computes over a tier on disk: a new one finds its pages."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvpaged.testing.dense import PAGE
from tests.offload.killed import LENGTH, SIZE
from tests.offload.tiered import cache_of, disk, run, words

ROOT = Path(__file__).resolve().parents[2]
LAG_S = 1.0
"""Pages that entered the index so long before the end are on disk."""


def killed(path: Path, seed: int, after: float) -> float:
    """Let a process compute for so many seconds, and kill it; when that was."""
    said = Path(f"{path}.said")
    before = said.stat().st_size if said.exists() else 0
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.offload.killed", str(path), str(seed)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )  # fmt: skip
    while not said.exists() or said.stat().st_size == before:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(after)
    now = time.monotonic()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return now


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.soak)])
def test_what_had_entered_a_second_before_is_found(tmp_path, kills):
    rng = random.Random(kills)
    path, ends = tmp_path / "tier", []
    known: set[str] = set()
    for number in range(kills):
        ends.append(killed(path, 1000 * number, rng.uniform(1.5, 2.5)))
        seeds, fresh = [], 0
        for line in Path(f"{path}.said").read_text().split("\n")[:-1]:
            at, _, key = line.partition(" ")
            if not key:
                seeds.append(int(at))
            elif (ends[-2] if number else 0) < float(at) < ends[-1] - LAG_S:
                known.add(key)
                fresh += 1
        assert fresh > 20, "it computed too little to say anything"
        tier = disk(path, size=SIZE)
        there = {one.key.hex() for one in tier.scan()}
        assert not known - there, f"{len(known - there)} of {len(known)} pages are lost"
        with cache_of([tier], pages=40) as cache:
            for seed in rng.sample(seeds[: fresh // 6], 3):
                assert run(cache, words(seed, LENGTH)) == LENGTH // PAGE * PAGE
