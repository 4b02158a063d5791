"""The kernels compile for GPUs that nobody here has.

In a process of its own: in this one Triton's interpreter has taken the kernels' place.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import aot_sources

ROOT = Path(__file__).parent.parent
KERNELS = {
    "append", "copy", "checksum", "transfer", "plan", "merge", "decode", "prefill", "seal",
    "mixed decode", "mixed prefill",
}  # fmt: skip
CUDA = {"sm_80", "sm_90", "sm_100", "sm_120"}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The tool's report on one configuration of each kernel for each target."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", "--one-per-kernel", "--changed"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    document: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return document


def test_every_kernel_compiles_for_every_target(report):
    compiled = [(result["kernel"], result["target"]) for result in report["results"]]
    assert len(compiled) == len(set(compiled))
    assert set(compiled) == {(k, t) for k in KERNELS for t in CUDA | {"gfx942"}}


def test_nothing_spills_on_cuda(report):
    spills = {
        (result["kernel"], result["target"]): result["spills"]
        for result in report["results"]
        if result["target"] in CUDA
    }
    assert len(spills) == len(KERNELS) * len(CUDA)
    assert spills == dict.fromkeys(spills, 0)


def test_shared_memory_fits_the_device(report):
    assert report["results"]
    for result in report["results"]:
        assert result["shared"] <= result["shared_limit"], result


def test_decode_loads_wide_and_has_few_operations_a_byte(report):
    """At most one lane operation a byte of K and V in the main loop, and 128-bit loads.

    On sm_120, with 99 KiB a multiprocessor, two programs leave room for tiles half as large.
    """
    found = [r for r in report["results"] if r["kernel"] == "decode" and r["target"] in CUDA]
    assert len(found) == len(CUDA)
    for result in found:
        assert result["load_bits"] == 128
        assert sum(result["products"].values()) >= 16
        most = 1.5 if result["target"] == "sm_120" else 1.0
        assert 0 < result["operations_per_byte"] <= most


def test_decode_of_4_bits_is_within_what_bandwidth_leaves(report):
    """An H100 has about 9.5 lane operations for each byte it can load."""
    found = [r for r in report["results"] if r["kernel"] == "mixed decode" and r["target"] in CUDA]
    assert len(found) == len(CUDA)
    for result in found:
        assert result["options"] == ["int4", "int4"]
        assert result["load_bits"] == 128
        assert 0 < result["operations_per_byte"] <= 8


def test_the_document_is_of_these_sources():
    """docs/kernels.md was made from the tree as it is: `make aot` after a change of kernels."""
    digest = aot_sources.digest()
    assert f"Sources: `{digest}`." in (ROOT / "docs" / "kernels.md").read_text()


def test_ours_does_less_a_byte_than_each_peer_in_each_coding():
    """From what `benchmarks.aot --vllm --sglang` kept: their kernels, and ours in the document."""
    rows = json.loads(aot_sources.PEER_RESULTS.read_text())["rows"]
    compiled = [r for r in rows if "skipped" not in r and r["target"] == "sm_90"]
    theirs = {
        coding: min(
            r["operations_per_byte"]
            for r in compiled
            if r["coding"] == coding and "kvpaged" not in r["peer"]
        )
        for coding in ("model", "fp8", "int4")
    }
    ours = dict.fromkeys(theirs, 0.0)
    for line in (ROOT / "docs" / "kernels.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        names = {"bf16": "model", "fp8": "fp8", "int4": "int4"}
        if len(cells) > 6 and cells[1] in names and cells[2].startswith("kvpaged"):
            figure = float(cells[5].split("**")[1])  # the column of sm_90
            ours[names[cells[1]]] = max(ours[names[cells[1]]], figure)
    assert all(0 < ours[coding] < theirs[coding] for coding in theirs), (ours, theirs)


def test_no_entry_offset_is_narrower_than_int64(report):
    assert report["results"]
    for result in report["results"]:
        assert result["narrow_products"] == [], result
        if result["kernel"].endswith(("decode", "prefill")):
            assert result["wide_products"] >= 2  # of K and of V: the check looks at something
