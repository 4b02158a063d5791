"""An engine in a process of its own, which is asked in JSON lines (`vllm_runner` says how)."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any


class EngineProcess:
    """An engine that is alive and idle between calls. One thread only.

    Attributes:
        about: what it says of itself when it stands ready.
    """

    def __init__(self, name: str, command: Sequence[object], env: Mapping[str, str]) -> None:
        """Start it, and wait until it stands ready.

        Args:
            name: in messages.
            command: the program and its arguments.
            env: all of its environment.

        Raises:
            RuntimeError: it ended; the message has its last words.
            OSError: the program cannot be executed.
        """
        self._name = name
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - close() does
        try:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=env,
            )
        except OSError:
            self._log.close()
            raise
        self._reset = False
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
        return RuntimeError(f"{self._name} ended with exit status {status}: {last}")
