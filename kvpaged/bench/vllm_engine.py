"""vLLM in a process of its own, run by an interpreter that has it (`vllm_runner` is what runs)."""

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from kvpaged.bench.common import PAGE_SIZE
from kvpaged.testing import models


class VLLMEngine:
    """vLLM with automatic prefix caching, alive and idle between calls. One thread only.

    Attributes:
        about: its versions, and tokens a block.
    """

    def __init__(self, python: Path, dtype: torch.dtype, *, rows: int, length: int) -> None:
        """Start it over SmolLM2, which may take minutes.

        Args:
            python: an interpreter that has vLLM.
            dtype: of weights and cache.
            rows: requests it serves at a time, at most.
            length: tokens of a request, reply included, at most.

        Raises:
            RuntimeError: it ended; the message has its last words.
            OSError: `python` cannot be executed.
        """
        script = Path(__file__).with_name("vllm_runner.py")
        about = [models.path("smollm2"), str(dtype).removeprefix("torch.")]
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - close() does
        try:
            self._process = subprocess.Popen(
                [str(part) for part in (python, script, *about, length, rows, PAGE_SIZE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=environment(python),
            )
        except OSError:
            self._log.close()
            raise
        self._reset = True
        try:
            self.about: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def forget(self) -> None:
        """Have the next call reset its cache."""
        self._reset = True

    def ask(self, prompts: list[list[int]], new: int | list[int]) -> Any:
        """Prompts of any lengths at once; the answer as it comes (`vllm_runner`).

        Raises:
            RuntimeError: it ended; the message has its last words.
        """
        request = {"prompts": prompts, "new": new, "reset": self._reset}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        self._reset = False
        return self._answer()

    def close(self) -> None:
        """End its process, which the end of its input does; it has a minute for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> RuntimeError:
        status = self._process.wait()
        self._log.seek(0)
        words = [line.strip() for line in self._log if line.strip()] or ["it said nothing"]
        last = next((line for line in reversed(words) if "Error" in line), words[-1])
        return RuntimeError(f"vLLM ended with exit status {status}: {last}")


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
