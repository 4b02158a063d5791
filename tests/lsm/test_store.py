"""What a store promises: every call, every dtype, edges."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from kvpaged.errors import ConfigError, IntegrityError, UsageError
from kvpaged.lsm.archive import export_values, import_values
from kvpaged.lsm.batch import Put
from kvpaged.lsm.layout import DTYPES
from kvpaged.lsm.options import StoreOptions
from kvpaged.lsm.store import TensorStore
from kvpaged.testing.faulty_files import FaultyFiles
from tests.lsm.small import Clock, number_of, open_store, options, value


@pytest.fixture(params=["in memory", "sealed", "reopened", "compacted"])
def store(request, tmp_path) -> Iterator[tuple[TensorStore, object]]:
    """A store, and what makes its values be where they are to be found."""
    opened = [TensorStore(tmp_path / "store", codec="raw", options=options())]

    def settle() -> TensorStore:
        if request.param == "sealed":
            opened[0].flush()
        elif request.param == "reopened":
            opened[0].close()
            opened[0] = TensorStore(tmp_path / "store", codec="raw", options=options())
        elif request.param == "compacted":
            opened[0].compact()
        opened[0].check_integrity()
        return opened[0]

    yield opened[0], settle
    opened[0].check_integrity()
    opened[0].close()


def test_tensors_come_back_by_themselves_and_by_name(store):
    store, settle = store
    pages = {"k": torch.randn(3, 700), "v": torch.randn(5000), "empty": torch.zeros(0, 4)}
    store.put(b"one", value(7))
    store.put(b"page", pages, metadata={"tokens": [1, 2]}, parent=b"one")
    store = settle()
    assert number_of(store.get(b"one")) == 7
    found = store.get(b"page")
    assert list(found) == ["k", "v", "empty"]
    assert all(torch.equal(found[name], pages[name]) for name in pages)
    assert list(store.get(b"page", ["v"])) == ["v"]
    info = store.info(b"page")
    assert info.metadata == {"tokens": [1, 2]}
    assert (info.parent, info.single) == (b"one", False)
    assert [part.name for part in info.parts] == list(pages)
    assert info.nbytes == sum(tensor.nbytes for tensor in pages.values())
    assert store.get(b"none") is None
    assert store.info(b"none") is None
    assert len(store) == 2


def test_values_are_read_into_tensors_of_ones_own(store):
    store, settle = store
    pages = {"k": torch.randn(64, 1024), "v": torch.randn(4099)}
    store.put(b"page", pages)
    store.put(b"one", value(1, 9000))
    store = settle()
    out = {"v": torch.empty(4099), "k": torch.empty(64, 1024)}
    found = store.get(b"page", out=out)
    assert all(torch.equal(out[name], pages[name]) for name in pages)
    assert found["k"].data_ptr() == out["k"].data_ptr()
    lone = torch.empty(9001, dtype=torch.int32)[1:]  # not aligned
    assert number_of(store.get_many([b"none", b"one"], out=[None, lone])[1]) == 1
    assert number_of(lone) == 1
    with pytest.raises(ConfigError, match="destination"):
        store.get(b"one", out=torch.empty(3))
    with pytest.raises(ConfigError, match="no part"):
        store.get(b"page", out={"q": torch.empty(3)})
    with pytest.raises(ConfigError, match="contiguous"):
        store.get(b"page", out={"k": torch.empty(1024, 64).T})


def test_views_are_the_files_own_bytes(store):
    store, settle = store
    store.put(b"one", value(1, 20_000))
    store = settle()
    seen = store.view(b"one")
    assert number_of(seen) == 1
    assert store.view(b"none") is None
    store.delete(b"one")
    store.compact()
    assert number_of(seen) == 1
    assert store.view(b"one") is None


def test_replacing_adding_deleting(store):
    store, settle = store
    assert store.add(b"a", value(1))
    assert not store.add(b"a", value(2))
    assert not store.replace(b"b", value(3))
    assert store.replace(b"a", value(4))
    assert store.delete_many([b"a", b"b"]) == [True, False]
    assert store.add_many({b"a": value(5), b"b": value(6)}) == [True, True]
    assert store.replace_many([Put(b"a", value(7)), Put(b"c", value(8))]) == [True, False]
    store.put(b"gone", value(9))
    assert store.delete(b"gone")
    store = settle()
    assert [number_of(found) for found in store.get_many([b"a", b"b", b"c", b"gone"])] == [
        7, 6, None, None,
    ]  # fmt: skip
    assert store.contains_many([b"a", b"c"]) == [True, False]
    assert b"b" in store


def test_batches_happen_or_do_not(store):
    store, settle = store
    store.put(b"old", value(1))
    with store.batch() as batch:
        batch.put(b"x", value(2, 3000))
        batch.put(b"x", value(3, 3000))
        batch.put(b"y", value(4))
        batch.delete(b"old")
        batch.delete(b"never there")
        assert b"x" not in store
    with suppress(KeyError), store.batch() as batch:
        batch.put(b"z", value(5))
        raise KeyError
    with pytest.raises(UsageError):
        batch.put(b"z", value(6))
    store = settle()
    assert {key: number_of(found) for key, found in store.items()} == {b"x": 3, b"y": 4}


def test_scans_are_in_the_order_of_keys(store):
    store, settle = store
    names = [b"b%03d" % n for n in (5, 1, 300, 77)] + [b"a", b"c" * 40, b"b"]
    store.put_many({name: value(n) for n, name in enumerate(names)})
    store.delete(b"b077")
    store = settle()
    store.put(b"b0770", value(9))
    left = sorted({*names, b"b0770"} - {b"b077"})
    assert list(store.scan()) == left
    assert list(store.scan(b"b")) == [name for name in left if name.startswith(b"b")]
    assert [key for key, _ in store.items(b"b0")] == [b"b001", b"b005", b"b0770"]
    assert list(store.scan(b"zz")) == []


def test_snapshots_stay_as_they_were(store):
    store, settle = store
    store.put_many({b"%d" % n: value(n, 4000) for n in range(20)})
    store = settle()
    with store.snapshot() as snapshot:
        scan = snapshot.items()
        first = next(scan)
        store.put_many({b"%d" % n: value(1000 + n, 4000) for n in range(10)})
        store.delete(b"15")
        store.put(b"new", value(7))
        store.compact()
        store.put(b"3", value(5))
        expected = dict(sorted((b"%d" % n, n) for n in range(20)))
        assert {key: number_of(found) for key, found in [first, *scan]} == expected
        assert number_of(snapshot.get(b"15")) == 15
        assert number_of(snapshot.view(b"3")) == 3
        assert snapshot.get(b"new") is None
        assert len(snapshot) == 20
    with pytest.raises(UsageError):
        snapshot.get(b"3")
    assert number_of(store.get(b"3")) == 5
    assert store.get(b"15") is None


def test_values_expire(tmp_path):
    clock = Clock()
    with TensorStore(tmp_path, options=options(clock=clock)) as store:
        store.put(b"short", value(1), ttl=10)
        store.put(b"long", value(2), ttl=1000)
        store.put(b"ever", value(3))
        for _ in range(2):
            assert number_of(store.get(b"short")) == 1
            store.flush()
        clock.now += 20_000
        assert store.get(b"short") is None
        assert store.add(b"short", value(4), ttl=10)
        clock.now += 20_000
        assert list(store.scan()) == [b"ever", b"long"]
        store.compact()
        assert (len(store), store.stats().expired) == (2, 1)
        with pytest.raises(ConfigError):
            store.put(b"a", value(1), ttl=0)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("codec", ["raw", "zstd", "lossless"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back_to_the_bit(dtype, codec):
    with open_store(FaultyFiles(), codec=codec) as store:
        raw = torch.randint(0, 4, (3, 64 * 16), dtype=torch.uint8)
        if dtype is torch.bool:
            raw &= 1
        tensor = raw.view(dtype)
        store.put(b"t", {"a": tensor, "scalar": tensor[0, 0], "turned": tensor.T})
        for _ in range(2):
            found: Any = store.get(b"t")
            assert found["a"].dtype == dtype
            assert torch.equal(found["a"].view(torch.uint8), raw)
            assert found["scalar"].shape == ()
            assert found["turned"].shape == tensor.T.shape
            same = found["turned"].T.contiguous().view(torch.uint8)
            assert torch.equal(same, raw)
            store.compact()
        assert store.verify() == []


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        (b"", torch.zeros(1)),
        (b"k" * 65_536, torch.zeros(1)),
        ("text", torch.zeros(1)),
        (b"k", [1.0]),
        (b"k", {"a": 1}),
        (b"k", {1: torch.zeros(1)}),
        (b"k", torch.zeros(3).to_sparse()),
    ],
)
def test_what_is_no_value_is_refused(key, tensor):
    with open_store(FaultyFiles()) as store:
        with pytest.raises(ConfigError):
            store.put(key, tensor)
        assert len(store) == 0


def test_impossible_options_are_refused(tmp_path):
    for wrong in (
        {"max_bytes": 10}, {"codec": "none"}, {"durability": "eternal"}, {"memtable_bytes": 0},
        {"cold_codec": "none"}, {"compact_bytes_per_s": 0}, {"segment_bytes": -1},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            StoreOptions(**wrong)
    with pytest.raises(ConfigError):
        TensorStore(tmp_path, max_bytes="much")


def test_a_closed_store_says_so(tmp_path):
    store = TensorStore(tmp_path)
    store.put(b"a", value(1))
    store.close()
    store.close()
    for call in (lambda: store.get(b"a"), lambda: store.put(b"a", value(1)), store.stats):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_a_part_that_is_not_there_is_named():
    with open_store(FaultyFiles()) as store:
        store.put(b"a", {"k": value(1)})
        with pytest.raises(ConfigError, match="no part 'q'"):
            store.get(b"a", ["q"])
        store.check_integrity()
        store.put(b"b", value(2, 50_000))
        assert number_of(store.get(b"b")) == 2


def test_values_larger_than_a_segment_and_the_memtable():
    with open_store(FaultyFiles()) as store:
        store.put(b"big", value(1, 200_000))
        store.put(b"small", value(2))
        with store.batch() as batch:
            for n in range(4):
                batch.put(b"%d" % n, value(n, 40_000))
        for _ in range(2):
            assert number_of(store.get(b"big")) == 1
            assert [number_of(store.get(b"%d" % n)) for n in range(4)] == [0, 1, 2, 3]
            store.compact()
            store.check_integrity()


def test_metadata_is_json():
    with open_store(FaultyFiles()) as store:
        with pytest.raises((TypeError, ConfigError)):
            store.put(b"a", value(1), metadata={"x": object()})
        store.put(b"a", value(1), metadata={"x": [1, None, "ü"]})
        info = store.info(b"a")
        assert info is not None
        assert info.metadata == {"x": [1, None, "ü"]}


def test_integrity_errors_are_found():
    with open_store(FaultyFiles()) as store:
        store.put(b"a", value(1))
        store._tree.live_values += 1
        with pytest.raises(IntegrityError, match="live values"):
            store.check_integrity()
        store._tree.live_values -= 1


def test_a_value_asked_for_twice_comes_twice():
    with open_store(FaultyFiles()) as store:
        store.put(b"a", {"x": value(1, 5000), "y": value(2, 300)})
        store.put(b"b", value(3, 5000))
        store.put(b"empty", torch.zeros(0))
        for _ in range(2):
            found = store.get_many([b"a", b"b", b"a", b"empty", b"b", b"empty", b"a"])
            assert [number_of(found[n]["x"]) for n in (0, 2, 6)] == [1, 1, 1]
            assert [number_of(found[n]) for n in (1, 4)] == [3, 3]
            assert found[0]["x"].data_ptr() != found[2]["x"].data_ptr()
            assert [len(found[n]) for n in (3, 5)] == [0, 0]
            assert list(store.get(b"a", ["y", "y"])) == ["y"]
            store.flush()


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_tensor_filled_anew_for_each_value_gives_each_value(tmp_path, codec):
    buffer = torch.empty(5000, dtype=torch.int32)
    with TensorStore(tmp_path, codec=codec, options=options(codec=codec)) as store:

        def puts(first: int) -> Iterator[Put]:
            for n in range(first, first + 4):
                buffer.copy_(value(n, 5000))
                yield Put(b"%d" % n, buffer)

        store.put_many(puts(0))
        assert store.add_many(puts(4)) == [True] * 4
        with store.batch() as batch:
            for put in puts(8):
                batch.put(put.key, put.value)
            buffer.zero_()
        store.flush()
        assert [number_of(store.get(b"%d" % n)) for n in range(12)] == list(range(12))
        assert store.verify() == []


@pytest.mark.parametrize("durability", ["none", "process"])
def test_values_that_are_not_written_yet_are_exported(tmp_path, durability):
    with open_store(FaultyFiles(), durability=durability) as store:
        store.put(b"a", value(1, 5000))
        store.put(b"b", {"x": value(2), "y": value(3, 3)})
        assert export_values(store, tmp_path / "values") == 2
    with open_store(FaultyFiles()) as store:
        assert import_values(store, tmp_path / "values") == 2
        assert number_of(store.get(b"a")) == 1
        assert number_of(store.get(b"b")["y"]) == 3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ttl": float("inf")}, "ttl"), ({"ttl": float("nan")}, "ttl"), ({"ttl": 1e15}, "ttl"),
        ({"metadata": [1]}, "metadata"), ({"metadata": {"a": object()}}, "not JSON"),
        ({"value": {"x" * 70_000: value(1)}}, "name"), ({"value": {"\ud800": value(1)}}, "name"),
        ({"value": torch.empty(3, device="meta")}, "meta"),
    ],
)  # fmt: skip
def test_what_cannot_be_written_down_is_refused_by_name(given, named):
    with open_store(FaultyFiles()) as store:
        with pytest.raises(ConfigError, match=named):
            store.put(b"a", **{"value": value(1), **given})
        assert b"a" not in store
