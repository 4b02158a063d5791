"""kill -9 of a real process, at random points: what it acknowledged is there."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from kvpaged.lsm.store import TensorStore
from tests.lsm.small import number_of, options

ROOT = Path(__file__).resolve().parents[2]


class Nursery(NamedTuple):
    """A process that starts others quickly."""

    ask: IO[str]
    answer: IO[str]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lsm.crashing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    yield Nursery(process.stdin, process.stdout)
    process.stdin.close()
    process.stdout.close()
    process.wait()


def kill_once(nursery: Nursery, path: Path, durability: str, seed: int, after: float) -> None:
    """Let a process put until it has said something and `after` seconds more, and kill it."""
    said = Path(f"{path}.said")
    said.write_bytes(b"")
    nursery.ask.write(f"{path} {durability} {seed}\n")
    child = int(nursery.answer.readline())
    while not said.stat().st_size:
        time.sleep(0.002)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    assert nursery.answer.readline() == "dead\n"


def acknowledged(path: Path) -> dict[str, int]:
    lines = Path(f"{path}.said").read_text().split("\n")
    pairs = (line.rpartition(" ") for line in lines[:-1] if line)
    return {key: int(number) for key, _, number in pairs}


@pytest.mark.parametrize(
    ("kills", "durability"),
    [(8, "process"), (2, "power"), pytest.param(100, "process", marks=pytest.mark.soak)],
)
def test_what_a_killed_process_acknowledged_is_there(tmp_path, nursery, kills, durability):
    rng = random.Random(kills)
    path = tmp_path / "store"
    known: dict[str, int] = {}
    puts = 0
    for seed in range(1, kills + 1):
        kill_once(nursery, path, durability, seed, rng.uniform(0, 0.3))
        said = acknowledged(path)
        known |= said
        puts += len(said)
        with TensorStore(path, options=options(codec="raw")) as store:
            store.check_integrity()
            assert store.verify() == []
            found = {key.decode(): number_of(value) for key, value in store.items()}
        unsure = 0
        for key in {*known, *found}:
            here, was = found.get(key) or 0, known.get(key, 0)
            if here != was:  # what was under way: a put, a deletion, or a batch of two
                unsure += 1
                assert here == 0 or here > was, key
            if key.startswith("with "):
                assert found.get(key) == found.get(key.removeprefix("with ")), "half a batch"
        assert unsure <= 2
        known = {key: number or 0 for key, number in found.items()}
    assert puts > kills
