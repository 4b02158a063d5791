"""Threads and processes that share a store, and what it holds on to."""

import errno
import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable

import pytest
import torch

from kvpaged.errors import StorageError, UsageError
from kvpaged.lsm.files import LocalFiles, LocalLock, OpenFiles
from kvpaged.lsm.store import TensorStore
from kvpaged.testing.faulty_files import FaultyFiles
from tests.lsm.small import KIB, number_of, open_store, options, value


def test_one_process_writes_and_the_error_names_it(tmp_path):
    named = rf"process {os.getpid()} on"
    with TensorStore(tmp_path), pytest.raises(StorageError, match=named):
        TensorStore(tmp_path)
    TensorStore(tmp_path).close()


def in_a_fork(act: Callable[[], object]) -> str:
    """What a forked process says of a call: the error, or what came."""
    end, start = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = repr(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(start, said.encode())
        os._exit(0)
    os.close(start)
    os.waitpid(child, 0)
    said = os.read(end, 4096).decode()
    os.close(end)
    return said


@pytest.mark.filterwarnings("ignore:This process.*fork")
def test_a_forked_process_is_told_to_open_a_store_of_its_own(tmp_path):
    with TensorStore(tmp_path, codec="raw") as store, store.snapshot() as snapshot:
        store.put(b"a", value(1, 5000))
        for act in (
            lambda: store.put(b"a", value(2)), lambda: store.get(b"a"), store.flush, store.stats,
            lambda: snapshot.get(b"a"), lambda: list(store.items()), store.compact,
        ):  # fmt: skip
            said = in_a_fork(act)
            assert said.startswith("UsageError")
            assert f"process {os.getpid()} opened" in said
        before = sorted(path.name for path in tmp_path.iterdir())
        assert in_a_fork(store.close) == "None"
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        store.put(b"b", value(3))
        with pytest.raises(StorageError, match="open for writing"):
            TensorStore(tmp_path)

        def read_anew() -> int | None:
            with TensorStore(tmp_path, read_only=True) as own:
                return number_of(own.get(b"b"))

        assert in_a_fork(read_anew) == "3"


@pytest.mark.filterwarnings("ignore:This process.*fork")
def test_a_forked_process_does_not_keep_a_store_locked(tmp_path):
    store = TensorStore(tmp_path)
    end, start = os.pipe()
    child = os.fork()
    if not child:
        os.close(start)
        os.read(end, 1)
        os._exit(0)
    try:
        store.close()
        TensorStore(tmp_path).close()
    finally:
        os.close(start)
        os.close(end)
        os.waitpid(child, 0)


def test_a_reader_that_cannot_look_again_stays_as_it_was(monkeypatch):
    files = FaultyFiles()
    with open_store(files) as store:
        store.put_many({b"a": value(1), b"b": value(2)})
        store.flush()
        with open_store(files, read_only=True) as reader:
            store.put(b"a", value(3))
            store.flush()
            store.put(b"b", value(4))
            opened, last = files.open, sorted(set(files.list()) - {"MANIFEST", "MANIFEST.copy"})[-1]

            def refuse(name: str, **given: bool) -> object:
                if name == last:
                    raise OSError(errno.EMFILE, "too many open files", name)
                return opened(name, **given)

            monkeypatch.setattr(files, "open", refuse)
            with pytest.raises(StorageError, match="too many"):
                reader.refresh()
            reader.check_integrity()
            assert [number_of(reader.get(key)) for key in (b"a", b"b")] == [1, 2]
            monkeypatch.undo()
            reader.refresh()
            assert [number_of(reader.get(key)) for key in (b"a", b"b")] == [3, 4]


def test_a_flush_does_not_wait_for_puts_that_come_meanwhile(monkeypatch):
    with open_store(FaultyFiles(), durability="none") as store:
        keeper = store._keeper
        assert keeper is not None
        save = keeper._save
        turns: list[int] = []

        def put_more() -> bool:
            """What another thread may do: fill a file, which then waits to be sealed."""
            if not turns:
                turns.append(1)
                store.put_many({b"%d" % n: value(n, 9000) for n in range(8)})
            return save()

        store.put(b"a", value(1))
        monkeypatch.setattr(keeper, "_save", put_more)
        store.flush()
        assert store._tree.sealing
        assert b"a" in open_store(store._files.killed())  # type: ignore[attr-defined]
        assert len(store) == 9


def test_a_store_that_was_dropped_is_not_locked(tmp_path):
    store = TensorStore(tmp_path, options=options())
    store.put(b"a", value(1))
    del store
    gc.collect()
    with TensorStore(tmp_path) as again:
        assert number_of(again.get(b"a")) == 1


def test_a_lock_that_cannot_be_named_holds_and_is_let_go(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(os, "pwrite", full)
    lock = LocalLock(tmp_path / "LOCK")
    with pytest.raises(StorageError, match="an unnamed process"):
        LocalLock(tmp_path / "LOCK")
    lock.close()
    LocalLock(tmp_path / "LOCK").close()


def test_a_store_stays_where_it_is_wherever_the_process_goes(tmp_path, monkeypatch):
    for place in (tmp_path / "here", tmp_path / "there" / "store"):
        place.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with TensorStore("store", options=options()) as store:
        monkeypatch.chdir(tmp_path / "there")
        store.put_many({b"%d" % n: value(n, 20_000) for n in range(5)})
        store.flush()
    assert list((tmp_path / "there" / "store").iterdir()) == []
    with TensorStore(tmp_path / "here" / "store") as store:
        assert len(store) == 5


def test_readers_see_what_a_writer_has_written():
    files = FaultyFiles()
    with pytest.raises(StorageError, match="no store"):
        open_store(files, read_only=True)
    with open_store(files) as store:
        store.put_many({b"%d" % n: value(n, 3000) for n in range(30)})
        with open_store(files, read_only=True) as reader:
            assert number_of(reader.get(b"7")) == 7
            seen = reader.view(b"0")
            store.put(b"7", value(70))
            store.delete(b"8")
            assert number_of(reader.get(b"7")) == 7
            for settle in (lambda: None, store.flush, store.compact):
                settle()
                reader.refresh()
                reader.check_integrity()
                assert number_of(reader.get(b"7")) == 70
                assert reader.get(b"8") is None
                assert len(reader) == 29
                assert reader.verify() == []
            assert number_of(seen) == 0
            for put in (reader.put, reader.add, reader.replace):
                with pytest.raises(UsageError, match="reading"):
                    put(b"a", value(1))
            for care in (reader.flush, reader.compact, reader.batch):
                with pytest.raises(UsageError, match="reading"):
                    care()


def test_threads_put_and_get_at_the_same_time(tmp_path):
    changes = {"background": True, "max_bytes": 8 << 20, "segment_bytes": 512 * KIB}
    errors: list[BaseException] = []
    with TensorStore(tmp_path, options=options(**changes, read_threads=4)) as store:

        def work(worker: int) -> None:
            try:
                for turn in range(60):
                    key, number = b"%d-%d" % (worker, turn % 7), 1000 * worker + turn
                    store.put(key, value(number, 3000))
                    assert number_of(store.get(key)) == number
                    other = b"%d-%d" % ((worker + 1) % 4, turn % 7)
                    number_of(store.get(other))
                    if turn % 20 == 7:
                        assert store.delete(key)
                        assert store.get(key) is None
                        for _ in store.items(b"%d" % worker):
                            pass
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        store.check_integrity()
        kept = {key: number_of(found) for key, found in store.items()}
        assert len(kept) == 28
        store.flush()
        assert store.verify() == []
    with TensorStore(tmp_path, options=options(**changes)) as store:
        store.check_integrity()
        assert {key: number_of(found) for key, found in store.items()} == kept


def test_readers_follow_a_writer_at_work(tmp_path):
    given = {"background": True, "codec": "raw", "segment_bytes": 256 * KIB}
    writer = TensorStore(tmp_path, options=options(**given))
    writer.put_many({b"%d" % n: value(0, 3000) for n in range(8)})
    done = threading.Event()

    def work() -> None:
        for turn in range(1, 250):
            writer.put(b"%d" % (turn % 8), value(turn, 3000))
            if turn % 60 == 0:
                writer.compact()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    last = [0] * 8
    with TensorStore(tmp_path, read_only=True, options=options()) as reader:
        while True:
            finished = done.is_set()
            reader.refresh()
            reader.check_integrity()
            seen = [number_of(found) for found in reader.get_many([b"%d" % n for n in range(8)])]
            assert all(now is not None and now >= was for now, was in zip(seen, last, strict=True))
            last = [now or 0 for now in seen]
            if finished:
                break
        assert last == [number_of(writer.get(b"%d" % n)) for n in range(8)]
    thread.join()
    writer.close()


def test_memory_per_value_is_bounded(tmp_path):
    count = 4096
    with TensorStore(tmp_path, options=options(segment_bytes=256 << 20)) as store:
        store.put_many({b"key %d" % n: value(n, 8) for n in range(count)})
    with TensorStore(tmp_path, options=options()) as store:
        store.get(b"key 7")
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        with TensorStore(tmp_path, read_only=True, options=options()) as second:
            assert len(second) == count
            gc.collect()
            used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    assert used / count < 200 + 2**21 / count  # the filters' rows, for up to thousands of segments


def test_files_are_opened_as_they_are_needed():
    opened = OpenFiles(FaultyFiles(), most=2)
    files = opened._files
    for name in "abc":
        files.open(name, create=True)
    first = opened.get("a")
    assert opened.get("a") is first
    opened.get("b")
    opened.get("c")
    assert opened.get("a") is not first
    opened.drop("a")
    with pytest.raises(FileNotFoundError):
        opened.get("d")


def test_a_snapshots_files_count_until_it_is_closed():
    with open_store(FaultyFiles()) as store:
        store.put_many({b"%d" % n: value(n, 3000) for n in range(30)})
        store.flush()
        before = store.stats().used_bytes
        snapshot = store.snapshot()
        store.delete_many([b"%d" % n for n in range(30)])
        store.compact()
        assert store.stats().used_bytes > before - 64 * KIB
        assert number_of(snapshot.get(b"29")) == 29
        snapshot.close()
        gc.collect()
        assert store.stats().used_bytes < 64 * KIB


def test_a_flush_that_waited_for_the_end_saves_nothing(tmp_path):
    store = TensorStore(tmp_path / "s", codec="raw")
    store.put_many({b"%02d" % i: torch.full((64, 64), float(i)) for i in range(20)})
    keeper = store._keeper
    assert keeper is not None
    store.close()
    for late in (keeper.flush, keeper.compact):
        with pytest.raises(UsageError, match="closed"):
            late()
    assert not keeper.work()
    with TensorStore(tmp_path / "s") as again:
        assert len(again) == 20
        assert not again.stats().damage


def test_closing_beside_flushes_loses_nothing(tmp_path):
    for trial in range(5):
        path = tmp_path / str(trial)
        store = TensorStore(path, codec="raw")
        store.put_many({b"%02d" % i: torch.zeros(16, 1024) for i in range(20)})
        ended: list[BaseException] = []

        def flush(store=store, ended=ended):
            try:
                while True:
                    store.flush()
            except UsageError as error:
                ended.append(error)

        threads = [threading.Thread(target=flush) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.002 * trial)
        store.close()
        for thread in threads:
            thread.join(60)
        assert len(ended) == 3
        with TensorStore(path, read_only=True) as reader:
            assert len(reader) == 20


def test_closing_beside_batched_reads_waits_for_them(tmp_path):
    values = {b"%03d" % i: torch.randn(16, 1024) for i in range(64)}
    with TensorStore(tmp_path / "s", codec="raw") as store:
        store.put_many(values)
    for trial in range(10):
        store = TensorStore(tmp_path / "s", read_only=True)
        wrong: list[object] = []

        def read(store=store, wrong=wrong):
            try:
                while True:
                    found = store.get_many(list(values))
                    pairs = zip(found, values.values(), strict=True)
                    wrong.extend(a for a, b in pairs if not torch.equal(a, b))
            except UsageError:
                return

        threads = [threading.Thread(target=read, daemon=True) for _ in range(2)]
        closing = threading.Thread(target=store.close, daemon=True)
        for thread in threads:
            thread.start()
        time.sleep(0.003 * trial)
        closing.start()
        for thread in (closing, *threads):
            thread.join(60)
            assert not thread.is_alive()
        assert not wrong


def test_a_file_removed_before_it_was_mapped_is_not_found(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 5000)
    file = LocalFiles(tmp_path).open("file")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="cannot be mapped"):
        file.map()
