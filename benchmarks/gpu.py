"""Everything there is to measure on a GPU, in parts that each end under nine minutes.

    python -m benchmarks.gpu                          # all parts, each in a process of its own
    python -m benchmarks.gpu --part layout            # one part, in this process
    TRITON_INTERPRET=1 python -m benchmarks.gpu --quick --device cpu     # does the logic run

Each part rewrites `<out>/<part>.json` after each row, so a run that is cut off leaves what it has
measured. The last line of stdout is one JSON document of all parts. The exit status is 1 if a
kernel was wrong, a part failed, or correctness was left incomplete; 0 otherwise.
"""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, gpu_peers, triton_peers
from benchmarks.gpu_common import LIMIT_S, Record, Setting

PARTS = (
    "report", "correctness", "tune", "decode", "prefill", "sealed", "pages", "transfer",
    "layout", "end_to_end", "serving",
)  # fmt: skip
GRACE_S = 90
"""How long after its limit a part is stopped, whatever it is at."""


def run_part(name: str, setting: Setting) -> dict[str, Any]:
    """Run one part in this process."""
    from benchmarks.gpu_report import identity

    record = Record(
        part=name, folder=setting.out, limit_s=setting.limit_s,
        document={"environment": identity(setting)},
    )  # fmt: skip
    part = importlib.import_module(f"benchmarks.gpu_{name}")
    document: dict[str, Any] = part.run(record, setting)
    return document


def run_in_process_of_its_own(name: str, setting: Setting) -> dict[str, Any]:
    """Run one part so that its end, in whatever way, is not ours; what it has written remains."""
    file = setting.out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--out", str(setting.out)]
    command += ["--device", str(setting.device), *(["--quick"] if setting.quick else [])]
    command += ["--limit", str(setting.limit_s), "--without", *setting.without]
    for peer, folder in setting.folders.items():
        command += [] if folder is None else [f"--{peer}", str(folder)]
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=common.ROOT,
            env=common.tree_env(),
            stdout=subprocess.DEVNULL,
            timeout=setting.limit_s + GRACE_S,
        )
        ended = f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {setting.limit_s + GRACE_S:.0f} s"
    document: dict[str, Any] = {"part": name, "complete": False, "left_out": 0, "rows": []}
    if file.exists():
        document = json.loads(file.read_text())
    return {**document, "ended": ended}


def is_good(document: dict[str, Any]) -> bool:
    """Whether a part ended by itself and found nothing wrong; correctness must also be whole."""
    if document.get("ended", "exit status 0") != "exit status 0" or not document["rows"]:
        return False
    if document["part"] == "correctness" and not document["complete"]:
        return False
    return all(row.get("passed", True) for row in document["rows"])


def report(parts: dict[str, dict[str, Any]]) -> str:
    """A table for people: how each part ended."""
    rows = []
    for name, document in parts.items():
        failed = sum(row.get("passed") is False for row in document["rows"])
        good = "ok" if is_good(document) else "FAILED"
        counts = (len(document["rows"]), failed, document["left_out"], document.get("seconds"))
        rows.append([name, *counts, good])
    return common.table(["part", "rows", "wrong", "left out", "seconds", "verdict"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print how they ended, end with one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "gpu", help="results folder")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    peers = (*gpu_peers.PEERS, *triton_peers.PEERS)
    for peer in triton_peers.PEERS:
        parser.add_argument(
            f"--{peer}",
            type=Path,
            metavar="FOLDER",
            help="its wheel, unpacked: run its kernels too",
        )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="SECONDS",
        help=f"a part starts no case later ({LIMIT_S:.0f})",
    )  # fmt: skip
    parser.add_argument(
        "--without", nargs="*", default=(), choices=peers, help="peers to leave out"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    chosen = parser.parse_args(arguments)
    if chosen.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA device here; TRITON_INTERPRET=1 python -m benchmarks.gpu --quick --device cpu "
            "runs the logic without one"
        )
    if chosen.device.type == "cpu":
        from kvpaged_kernels.gpu.launch import INTERPRETED

        if not (INTERPRETED and chosen.quick):
            parser.error("on a CPU only --quick runs, and only with TRITON_INTERPRET=1")
    folders = {peer: getattr(chosen, peer) for peer in triton_peers.PEERS}
    setting = Setting(
        device=chosen.device, quick=chosen.quick, out=chosen.out.resolve(),
        folders={peer: folder and folder.resolve() for peer, folder in folders.items()},
        limit_s=chosen.limit, without=tuple(chosen.without),
    )  # fmt: skip
    run = run_part if len(chosen.part) == 1 else run_in_process_of_its_own
    parts = {name: run(name, setting) for name in chosen.part}
    print(report(parts))
    common.publish("gpu", {"benchmark": "gpu", "parts": parts}, setting.out)
    return 0 if all(is_good(document) for document in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
