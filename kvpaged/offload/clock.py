"""How long forward passes take, on the device that runs them."""

import time
from collections import deque
from collections.abc import Callable

import torch

from kvpaged.offload.mover import LEAST_TOKENS


class PassClock:
    """Times passes over many tokens and tells somebody; on a GPU by events, read once they
    have happened, so nobody waits. One thread at a time.
    """

    def __init__(self, device: torch.device, tell: Callable[[int, float], None]) -> None:
        self._cuda = device.type == "cuda"
        self._tell = tell
        self._tokens = 0
        self._began: float | torch.cuda.Event = 0.0
        self._due: deque[tuple[int, torch.cuda.Event, torch.cuda.Event]] = deque()

    def begin(self, tokens: int) -> None:
        """A pass begins; one that had begun and did not end is forgotten."""
        self._tokens = tokens if tokens >= LEAST_TOKENS else 0
        if not self._tokens:
            return
        if self._cuda:
            self._read()
            self._began = torch.cuda.Event(enable_timing=True)
            self._began.record()
        else:
            self._began = time.perf_counter()

    def end(self) -> None:
        """It has been launched whole; on a CPU it has ended."""
        tokens, self._tokens = self._tokens, 0
        if not tokens:
            return
        if isinstance(self._began, float):
            self._tell(tokens, time.perf_counter() - self._began)
            return
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        self._due.append((tokens, self._began, ended))

    def _read(self) -> None:
        while self._due and self._due[0][2].query():
            tokens, began, ended = self._due.popleft()
            self._tell(tokens, began.elapsed_time(ended) / 1000)
