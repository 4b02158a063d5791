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

ROOT = Path(__file__).parent.parent
KERNELS = {"append", "copy", "checksum", "merge", "decode", "prefill"}
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


def test_no_entry_offset_is_narrower_than_int64(report):
    assert report["results"]
    assert all(result["narrow_products"] == [] for result in report["results"])
