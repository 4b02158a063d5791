"""Flipped bytes, cut files, full and failing disks: it is named, and the rest is there."""

import errno
from contextlib import suppress

import pytest
import torch

from kvpaged.errors import IntegrityError, StorageError
from kvpaged.lsm import manifest
from kvpaged.lsm.batch import Put
from kvpaged.lsm.layout import BLOCK, checksum
from kvpaged.lsm.store import TensorStore
from kvpaged.testing.faulty_files import FaultyFiles
from tests.lsm.small import KIB, number_of, open_store, value

VALUES = {b"a": 1, b"b": 2, b"c/1": 3}


def filled(**changes: object) -> FaultyFiles:
    """A closed store of a few values, one of them replaced, one of two parts."""
    files = FaultyFiles()
    with open_store(files, **changes) as store:
        store.put(b"a", value(9, 40))
        for key, number in VALUES.items():
            store.put(key, value(number, 40), metadata={"n": number})
        store.put(b"two", {"x": value(4, 30), "y": value(5, 1100)}, parent=b"a")
    return files


def segment_of(files: FaultyFiles) -> str:
    (name,) = [name for name in files.list() if name.endswith(".seg")]
    return name


def what_is_there(store: TensorStore) -> tuple[set[bytes], set[bytes]]:
    """Keys whose values are whole, and keys that raise an error which names them."""
    whole, named = set(), set()
    for key in [*VALUES, b"two"]:
        try:
            found = store.get(key)
        except IntegrityError as error:
            if key.hex() in str(error) and store.get(key, damaged="miss") is None:
                named.add(key)
            continue
        if key == b"two" and found is not None:
            assert (number_of(found["x"]), number_of(found["y"])) == (4, 5)
            whole.add(key)
        elif found is not None:
            assert number_of(found) == VALUES[key]
            whole.add(key)
    store.check_integrity()
    return whole, named


def damage_of(files: FaultyFiles) -> list[str]:
    """What a reader says of a store, when it opens it and when it reads every byte of it."""
    with open_store(files, read_only=True) as store:
        return [*store.stats().damage, *(found.what for found in store.verify())]


STEPS = [3, pytest.param(1, marks=pytest.mark.soak)]
"""Every third byte, or each."""


@pytest.mark.parametrize("step", STEPS)
def test_each_flipped_byte_of_a_segment_is_found_and_the_rest_is_there(step):
    files = filled()
    name, contents = segment_of(files), files.contents()
    raw = contents[name]
    lost = 0
    # Every byte of headers, entries, values, index and footer, and some of the zeros between them.
    places = [at for at in range(len(raw)) if raw[at] or at % 61 == 0]
    for at in places[::step]:
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        damaged = files.with_contents({**contents, name: bytes(flipped)})
        said = damage_of(damaged)
        assert said, f"byte {at} was flipped and nobody noticed"
        assert any(name in what for what in said)
        with open_store(damaged) as store:
            whole, named = what_is_there(store)
        assert len(whole) >= 3
        assert len(whole) + len(named) == 4
        lost += len(named)
    assert lost > 400 // step  # bytes of values


def test_each_flipped_byte_of_a_manifest_is_found_and_nothing_is_lost():
    files = filled()
    contents = files.contents()
    for name in manifest.NAMES:
        for at in range(len(contents[name])):
            flipped = bytearray(contents[name])
            flipped[at] ^= 1 << at % 8
            damaged = files.with_contents({**contents, name: bytes(flipped)})
            assert any(name in what for what in damage_of(damaged)), at
            with open_store(damaged) as store:
                assert what_is_there(store) == ({*VALUES, b"two"}, set())


def test_each_truncation_is_found_and_the_rest_is_there():
    files = filled()
    contents = files.contents()
    for name in [segment_of(files), *manifest.NAMES]:
        size = len(contents[name])
        for cut in sorted({0, 1, *range(0, size, 509), size - 1}):
            damaged = files.with_contents({**contents, name: contents[name][:cut]})
            said = damage_of(damaged)
            assert any(name in what for what in said), (name, cut)
            with open_store(damaged) as store:
                whole, _ = what_is_there(store)
            if name.startswith("MANIFEST"):
                assert len(whole) == 4
            elif cut > size - 4096:
                assert len(whole) == 4, cut  # the index is lost, the groups have it all


def test_a_missing_segment_is_named_and_the_rest_is_there():
    files = FaultyFiles()
    with open_store(files) as store:
        for number in range(3):
            store.put(b"%d" % number, value(number))
            store.flush()
    contents = files.contents()
    gone = sorted(name for name in contents if name.endswith(".seg"))[1]
    with open_store(files.with_contents({n: d for n, d in contents.items() if n != gone})) as store:
        assert any(gone in what for what in store.stats().damage)
        assert [number_of(store.get(b"%d" % n)) for n in range(3)] == [0, None, 2]


def test_no_manifest_at_all_is_an_error_not_an_empty_store():
    contents = filled().contents()
    damaged = {n: b"x" * 100 if n in manifest.NAMES else d for n, d in contents.items()}
    with pytest.raises(IntegrityError, match="no manifest is whole"):
        open_store(FaultyFiles().with_contents(damaged))
    without = {n: d for n, d in contents.items() if n not in manifest.NAMES}
    with pytest.raises(IntegrityError, match="no manifest"):
        open_store(FaultyFiles().with_contents(without))


def test_another_version_is_refused_by_name():
    contents = filled().contents()
    newer = bytearray(contents["MANIFEST"])
    newer[8] = 2
    newer[56:64] = checksum(bytes(newer[:56])).to_bytes(8, "little")
    changed = {**contents, **dict.fromkeys(manifest.NAMES, bytes(newer))}
    with pytest.raises(IntegrityError, match="version 2; this reads 1"):
        open_store(FaultyFiles().with_contents(changed))


@pytest.mark.parametrize("step", STEPS)
def test_flipped_bytes_of_a_log_never_give_wrong_values(step):
    files = FaultyFiles()
    store = open_store(files)
    store.put(b"a", value(9, 40))
    for key, number in VALUES.items():
        store.put(key, value(number, 40))
    contents = files.contents()
    name = segment_of(files)
    headers = [
        contents[name][at : at + 4] == b"KVG1" for at in range(0, len(contents[name]), BLOCK)
    ]
    for at in range(0, len(contents[name]), 11 * step):
        flipped = bytearray(contents[name])
        flipped[at] ^= 1 << at % 8
        damaged = files.with_contents({**contents, name: bytes(flipped)})
        with open_store(damaged) as left:
            found = {key: number_of(left.get(key)) for key in VALUES}
            assert sum(number is not None for number in found.values()) >= 2
            # What was before may come back if a group cannot be read, for then nobody knows what
            # was in it; a damaged value is known to have replaced it.
            older = {9} if headers[at // BLOCK] else set()
            assert found[b"a"] in {None, 1} | older
            assert all(found[key] in (None, VALUES[key]) for key in (b"b", b"c/1"))
            if any(n != VALUES[key] for key, n in found.items()):
                assert left.stats().damage


def test_a_damaged_value_survives_compaction_as_damaged():
    files = filled()
    name, contents = segment_of(files), files.contents()
    raw = bytearray(contents[name])
    with open_store(files) as store:
        at = store.info(b"b").offset  # type: ignore[union-attr]
    raw[at + 3] ^= 4
    with open_store(files.with_contents({**contents, name: bytes(raw)})) as store:
        store.compact()
        with pytest.raises(IntegrityError, match=b"b".hex()):
            store.view(b"b")
        with pytest.raises(IntegrityError, match=b"b".hex()):
            store.get_many([b"a", b"b"])
        assert [found.key for found in store.verify()] == [b"b"]
        assert number_of(store.get_many([b"a", b"b"], damaged="miss")[0]) == 1
        assert store.stats().damaged == 3
        assert b"b" not in store
        store.put(b"b", value(2))
        store.compact()
        assert store.verify() == []


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_refuses_writes_and_is_still_read(background):
    files = FaultyFiles(capacity=300 * KIB)
    changes = {"background": background, "max_stall_s": 0.2}
    with open_store(files, **changes) as store:
        stored: dict[bytes, int] = {}

        def fill() -> None:
            for number in range(1000):
                store.put(b"%d" % number, value(number, 5000))
                stored[b"%d" % number] = number

        with pytest.raises(StorageError, match=r"full|refuse|index|room"):
            fill()
        assert len(stored) > 5
        for _ in range(3):
            with pytest.raises(StorageError):
                store.put(b"more", value(1, 30_000))
            assert {key: number_of(found) for key, found in store.items()} == stored
        store.check_integrity()
        files.capacity = None
        store.put(b"more", value(1, 30_000))
        stored[b"more"] = 1
    with open_store(files.killed()) as store:
        assert {key: number_of(found) for key, found in store.items()} == stored
        assert store.verify() == []


def test_a_disk_that_fails_to_write_is_still_read_and_used_again():
    files = FaultyFiles()
    with open_store(files) as store:
        store.put(b"a", value(1))
        files.failing = "write"
        for call in (lambda: store.put(b"a", value(2)), lambda: store.delete(b"a"), store.flush):
            with pytest.raises(StorageError):
                call()
        assert number_of(store.get(b"a")) == 1
        files.failing = None
        store.put(b"a", value(3))
        assert number_of(store.get(b"a")) == 3
    with open_store(files.killed()) as store:
        assert number_of(store.get(b"a")) == 3


def test_a_put_that_failed_and_was_deleted_does_not_come_back():
    ghosts = 0
    for seed in range(30):
        files = FaultyFiles(seed)
        with open_store(files) as store:
            store.put(b"before", value(1))
            files.refuse_in(1)
            with pytest.raises(StorageError):
                store.put(b"ghost", value(2, 30))
            with open_store(files.killed()) as left:
                ghosts += b"ghost" in left  # it was refused, and got to the disk all the same
            assert not store.delete(b"ghost")
            with open_store(files.killed()) as left:
                assert list(left.scan()) == [b"before"]
    assert ghosts > 0


def test_a_compaction_that_fails_leaves_nothing_behind():
    for calls in range(2, 40):
        files = filled()
        with open_store(files) as store:
            store.put(b"b", value(2, 40))
            store.flush()
            there = {name for name in files.list() if name.endswith(".seg")}
            files.refuse_in(calls)
            with suppress(StorageError):
                store.compact()
            files.refuse_in(None)
            store.flush()
            left = {name for name in files.list() if name.endswith(".seg")}
            assert len(left) == store.stats().segments
            assert store.stats().compactions == 0 or left == there or not left & there
            assert what_is_there(store) == ({*VALUES, b"two"}, set())


def test_files_stay_that_only_a_damaged_manifest_knows():
    files = filled()
    before = files.contents()
    with open_store(files) as store:
        store.put(b"new", value(7, 40))
    after = files.contents()
    # A crash between the two renamings, and then the newer manifest is damaged.
    mixed = {**after, "MANIFEST": b"x" + after["MANIFEST"][1:]}
    mixed["MANIFEST.copy"] = before["MANIFEST.copy"]
    damaged = files.with_contents(mixed)
    with open_store(damaged) as store:
        assert any("MANIFEST" in what for what in store.stats().damage)
        assert what_is_there(store) == ({*VALUES, b"two"}, set())
    assert {name for name in after if name.endswith(".seg")} <= set(damaged.list())


def test_a_disk_that_fails_to_read_says_so_and_reads_again():
    files = filled()
    with open_store(files) as store:
        files.failing = "read"
        with pytest.raises(StorageError, match="cannot be read"):
            store.get(b"a")
        assert store.get(b"a", damaged="miss") is None  # and is forgotten
        with pytest.raises(StorageError):
            store.compact()
        files.failing = None
        assert number_of(store.get(b"b")) == 2
        store.check_integrity()


def test_a_store_opens_for_reading_on_a_full_disk():
    files = filled()
    files.refuse_in(1, errno.ENOSPC)
    with open_store(files) as store:
        assert number_of(store.get(b"a")) == 1
        assert "manifest" in (store.stats().error or "")
        store.put(b"new", torch.zeros(3))


def test_a_file_that_cannot_be_opened_now_is_not_given_up():
    files = filled()
    files.failing = "read"
    with pytest.raises(StorageError, match="cannot be opened"):
        open_store(files)
    with open_store(files, read_only=True) as reader:
        assert any("lost" in what for what in reader.stats().damage)
    files.failing = None
    for _ in range(2):
        files.locked = False
        with open_store(files) as store:
            assert what_is_there(store) == ({*VALUES, b"two"}, set())
            assert store.stats().damage == ()


@pytest.mark.parametrize("atomic", [False, True])
def test_a_put_without_memory_is_nothing_and_puts_go_on(atomic, monkeypatch):
    with open_store(FaultyFiles(), segment_bytes=8 << 20, memtable_bytes=64 * KIB) as store:
        store.put(b"before", value(0))
        pool, calls = store._tree.pool, []
        take = pool.take

        def refuse(size: int) -> object:
            calls.append(size)
            if len(calls) == 2 - atomic:
                raise MemoryError
            return take(size)

        monkeypatch.setattr(pool, "take", refuse)
        coming = [store._coming(Put(b"%d" % n, value(n, 9000))) for n in range(4)]
        with pytest.raises(MemoryError):
            store._writing().put(coming, atomic=atomic)
        assert list(store.scan()) == [b"before"]
        assert store.add_many({b"%d" % n: value(n + 10, 9000) for n in range(4)}) == [True] * 4
        store.check_integrity()
        assert store.verify() == []
        assert number_of(store.get(b"3")) == 13
