"""The commands that look after a store: inspect, verify, compact, export, import."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpaged.config import format_bytes

if TYPE_CHECKING:
    from kvpaged.lsm.store import TensorStore

EPILOG = """\
Exit status: 0, done, and nothing is wrong; 1, the store or the file cannot be opened, read or
written; 2, the arguments; 3, something is damaged (it is said what), the rest was done."""
DAMAGED = 3

HELP: Mapping[str, str] = {
    "inspect": "what a store holds: files, values, bytes",
    "verify": "read every byte of a store and say what is wrong with it",
    "compact": "rewrite a store: nothing dead, prompts in one piece",
    "export": "write a store's values to one file",
    "import": "put the values of an exported file into a store",
}


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe them to the command line."""
    runs: Mapping[str, Callable[[argparse.Namespace], int]] = {
        "inspect": inspect, "verify": verify, "compact": compact, "export": export, "import": load,
    }  # fmt: skip
    for name, text in HELP.items():
        parser = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument("path", type=Path, metavar="PATH", help="the store's directory")
        parser.add_argument("--json", action="store_true", help="one JSON document instead")
        if name == "inspect":
            parser.add_argument("--keys", action="store_true", help="each value, too")
        if name in ("inspect", "export"):
            parser.add_argument(
                "--prefix", default="", metavar="TEXT",
                help="only keys that begin so; 0x... for bytes in hexadecimal",
            )  # fmt: skip
        if name in ("export", "import"):
            parser.add_argument("file", type=Path, metavar="FILE", help="what export writes")
        if name in ("compact", "import"):
            parser.add_argument("--max-bytes", metavar="SIZE", help='such as "10GiB"')
        parser.set_defaults(run=runs[name])


def inspect(chosen: argparse.Namespace) -> int:
    """`kvpaged inspect`."""
    with _open(chosen.path, read_only=True) as store:
        stats = store.stats()
        figures = {
            "path": str(chosen.path), "values": stats.values, "live_bytes": stats.live_bytes,
            "used_bytes": stats.used_bytes, "space_amplification": stats.space_amplification,
            "segments": stats.segments, "levels": stats.levels, "logs": stats.logs,
            "damage": list(stats.damage), "files": _files(store),
        }  # fmt: skip
        if chosen.keys:
            figures["keys"] = _keys(store, _bytes(chosen.prefix))
    if chosen.json:
        print(json.dumps(figures))
    else:
        print(_report(figures))
    return DAMAGED if stats.damage else 0


def verify(chosen: argparse.Namespace) -> int:
    """`kvpaged verify`."""
    with _open(chosen.path, read_only=True) as store:
        found = store.verify()
        damage = list(store.stats().damage)
    if chosen.json:
        rows = [{**one._asdict(), "key": one.key and one.key.hex()} for one in found]
        print(json.dumps({"path": str(chosen.path), "sound": not found, "damage": rows}))
    else:
        for one in found:
            print(one.what)
        print(f"{chosen.path}: {len(found)} things are wrong" if found else "nothing is wrong")
    return DAMAGED if found or damage else 0


def compact(chosen: argparse.Namespace) -> int:
    """`kvpaged compact`."""
    with _open(chosen.path, max_bytes=chosen.max_bytes) as store:
        before = store.stats().used_bytes
        tasks = store.compact()
        stats = store.stats()
    figures = {
        "path": str(chosen.path), "tasks": tasks, "before": before, "after": stats.used_bytes,
        "written": stats.compacted_bytes, "damage": list(stats.damage),
    }  # fmt: skip
    if chosen.json:
        print(json.dumps(figures))
    else:
        print(f"{format_bytes(before)} -> {format_bytes(stats.used_bytes)} in {tasks} tasks")
        print("\n".join(stats.damage), end="\n" if stats.damage else "")
    return DAMAGED if stats.damage else 0


def export(chosen: argparse.Namespace) -> int:
    """`kvpaged export`."""
    from kvpaged.lsm.archive import export_values

    with _open(chosen.path, read_only=True) as store:
        count = export_values(store, chosen.file, _bytes(chosen.prefix))
    return _moved(chosen, count)


def load(chosen: argparse.Namespace) -> int:
    """`kvpaged import`."""
    from kvpaged.lsm.archive import import_values

    with _open(chosen.path, max_bytes=chosen.max_bytes) as store:
        count = import_values(store, chosen.file)
    return _moved(chosen, count)


def _moved(chosen: argparse.Namespace, count: int) -> int:
    size = chosen.file.stat().st_size
    if chosen.json:
        print(json.dumps({"path": str(chosen.path), "file": str(chosen.file), "values": count,
                          "bytes": size}))  # fmt: skip
    else:
        print(f"{count} values, {format_bytes(size)}")
    return 0


def _open(path: Path, **options: Any) -> "TensorStore":
    # Here, not above: the command line starts without zstandard and xxhash.
    from kvpaged.lsm.store import TensorStore

    return TensorStore(path, **options)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text[2:]) if text.startswith("0x") else text.encode()


def _files(store: "TensorStore") -> list[dict[str, Any]]:
    return [asdict(one) for one in store.files()]


def _keys(store: "TensorStore", prefix: bytes) -> list[dict[str, Any]]:
    from kvpaged.codecs import codec_by_id

    rows = []
    for key in store.scan(prefix):
        info = store.info(key)
        if info is not None:
            codecs = sorted({codec_by_id(part.codec).name for part in info.parts})
            rows.append({
                "key": key.hex(), "parts": len(info.parts), "bytes": info.nbytes,
                "stored": info.stored, "codecs": codecs, "parent": info.parent.hex(),
                "file": info.file, "metadata": info.metadata,
            })  # fmt: skip
    return rows


def _report(figures: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        f"{figures['path']}: {figures['values']:,} values, {format_bytes(figures['live_bytes'])} "
        f"in {format_bytes(figures['used_bytes'])}"
    ]
    columns = ("file", "level", "values", "live", "bytes", "live_bytes")
    rows = [[str(one[name]) for name in columns] for one in figures["files"]]
    lines += _table(columns, rows)
    if "keys" in figures:
        names = ("key", "parts", "bytes", "stored", "codecs", "file")
        shown = [
            [",".join(one[n]) if n == "codecs" else str(one[n]) for n in names]
            for one in figures["keys"]
        ]
        lines += ["", *_table(names, shown)]
    return "\n".join([*lines, *figures["damage"]])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (names, *rows)
    ]
