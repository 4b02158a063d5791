"""vLLM in a process of its own, run by an interpreter that has it (`vllm_runner` is what runs)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.engine_process import EngineProcess
from kvpaged.testing import models


class VLLMEngine(EngineProcess):
    """vLLM with automatic prefix caching, alive and idle between calls. One thread only.

    Attributes:
        about: its versions, and tokens a block.
    """

    def __init__(
        self,
        python: Path,
        dtype: torch.dtype,
        *,
        rows: int,
        length: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start it over SmolLM2, which may take minutes.

        Args:
            python: an interpreter that has vLLM.
            dtype: of weights and cache.
            rows: requests it serves at a time, at most.
            length: tokens of a request, reply included, at most.
            options: more keyword arguments of its `LLM`; they go through JSON.

        Raises:
            RuntimeError: it ended; the message has its last words.
            OSError: `python` cannot be executed.
        """
        script = Path(__file__).with_name("vllm_runner.py")
        about = [models.path("smollm2"), str(dtype).removeprefix("torch.")]
        command = [python, script, *about, length, rows, PAGE_SIZE, json.dumps(dict(options or {}))]
        super().__init__("vLLM", command, environment(python))


def environment(python: Path) -> dict[str, str]:
    """This environment without our paths; as many threads as torch has here; with Intel's OpenMP
    where vLLM's has it, as vLLM advises for CPUs, its threads asleep when there is nothing to do.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{torch.get_num_threads() - 1}")
    variables["KMP_BLOCKTIME"] = "1"
    openmp = python.absolute().parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        before = variables.get("LD_PRELOAD", "")
        variables["LD_PRELOAD"] = ":".join(path for path in (str(openmp), before) if path)
    return variables
