import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from kvpaged.errors import ConfigError, StorageError
from kvpaged.geometry import PageGeometry
from kvpaged.lsm.options import StoreOptions
from kvpaged.testing.faulty_files import FaultyFiles
from kvpaged.testing.tiers import record_of, same
from kvpaged.tiers.base import KEPT, Record
from kvpaged.tiers.disk import DiskTier
from kvpaged.tiers.record import body_bytes, record_key
from tests.tiers.pages import head_of

ROOT = Path(__file__).resolve().parents[2]
KIB = 1 << 10


def options(**changes: object) -> StoreOptions:
    return StoreOptions(**{"background": False, "read_threads": 1, **changes})  # type: ignore[arg-type]


def tier_on(files: FaultyFiles, bytes: int | str | None = "2MiB", **changes: object) -> DiskTier:
    return DiskTier("unused", bytes, files=files, options=options(), **changes)  # type: ignore[arg-type]


def room(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size, dtype=torch.uint8) for size in sizes]


def page(number: int) -> Record:
    geometry = PageGeometry(layers=2, kv_heads=2, head_dim=64, page_size=64)
    head = head_of(geometry, number)
    numbers = torch.randn(
        body_bytes(geometry) // 2, generator=torch.Generator().manual_seed(number)
    )
    body = numbers.to(torch.bfloat16).view(torch.uint8)
    return Record(record_key(head.key, 0), head.encode(), body, record_key(head.before, 0))


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_page_is_stored_as_numbers_of_its_dtype(codec):
    tier = tier_on(FaultyFiles(), codec=codec)
    one, other = page(1), record_of(b"p", 1001)
    added = one._replace(key=b"added", head=one.head + b"12345678")
    assert tier.put([one, other, added]) == [True] * 3
    for key, dtype in ((one.key, torch.bfloat16), (b"added", torch.bfloat16), (b"p", torch.uint8)):
        assert tier.store.get(key)["kv"].dtype == dtype
    info = tier.store.info(one.key)
    assert info is not None
    assert info.parent == one.parent
    assert (info.stored < 0.85 * info.nbytes) == (codec == "lossless")
    size = one.body.numel()
    with tier.read([b"p", one.key, b"away", one.key], room(1001, size + 9, 0, size)) as found:
        assert found[2] is None
        for want, got in zip((other, one, one), (found[0], found[1], found[3]), strict=True):
            assert got is not None
            same(want, got)
    tier.close()


def test_it_is_read_to_where_it_is_wanted_at_any_address():
    tier = tier_on(FaultyFiles())
    one = page(2)
    tier.put([one])
    for shift in (0, 1, 2, 7, 64):
        memory = torch.zeros(one.body.numel() + 100, dtype=torch.uint8)
        with tier.read([one.key], [memory[shift:]]) as (found,):
            assert found is not None
            assert found.body.data_ptr() == memory.data_ptr() + shift
            same(one, found)
    odd = torch.zeros(one.body.numel() + 1, dtype=torch.uint8)[1:].copy_(one.body)
    assert tier.put([one._replace(key=b"odd", body=odd)]) == [True]
    with (
        pytest.raises(ConfigError, match="has 65,536 bytes, the room 100"),
        tier.read([one.key], room(100)),
    ):
        pass
    tier.store.put(b"foreign", torch.zeros(3))
    with (
        pytest.raises(ConfigError, match="is no record: it has"),
        tier.read([b"foreign"], room(100)),
    ):
        pass
    tier.close()


def test_home_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with_home = DiskTier("~/pages", None, options=options())
    assert with_home.usage().capacity is None
    with_home.close()
    assert (tmp_path / "pages" / "MANIFEST").exists()


def test_what_is_damaged_is_not_there_and_is_named():
    files = FaultyFiles()
    tier = tier_on(files)
    tier.put([record_of(b"p1", 9000), record_of(b"p2", 9000)])
    tier.close()
    contents = files.killed().contents()
    name = next(name for name in contents if name.endswith(".seg"))
    data = bytearray(contents[name])
    data[data.find(record_of(b"p1", 9000).body.numpy().tobytes()) + 77] ^= 4
    tier = tier_on(files.with_contents({**contents, name: bytes(data)}))
    with tier.read([b"p1", b"p2"], room(9000, 9000)) as found:
        assert [one is None for one in found] == [True, False]
    assert list(tier.gone) == [b"p1"]
    assert [one.key for one in tier.scan()] == [b"p2"]
    tier.close()


def test_a_disk_that_refuses_is_an_error_and_nothing_is_lost():
    files = FaultyFiles()
    tier = tier_on(files)
    tier.put([record_of(b"p1", 5000)])
    files.failing = "write"
    with pytest.raises(StorageError, match=r"cannot be (written|made)"):
        tier.put([record_of(b"p2", 5000)])
    files.failing = None
    assert tier.put([record_of(b"p2", 5000)]) == [True]
    assert tier.usage().records == 2
    assert not tier.gone
    tier.close()


def test_records_of_one_put_may_drive_each_other_out(tmp_path):
    """Whoever put the first held its file, which the third waited half a minute for."""
    with closing(DiskTier(tmp_path, "1MiB")) as tier:
        for turn in range(3):
            records = [record_of(b"%d %d" % (turn, n), 300 * KIB) for n in range(3)]
            start = time.monotonic()
            assert tier.put(records) == [True] * 3
            assert time.monotonic() - start < 10
            with tier.read([records[-1].key], room(300 * KIB)) as (found,):
                assert found is not None
                same(records[-1], found)
        assert len(tier.gone) == 9 - tier.usage().records
        tier.check_integrity()


def test_values_that_were_found_and_never_written_are_named():
    files = FaultyFiles()
    tier = tier_on(files, durability="none")
    assert tier.put([record_of(b"p1", 5000)]) == [True]
    files.failing = "write"
    with pytest.raises(StorageError):
        tier.store.flush()
    assert list(tier.gone) == [b"p1"]
    files.failing = None
    tier.close()


def test_saved_sessions_are_kept_until_nothing_else_has_room():
    tier = tier_on(FaultyFiles(), "1MiB")
    size, kept = 20 * KIB, 15
    for number in range(kept):
        assert tier.put([record_of(b"p%d" % number, size)]) == [True]
        assert tier.put([record_of(KEPT + b"%d" % number, size)]) == [True]
    more = [record_of(KEPT + b"more%d" % number, size) for number in range(15)]
    with pytest.raises(StorageError, match="may not be evicted"):
        tier.put(more)
    assert not any(key.startswith(KEPT) for key in tier.gone)
    keys = [KEPT + b"%d" % number for number in range(kept)]
    with tier.read(keys, room(*[size] * kept)) as found:
        assert all(found)
    assert tier.put([record_of(b"p", 1 << 20), record_of(keys[0], size)]) == [False, True]
    tier.close()


def test_a_reader_sees_what_another_puts_and_changes_nothing():
    files, now = FaultyFiles(), [0.0]
    writer = tier_on(files)
    writer.put([record_of(b"p1", 5000)])
    reader = tier_on(files, read_only=True, clock=lambda: now[0])
    assert reader.put([record_of(b"p1", 5000), record_of(b"p9", 10)]) == [False, False]
    reader.delete([b"p1"])
    writer.put([record_of(b"p2", 6000)])
    for seconds, there in ((0.5, False), (0.6, True)):
        now[0] += seconds
        with reader.read([b"p1", b"p2"], room(5000, 6000)) as (one, two):
            assert one is not None
            same(record_of(b"p1", 5000), one)
            assert (two is not None) == there
    writer.put([record_of(b"p3", 10)])
    assert {one.key for one in reader.scan()} == {b"p1", b"p2", b"p3"}
    reader.close()
    writer.close()


def test_scan_tells_the_oldest_first():
    tier = tier_on(FaultyFiles())
    for key in (b"p5", b"p1", b"p3"):
        tier.put([record_of(key, 100)])
    assert [one.key for one in tier.scan()] == [b"p5", b"p1", b"p3"]
    tier.close()


CHILD = """
import sys
from kvpaged.testing.tiers import record_of
from kvpaged.tiers.disk import DiskTier
tier = DiskTier(sys.argv[1], "64MiB")
for number in range(10**6):
    keys = [b"p%d %d" % (number, n) for n in range(3)]
    assert tier.put([record_of(key, 30_000) for key in keys]) == [True] * 3
    print(number, flush=True)
"""


def test_what_a_killed_process_put_is_there(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "store")]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert child.stdout is not None
    with child, child.stdout:
        said = 0
        while said < 60:
            said = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in child.stdout if line.endswith("\n"))])
    tier = DiskTier(tmp_path / "store", "64MiB")
    keys = [b"p%d %d" % (number, n) for number in range(said + 1) for n in range(3)]
    with tier.read(keys, room(*[30_000] * len(keys))) as found:
        for key, got in zip(keys, found, strict=True):
            assert got is not None, key
            same(record_of(key, 30_000), got)
    tier.check_integrity()
    tier.close()
