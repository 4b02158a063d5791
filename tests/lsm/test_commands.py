"""The commands that look after a store, exported files, and the key-value cache."""

import json

import pytest
import torch

import kvpaged
from kvpaged.cli import main
from kvpaged.errors import ConfigError, IntegrityError
from kvpaged.lsm.archive import export_values, import_values
from kvpaged.lsm.key_value import KeyValueCache
from kvpaged.lsm.store import TensorStore
from kvpaged.testing.faulty_files import FaultyFiles
from tests.lsm.small import Clock, number_of, open_store, options, value


@pytest.fixture
def path(tmp_path):
    with TensorStore(tmp_path / "store", options=options()) as store:
        for turn in range(2):
            store.put_many({b"page-%d" % n: value(100 * turn + n, 2000) for n in range(10)})
            store.flush()
        store.put(b"other", {"k": torch.zeros(4000), "v": torch.ones(3)}, metadata={"a": 1})
    return tmp_path / "store"


def told(capsys, *arguments) -> tuple[int, dict]:
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_inspect(path, capsys):
    status, figures = told(capsys, "inspect", path, "--keys", "--prefix", "page-")
    assert (status, figures["values"], figures["damage"]) == (0, 11, [])
    assert len(figures["files"]) == figures["segments"]
    assert [bytes.fromhex(row["key"]) for row in figures["keys"]] == [
        b"page-%d" % n for n in range(10)
    ]
    assert main(["inspect", str(path), "--keys"]) == 0
    shown = capsys.readouterr().out
    assert "11 values" in shown
    assert b"other".hex() in shown


def test_verify_tells_damage_by_its_status(path, capsys):
    assert told(capsys, "verify", path) == (0, {"path": str(path), "sound": True, "damage": []})
    segment = sorted(path.glob("*.seg"))[0]
    raw = bytearray(segment.read_bytes())
    raw[5000] ^= 1
    segment.write_bytes(raw)
    status, found = told(capsys, "verify", path)
    assert status == 3
    assert found["damage"][0]["file"] == segment.name
    assert main(["verify", str(path)]) == 3
    assert segment.name in capsys.readouterr().out


def test_compact(path, capsys):
    status, figures = told(capsys, "compact", path)
    assert status == 0
    assert figures["after"] < figures["before"]
    assert main(["compact", str(path)]) == 0
    assert "tasks" in capsys.readouterr().out


def test_errors_are_status_1_and_arguments_2(path, tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "kvpaged inspect:" in capsys.readouterr().err
    with TensorStore(path):
        assert main(["compact", str(path)]) == 1
        assert "open for writing already" in capsys.readouterr().err
        assert main(["inspect", str(path)]) == 0
    with pytest.raises(SystemExit) as error:
        main(["export", str(path)])
    assert error.value.code == 2


def test_export_and_import(path, tmp_path, capsys):
    file = tmp_path / "pages.kvx"
    assert told(capsys, "export", path, file, "--prefix", "page-")[1]["values"] == 10
    status, figures = told(capsys, "import", tmp_path / "second", file)
    assert (status, figures["values"]) == (0, 10)
    with TensorStore(tmp_path / "second") as store:
        assert {key: number_of(found) for key, found in store.items()} == {
            b"page-%d" % n: 100 + n for n in range(10)
        }
        assert store.verify() == []


def test_all_of_a_value_is_exported(tmp_path):
    clock = Clock()
    with open_store(FaultyFiles(), codec="zstd", clock=clock) as store:
        store.put(b"a", value(1))
        store.put(b"b", {"x": torch.zeros(9000)}, metadata={"n": [1]}, parent=b"a", ttl=50)
        store.put(b"c", value(3), ttl=5)
        assert export_values(store, tmp_path / "out") == 3
        with store.snapshot() as snapshot:
            assert export_values(snapshot, tmp_path / "again") == 3
    clock.now += 10_000
    assert (tmp_path / "out").read_bytes() == (tmp_path / "again").read_bytes()
    with open_store(FaultyFiles(), clock=clock) as other:
        assert import_values(other, tmp_path / "out") == 2
        info = other.info(b"b")
        assert info is not None
        assert (info.parent, info.metadata, info.parts[0].codec) == (b"a", {"n": [1]}, 1)
        assert info.expires > clock.now
        assert torch.equal(other.get(b"b")["x"], torch.zeros(9000))
        assert number_of(other.get(b"a")) == 1
        other.check_integrity()


def test_a_damaged_or_cut_export_changes_nothing(tmp_path):
    with open_store(FaultyFiles()) as store:
        store.put_many({b"%d" % n: value(n, 1000) for n in range(5)})
        export_values(store, tmp_path / "out")
    raw = (tmp_path / "out").read_bytes()
    with open_store(FaultyFiles()) as other:
        for wrong in (raw[:-4096], raw[: len(raw) // 2], raw + raw, b"", _flipped(raw, 5000)):
            (tmp_path / "wrong").write_bytes(wrong)
            with pytest.raises(IntegrityError):
                import_values(other, tmp_path / "wrong")
            assert len(other) == 0


def _flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "plain",
    ["", "ü" * 50, b"", b"\0\xff", 0, 1, -1, 127, 128, -128, -129, 10**40, -(10**40)],
    ids=repr,
)
def test_plain_values_come_back_as_they_were(tmp_path, plain):
    with KeyValueCache(tmp_path, options=options()) as cache:
        cache.set_key("k", plain)
        assert cache.get_key("k") == plain
        assert type(cache.get_key("k")) is type(plain)
        assert cache.get_key(b"k") == plain
    with KeyValueCache(tmp_path, options=options()) as cache:
        assert cache.get_key("k") == plain


def test_keys_are_set_updated_and_deleted(tmp_path):
    clock = Clock()
    with KeyValueCache(tmp_path, options=options(clock=clock)) as cache:
        assert cache.get_key("a") is None
        assert not cache.update_key("a", 1)
        cache.set_key("a", torch.arange(5.0).half())
        assert torch.equal(cache.get_key("a"), torch.arange(5.0).half())
        assert cache.update_key("a", "text", ttl=10)
        assert "a" in cache
        assert len(cache) == 1
        clock.now += 20_000
        assert cache.get_key("a", "gone") == "gone"
        cache.set_key("a", 3)
        assert cache.delete_key("a")
        assert not cache.delete_key("a")
        for wrong in (1.5, None, True, [1], {"a": 1}):
            with pytest.raises(ConfigError):
                cache.set_key("a", wrong)  # type: ignore[arg-type]
        cache.store.put(b"foreign", value(1))
        with pytest.raises(IntegrityError, match="KeyValueCache"):
            cache.get_key("foreign")


def test_the_store_is_public_and_only_then_imported():
    assert kvpaged.TensorStore is TensorStore
    with pytest.raises(AttributeError, match="no attribute"):
        _ = kvpaged.NoSuchThing
