"""What a tier adds to the copies it makes: host memory beside memmove, disk beside fio.

    python -m benchmarks.tiers [--rounds N] [--folder PATH] [--quick]

Records of a page's head and a body of random numbers, in batches of a call of the mover
(`OffloadOptions.call_bytes`) whose bodies lie side by side, as pages come from a device. Host: puts
of new keys into a full tier, so that each gives up as much, beside one memmove a batch; reads of
batches in random order, each body copied to a buffer, beside as many memmoves without a tier. Disk:
puts, from the second quarter on, and reads of all in random order from a disk whose pages nobody
has in memory, into aligned buffers, beside fio with direct I/O, requests of a body's size, 16 in
flight. Systems take turns; ratios are within rounds. GB/s count the bodies.
"""

import argparse
import ctypes
import functools
import mmap
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.store_disk import fio, forget
from kvpaged.geometry import PageGeometry
from kvpaged.keys import encode_tokens
from kvpaged.offload.options import OffloadOptions
from kvpaged.tiers.base import Record
from kvpaged.tiers.disk import DiskTier
from kvpaged.tiers.host import HostTier
from kvpaged.tiers.record import Head, body_bytes, record_key

SIZES = {
    64 << 10: PageGeometry(layers=1, kv_heads=2, head_dim=128, page_size=64),
    3 << 19: PageGeometry(layers=24, kv_heads=2, head_dim=128, page_size=64),
}
"""Bytes of a body, and the page they are of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Batches of records of one size, `data` `[batches, batch, size]`, and room for a batch."""

    size: int
    data: Tensor
    room: Tensor
    heads: list[Head]

    @property
    def total(self) -> int:
        """Bytes of all bodies."""
        return self.data.numel()

    def batches(self, turn: int = 0) -> Iterator[list[Record]]:
        """All of it, under keys of a turn."""
        for number, batch in enumerate(self.data):
            yield [
                Record(key_of(turn, number, at), head.encode(), body)
                for at, (head, body) in enumerate(zip(self.heads, batch, strict=True))
            ]

    def shuffled(self, turn: int = 0) -> list[list[bytes]]:
        """Keys of the batches, in random order."""
        count, batch, _ = self.data.shape
        numbers = random.Random(turn).sample(range(count), count)
        return [[key_of(turn, number, at) for at in range(batch)] for number in numbers]


def key_of(turn: int, number: int, at: int) -> bytes:
    """A key like a page's."""
    page = b"".join(each.to_bytes(4, "big") for each in (turn, number, at, 0))
    return record_key(page, 0)


def memory(size: int) -> Tensor:
    """Zero bytes that are there, aligned to pages."""
    made = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    made.numpy()[:] = 0
    return made


def load_of(size: int, total: int, batch_bytes: int) -> Load:
    """Random numbers."""
    batch = max(1, batch_bytes // size)
    count = max(4, total // (batch * size))
    rng = np.random.default_rng(size)
    data = memory(count * batch * size)
    data.numpy()[:] = np.frombuffer(rng.bytes(data.numel()), np.uint8)
    geometry = SIZES[size]
    assert body_bytes(geometry) == size
    heads = [
        Head(
            group=0, geometry=geometry, depth=1, key=rng.bytes(16), before=rng.bytes(16),
            tokens=encode_tokens(rng.integers(0, 1000, geometry.page_size)),
            sums=rng.integers(0, 1000, geometry.layers),
        )
        for _ in range(batch)
    ]  # fmt: skip
    shape = (count, batch, size)
    return Load(
        size=size, data=data.view(shape), room=memory(batch * size).view(batch, size), heads=heads
    )


def copied(load: Load, bodies: list[Tensor]) -> None:
    """Copy bodies to the room."""
    for body, out in zip(bodies, load.room, strict=False):
        ctypes.memmove(out.data_ptr(), body.data_ptr(), load.size)


# -- host ------------------------------------------------------------------------------------------


class Host:
    """A full tier, and a memory of its size without one."""

    def __init__(self, load: Load) -> None:
        self.load = load
        heads = sum(len(head.encode()) for head in load.heads) * len(load.data)
        self.tier = HostTier(load.total + heads, pin=False)
        self.plain = memory(load.total)
        self.turn = 0
        self.put()

    def put(self) -> float:
        """Bytes a second of puts."""
        self.turn += 1
        spent = 0.0
        for batch in self.load.batches(self.turn):
            start = common.clock()
            kept = self.tier.put(batch)
            spent += common.clock() - start
            assert all(kept)
        self.tier.gone.clear()
        return self.load.total / spent

    def read(self) -> float:
        """Bytes a second of reads."""
        spent = 0.0
        for keys in self.load.shuffled(self.turn):
            start = common.clock()
            with self.tier.read(keys, ()) as found:
                copied(self.load, [one.body for one in found if one is not None])
            spent += common.clock() - start
            assert all(found)
        return self.load.total / spent

    def plain_put(self) -> float:
        """Bytes a second of a memmove for each batch."""
        spent = 0.0
        batch_bytes = self.load.data[0].numel()
        for number, batch in enumerate(self.load.data):
            start = common.clock()
            ctypes.memmove(
                self.plain.data_ptr() + number * batch_bytes, batch.data_ptr(), batch_bytes
            )
            spent += common.clock() - start
        return self.load.total / spent

    def plain_read(self) -> float:
        """Bytes a second of a memmove for each body."""
        spent = 0.0
        batches = [list(batch) for batch in self.plain.view(self.load.data.shape)]
        random.Random(self.turn).shuffle(batches)
        for batch in batches:
            start = common.clock()
            copied(self.load, batch)
            spent += common.clock() - start
        return self.load.total / spent


def host_round(host: Host, *, plain: bool) -> dict[str, float]:
    """GB/s of each."""
    put, read = (host.plain_put, host.plain_read) if plain else (host.put, host.read)
    return {"host put": put() / 1e9, "host read": read() / 1e9}


# -- disk ------------------------------------------------------------------------------------------


def disk_round(load: Load, folder: Path) -> dict[str, float]:
    """GB/s of a tier's life."""
    path = Path(tempfile.mkdtemp(dir=folder))
    try:
        tier = DiskTier(path, None)
        batches = list(load.batches())
        quarter = len(batches) // 4
        for batch in batches[:quarter]:
            tier.put(batch)
        start = common.clock()
        for batch in batches[quarter:]:
            tier.put(batch)
        put = (len(batches) - quarter) * load.data[0].numel() / (common.clock() - start)
        tier.close()
        forget(path)
        tier = DiskTier(path, None)
        bodies = {record.key: record.body for batch in batches for record in batch}
        spent = 0.0
        order = random.Random(1).sample(list(bodies), len(bodies))
        for at in range(0, len(order), len(load.heads)):
            keys = order[at : at + len(load.heads)]
            room = list(load.room)[: len(keys)]
            start = common.clock()
            with tier.read(keys, room) as found:
                spent += common.clock() - start
                for key, one in zip(keys, found, strict=True):
                    if one is None or not np.array_equal(one.body.numpy(), bodies[key].numpy()):
                        raise AssertionError("it gave other bytes back")
        tier.close()
    finally:
        shutil.rmtree(path)
    return {"disk put": put / 1e9, "disk cold read": load.total / spent / 1e9}


def fio_round(load: Load, folder: Path) -> dict[str, float]:
    """GB/s of fio."""
    file = folder / "ceiling"
    ask = functools.partial(fio, file, size=load.total, block=load.size)
    try:
        put = ask("write")
        forget(folder)
        read = ask("randread")
    finally:
        file.unlink(missing_ok=True)
    return {"disk put": put / 1e9, "disk cold read": read / 1e9}


# -- people ----------------------------------------------------------------------------------------


def rows_of(
    load: Load, cases: Mapping[str, Callable[[], dict[str, float]]], rounds: int
) -> list[dict[str, Any]]:
    """One row for each phase: GB/s of the ceiling, the first case, and of the tier, the second."""
    found = common.alternate(cases, rounds)
    ceiling, ours = cases
    rows = []
    for phase in found[ours][0]:
        speeds = {name: [one[phase] for one in each] for name, each in found.items() if each}
        over = common.paired_ratio(speeds[ours], speeds[ceiling])
        rows.append({
            "bytes": load.size, "batch": len(load.heads), "phase": phase, "ceiling": ceiling,
            "gb_per_second": {name: common.summary(each) for name, each in speeds.items()},
            "ours_over_ceiling": round(over, 3),
        })  # fmt: skip
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """GB/s and ratios."""
    lines = []
    for row in rows:
        speeds = [each["median"] for each in row["gb_per_second"].values()]
        lines.append([
            f"{row['bytes'] >> 10} KiB x {row['batch']}, {row['phase']}",
            f"{row['ceiling']} {speeds[0]:.2f}", f"{speeds[1]:.2f}",
            f"{row['ours_over_ceiling']:.2f}x",
        ])  # fmt: skip
    return common.table(["records", "ceiling, GB/s", "ours", "ours/ceiling"], lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; 1 GB of it is used")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="results folder")
    chosen = parser.parse_args(arguments)
    rounds = 1 if chosen.quick else chosen.rounds
    total, batch = (6 << 20, 3 << 19) if chosen.quick else (3 << 27, OffloadOptions().call_bytes)
    where, left_out = common.environment(), [] if shutil.which("fio") else ["fio"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        for size in SIZES:
            load = load_of(size, total, batch)
            host = Host(load)
            cases = {
                "memmove": functools.partial(host_round, host, plain=True),
                "ours": functools.partial(host_round, host, plain=False),
            }
            rows += rows_of(load, cases, rounds)
            host.tier.close()
            if not left_out:
                folder = Path(name)
                disk = {
                    "fio": functools.partial(fio_round, load, folder),
                    "ours": functools.partial(disk_round, load, folder),
                }
                rows += rows_of(load, disk, rounds)
    print(common.describe(where))
    print("ceilings: memmove of the same bytes; fio, direct I/O, 16 requests in flight\n")
    print(report(rows))
    if left_out:
        print("\nnot run, because not installed: fio")
    document = {"benchmark": "tiers_copy", "environment": where, "left_out": left_out, "rows": rows}
    common.publish("tiers_copy", document, chosen.out)


if __name__ == "__main__":
    main()
