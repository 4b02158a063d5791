"""The device, the versions and the ceilings: what a reader needs to judge the other parts."""

import subprocess
from typing import Any

import torch

import kvpaged
from benchmarks import common
from benchmarks.gpu_common import Record, Setting, ceilings


def driver_version() -> str | None:
    """The NVIDIA driver's version, where its tool says so."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


def identity(setting: Setting) -> dict[str, Any]:
    """`common.environment` with what only a GPU has; on a CPU those fields are None."""
    where = common.environment(setting.device)
    where["kvpaged"] = kvpaged.__version__
    where.setdefault("gpu", None)
    where.setdefault("gpu_memory_gib", None)
    where["multiprocessors"] = where["capability"] = where["driver"] = None
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(setting.device)
        where["multiprocessors"] = properties.multi_processor_count
        where["capability"] = f"{properties.major}.{properties.minor}"
        where["driver"] = driver_version()
    return where


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """One row: the ceilings."""
    where = record.document["environment"]
    limits = ceilings(setting)
    record.add(
        limits,
        f"{common.describe(where)}; driver {where['driver']}; ceilings: copy "
        f"{limits['copy_gb_s']:.1f} GB/s, bf16 matrix product "
        f"{limits['matrix_tflop_s']:.2f} TFLOP/s",
    )
    return record.finish(ceilings=limits)
