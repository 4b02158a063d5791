"""The store on disk beside fio, LMDB, RocksDB and a file for each value.

    python -m benchmarks.store [--rounds N] [--folder PATH] [--only SIZE] [--quick]

Every system writes the same bf16 values in batches of 16 MiB, the first quarter untimed (memory is
got there), is closed, forgotten by the page cache and opened again; then the values are read in
random order, in batches of 16 MiB, from disk (cold), and again from memory (warm): looked at where
they lie, one element of each 4 KiB, and copied into a buffer. Systems take turns, so that each
round has all of them; ratios are within rounds. GB/s count the tensors' bytes. The ceiling is fio
with direct I/O, requests of a value's size, 16 in flight.

`process` asks that values survive the process, `power` that each batch is synced as well. Then a
store of many small values: opening it in a fresh process, memory for each, and missing keys.
"""

import argparse
import functools
import json
import mmap
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.store_disk import file_bytes, fio, forget, resident
from benchmarks.store_peers import NEEDS, PEERS, SYSTEMS, Ours, System, missing

SIZES = (1 << 16, 1 << 19, 1 << 21)
PHASES = ("write", "write, synced", "cold read", "warm view", "warm copy")
"""GB/s of each system; `write, synced` is at durability `power`, the rest at `process`."""
SMALL = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is written and read: `values` of `size` bytes each, `batch` at a time."""

    size: int
    data: Tensor
    buffers: list[Tensor]
    batch: int

    @property
    def total(self) -> int:
        """Bytes."""
        return self.data.nbytes

    def items(self) -> list[tuple[bytes, Tensor]]:
        """Keys and values, in the order they are written."""
        return [(key_of(number), value) for number, value in enumerate(self.data)]

    def batches(self, *, seed: int) -> Iterator[list[tuple[bytes, Tensor]]]:
        """All of them, in another order."""
        items = self.items()
        random.Random(seed).shuffle(items)
        return chunks(items, self.batch)


def key_of(number: int) -> bytes:
    """32 bytes, like a digest."""
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Some at a time."""
    return (list(items[at : at + size]) for at in range(0, len(items), size))


def load_of(size: int, total: int, batch_bytes: int) -> Load:
    """Numbers as keys and values have them: normal, each channel with a scale of its own."""
    count, batch = max(1, total // size), max(1, batch_bytes // size)
    scales = torch.rand(64).mul(4).exp2()
    noise = torch.randn(count * size // 128, 64, dtype=torch.float32).mul_(scales)
    memory = mmap.mmap(-1, batch * size)  # aligned to pages, as pinned memory is
    buffers = torch.frombuffer(memory, dtype=torch.bfloat16).reshape(batch, -1)
    buffers.zero_()
    data = noise.to(torch.bfloat16).reshape(count, -1)
    return Load(size=size, data=data, buffers=list(buffers), batch=batch)


# -- a system's life -------------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = common.clock()
    call()
    return common.clock() - start


def write(system: System, load: Load) -> float:
    """Bytes a second of putting everything, from the second quarter on."""
    batches = list(chunks(load.items(), load.batch))
    first = len(batches) // 4

    def put(some: list[list[tuple[bytes, Tensor]]]) -> None:
        for batch in some:
            system.put(batch)

    put(batches[:first])
    return load.size * sum(map(len, batches[first:])) / timed(lambda: put(batches[first:]))


def cold(system: System, load: Load) -> float:
    """Bytes a second of reading everything into buffers; what was read is compared meanwhile."""
    spent = 0.0
    for batch in load.batches(seed=1):
        keys, into = [key for key, _ in batch], load.buffers[: len(batch)]
        spent += timed(functools.partial(system.read, keys, into))
        for (_, value), out in zip(batch, into, strict=True):
            if not torch.equal(value, out):
                raise AssertionError("it gave other bytes back")
    return load.total / spent


def warm(system: System, load: Load, use: Callable[[Tensor, Tensor], object]) -> float:
    """Bytes a second of viewing everything and using it."""

    def once() -> None:
        for batch in batches:
            for view, out in zip(system.view(batch), load.buffers, strict=False):
                use(view, out)

    batches = [[key for key, _ in batch] for batch in load.batches(seed=2)]
    return load.total / common.seconds(once, repeat=2)


def touch(view: Tensor, out: Tensor) -> object:
    """Have every page of 4 KiB in memory."""
    return view.view(torch.int16).numpy()[::2048].sum()


def copy(view: Tensor, out: Tensor) -> object:
    """Copy it."""
    return out.copy_(view)


def life(make: Callable[..., System], load: Load, folder: Path) -> dict[str, float]:
    """GB/s of every phase, and bytes on disk over bytes put."""
    found = {}
    for power in (True, False):
        path = Path(tempfile.mkdtemp(dir=folder))
        try:
            system = make(path, power=power)
            found["write, synced" if power else "write"] = write(system, load)
            system.close()
            forget(path)
            if power:
                continue
            space = file_bytes(path) / load.total
            system = make(path, power=power)
            found["cold read"] = cold(system, load)
            found["warm view"] = warm(system, load, touch)
            found["warm copy"] = warm(system, load, copy)
            system.close()
        finally:
            shutil.rmtree(path)
    return {**{phase: found[phase] / 1e9 for phase in PHASES}, "space": space}


def ceiling(load: Load, folder: Path) -> dict[str, float]:
    """GB/s of fio; from memory, of a copy."""
    found = {}
    file = folder / "ceiling"
    ask = functools.partial(fio, file, size=load.total, block=load.size)
    try:
        found["write, synced"] = ask("write", sync_every=load.batch * load.size)
        file.unlink()
        found["write"] = ask("write")
        forget(folder)
        found["cold read"] = ask("randread")
    finally:
        file.unlink(missing_ok=True)
    return {phase: each / 1e9 for phase, each in found.items()}


def rows_of(load: Load, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each phase at one size: GB/s of each system, and ours over the others."""
    absent = missing()
    cases: dict[str, Callable[[], dict[str, float]]] = {
        name: functools.partial(life, make, load, folder)
        for name, make in SYSTEMS.items()
        if name not in absent
    }
    if "fio" not in absent:
        cases = {"fio": functools.partial(ceiling, load, folder), **cases}
    found = common.alternate(cases, rounds)
    rows = []
    for phase in PHASES:
        speeds = {
            name: [one[phase] for one in each] for name, each in found.items() if phase in each[0]
        }
        over = {
            name: round(common.paired_ratio(speeds["ours"], each), 3)
            for name, each in speeds.items()
            if name in ("fio", *PEERS)
        }
        rows.append({
            "bytes": load.size, "values": len(load.data), "phase": phase,
            "gb_per_second": {name: common.summary(each) for name, each in speeds.items()},
            "ours_over": over,
            "space": {n: round(each[0]["space"], 4) for n, each in found.items() if n != "fio"},
        })  # fmt: skip
    return rows


# -- many small values -----------------------------------------------------------------------------


def build(make: Callable[..., System], path: Path, values: int) -> None:
    """A store of so many values of 256 bytes."""
    system = make(path, power=False)
    data = torch.randn(4096, SMALL // 2).to(torch.bfloat16)
    for numbers in chunks(range(values), 4096):
        system.put([(key_of(number), data[number % 4096]) for number in numbers])
    system.close()


def opened(path: Path, values: int) -> dict[str, float]:
    """In this process, which has done nothing yet: seconds to open, memory, missing keys."""
    import kvpaged.lsm.store

    assert kvpaged.lsm.store
    before = resident()
    start = common.clock()
    system = Ours(path, power=False)
    spent = common.clock() - start
    after = resident()
    if len(system.store) != values:
        raise AssertionError(f"{len(system.store)} values of {values}")
    store, away = system.store, [key_of(-1 - n & (1 << 63) - 1) for n in range(4096)]
    found = {
        "open_seconds": spent,
        "own_bytes_per_value": (after["Anon"] - before["Anon"]) / values,
        "mapped_bytes_per_value": (after["File"] - before["File"]) / values,
        "missing_contains_us": each_us(store.contains, away),
        "missing_get_us": each_us(store.get, away),
        "present_contains_us": each_us(store.contains, [key_of(n) for n in range(4096)]),
    }
    system.close()
    return found


def each_us(call: Callable[[bytes], object], keys: Sequence[bytes]) -> float:
    """Microseconds of a call, for each of some keys."""
    return 1e6 * common.seconds(lambda: [call(key) for key in keys]) / len(keys)


def missing_us(make: Callable[..., System], path: Path) -> float:
    """Microseconds to find that a peer does not have a key."""
    system = make(path, power=False)
    found = each_us(system.has, [key_of(-1 - n & (1 << 63) - 1) for n in range(4096)])
    system.close()
    return found


def many(folder: Path, values: int, rounds: int) -> dict[str, Any]:
    """A store of many values: opening, memory, missing keys; peers are asked for missing keys."""
    path = Path(tempfile.mkdtemp(dir=folder))
    try:
        build(Ours, path / "ours", values)
        names = [name for name in NEEDS if name not in missing()]
        for name in names:
            build(SYSTEMS[name], path / name, values)
        runs, others = [], []
        for _ in range(rounds):
            forget(path)
            command = [sys.executable, "-m", "benchmarks.store", "--open", str(path / "ours")]
            done = subprocess.run(
                [*command, "--values", str(values)], check=True, cwd=common.ROOT,
                capture_output=True, text=True, env=common.tree_env(),
            )  # fmt: skip
            runs.append(json.loads(done.stdout))
            others.append({name: missing_us(SYSTEMS[name], path / name) for name in names})
        figures = {name: common.summary([run[name] for run in runs]) for name in runs[0]}
        peers = {name: common.summary([run[name] for run in others]) for name in names}
        return {"values": values, **figures, "peers_missing_us": peers}
    finally:
        shutil.rmtree(path)


# -- people ----------------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]]) -> str:
    """GB/s of each, fio first, then ours over fio and over the best peer."""
    names = ["fio", *SYSTEMS]
    lines = []
    for row in rows:
        speeds = row["gb_per_second"]
        over = row["ours_over"]
        peers = [over[name] for name in PEERS if name in over]
        lines.append([
            f"{row['bytes'] >> 10} KiB, {row['phase']}",
            *(f"{speeds[name]['median']:.2f}" if name in speeds else "" for name in names),
            f"{over['fio']:.2f}x" if "fio" in over else "",
            f"{over['LMDB']:.2f}x" if "LMDB" in over else "",
            f"{min(peers):.2f}x" if peers else "",
        ])  # fmt: skip
    return common.table(["values", *names, "ours/fio", "ours/LMDB", "ours/best peer"], lines)


def report_many(found: dict[str, Any]) -> str:
    """What many values cost."""

    def of(name: str) -> float:
        return float(found[name]["median"])

    peers = "".join(f", {n} {p['median']:.2f}" for n, p in found["peers_missing_us"].items())
    return (
        f"{found['values']:,} values of {SMALL} bytes: opened in {of('open_seconds'):.2f} s, cold; "
        f"memory for each: {of('own_bytes_per_value'):.0f} bytes of its own, "
        f"{of('mapped_bytes_per_value'):.0f} of mapped files\n"
        f"a missing key: contains {of('missing_contains_us'):.2f} us, get "
        f"{of('missing_get_us'):.2f}{peers}; one that is there: {of('present_contains_us'):.2f}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; 1 GB of it is used")
    parser.add_argument("--only", type=int, choices=SIZES, help="values of this size only")
    parser.add_argument("--values", type=int, default=500_000, help="of the store of small values")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="results folder")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.open is not None:
        print(json.dumps(opened(chosen.open, chosen.values)))
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)  # copies and comparisons are the benchmark's own
    quick = chosen.quick
    rounds, values = (1, 4096) if quick else (chosen.rounds, chosen.values)
    sizes = SIZES[:1] if quick else (chosen.only,) if chosen.only else SIZES
    total, batch = (1 << 20, 1 << 18) if quick else (3 << 27, 1 << 24)
    where = common.environment()
    rows = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        for size in sizes:
            rows += rows_of(load_of(size, total, batch), folder, rounds)
        small = many(folder, values, rounds) if values else None
    print(common.describe(where))
    print("ceiling: fio, direct I/O, 16 requests of a value's size in flight; GB/s\n")
    print(report(rows))
    if small is not None:
        print(f"\n{report_many(small)}")
    if missing():
        print(f"not run, because not installed: {', '.join(missing())}")
    document = {
        "benchmark": "store", "environment": where, "left_out": missing(), "rows": rows,
        "small": small,
    }  # fmt: skip
    common.publish("store", document, chosen.out)


if __name__ == "__main__":
    main()
