"""Decode steps as captured graphs: one launch a step instead of some hundred.

A graph is captured for each of some numbers of rows (*buckets*) and serves every step of at most as
many: its tensors stand still, a step's are copied into them. Rows that a bucket has beyond a step's
are empty: of length 0, their keys and values go nowhere.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.step import GroupStep, Step

MAX_WIDTH = 8192
"""Pages a row may have in a captured step, at the most; longer ones take the ordinary way."""

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A pass: ids and positions int64 `[1, tokens]`, the tokens whose logits are wanted int64 `[n]`, to
logits `[n, vocabulary]`.
"""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Makes a graph of what a call launches: how to launch it again, and what it writes to."""


def buckets(rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for: 1, 2, 4, then multiples of 8, from 64 on of 32,
    up to the first that is enough for `rows`.
    """
    sizes = [1, 2, 4, *range(8, 64, 8)]
    while sizes[-1] < rows:
        sizes.append(64 if sizes[-1] < 64 else sizes[-1] + 32)
    enough = next(i for i, size in enumerate(sizes) if size >= rows)
    return sizes[: enough + 1]


class _Captured(NamedTuple):
    replay: Callable[[], None]
    logits: Tensor


class DecodeGraphs:
    """The graphs of a batch's decode steps. One thread at a time.

    A graph holds addresses: of the weights, of the pool, of its own tensors. `is_stale` tells when
    weights have been replaced or hooks have come or gone since.
    """

    def __init__(
        self, cache: CacheBooks, batch: Batch, model: torch.nn.Module, run: Run,
        *, capture: Capture | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            cache: whose pages; no group of it is served by the CPU's calls.
            batch: whose steps.
            model: whose passes.
            run: a pass over the running step of `batch`.
            capture: `None`: by CUDA.
        """
        self._cache, self._batch, self._model, self._run = cache, batch, model, run
        self._capture = CudaCapture() if capture is None else capture
        self.sizes = buckets(batch.rows)
        most, device = self.sizes[-1], batch.device
        self._ids = torch.zeros(most, dtype=torch.int64, device=device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=device)
        self._take = torch.arange(most, dtype=torch.int64, device=device)
        self._groups = [_standing(cache, number, most) for number in range(len(cache.groups))]
        self._captured: dict[int, _Captured] = {}
        self._seen: object = None
        self._identity: object = None
        self.capture_s: float | None = None

    def capture(self) -> None:
        """Capture all graphs, the largest first: the others fit into its memory."""
        start = time.perf_counter()
        self._captured.clear()
        self._seen, self._identity = self._fingerprint(), self._cache.current()[0]
        for group in self._groups:
            group.lengths.zero_()
        for size in reversed(self.sizes):
            self._captured[size] = _Captured(*self._capture(lambda size=size: self._pass(size)))  # type: ignore[misc]
        self.capture_s = time.perf_counter() - start

    def is_stale(self) -> bool:
        """Whether weights have other addresses than when it captured, hooks have changed, or what
        the cache's namespace stands for: weights, adapters.
        """
        return self._seen != self._fingerprint() or self._identity != self._cache.current()[0]

    def _fingerprint(self) -> object:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        hooks = sum(
            len(module._forward_hooks) + len(module._forward_pre_hooks)
            for module in self._model.modules()
        )
        return [(tensor.data_ptr(), tensor.dtype) for tensor in tensors], hooks

    def serves(self, step: Step) -> bool:
        """Whether a graph can compute a step."""
        return (
            step.decode
            and step.total <= self.sizes[-1]
            and all(
                group.max_len <= mine.max_len
                for group, mine in zip(step.groups, self._groups, strict=True)
            )
        )

    def __call__(self, step: Step, ids: Tensor, positions: Tensor) -> Tensor:
        """The logits `[tokens, vocabulary]` of a step it serves; valid until the next call.

        Args:
            step: the batch's running step.
            ids, positions: int64 `[tokens]`.
        """
        rows = step.total
        size = next(size for size in self.sizes if size >= rows)
        self._ids[:rows].copy_(ids)
        self._positions[:rows].copy_(positions)
        for mine, group in zip(self._groups, step.groups, strict=True):
            width = min(group.table.shape[1], mine.table.shape[1])
            mine.table[:rows, :width].copy_(group.table[:, :width])
            mine.positions[:rows].copy_(group.positions)
            mine.lengths[:rows].copy_(group.lengths)
            mine.lengths[rows:size].zero_()
        captured = self._captured[size]
        captured.replay()
        step.written.update(self._cache.layers)
        step.attended.update(self._cache.layers)
        return captured.logits[:rows]

    def _pass(self, size: int) -> Tensor:
        """What is captured: a pass over a step of `size` rows made of the standing tensors."""
        groups = [_some_rows(group, size) for group in self._groups]
        for group in groups:
            group.skip_empty_rows()
        counts = np.zeros(self._batch.rows, np.int64)
        none = self._take[:0].int()
        before = self._batch.step
        self._batch.step = Step(
            counts=counts, starts=counts, decode=True, total=size, max_q=1, groups=groups,
            positions=groups[0].positions, cu_seqlens=groups[0].cu_q, tokens=none, more=none,
        )  # fmt: skip
        try:
            return self._run(self._ids[:size], self._positions[:size], self._take[:size])
        finally:
            self._batch.step = before


def _standing(cache: CacheBooks, number: int, rows: int) -> GroupStep:
    """A step of `rows` rows of one token, of a group, in tensors that stand still."""
    group = cache.groups[number]
    device, size = group.device, cache.config.page_size
    width = min(cache.classes[number].allocator.capacity, MAX_WIDTH)
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=device)
    return GroupStep(
        table=torch.zeros((rows, width), dtype=torch.int32, device=device),
        lengths=torch.zeros(rows, dtype=torch.int32, device=device),
        cu_q=numbers, owners=numbers[:-1], page_size=size, max_len=width * size, rows=rows,
        positions=torch.zeros(rows, dtype=torch.int32, device=device), total=rows, max_q=1,
        decode=True,
    )  # fmt: skip


def _some_rows(group: GroupStep, rows: int) -> GroupStep:
    return GroupStep(
        table=group.table[:rows], lengths=group.lengths[:rows], cu_q=group.cu_q[: rows + 1],
        positions=group.positions[:rows], owners=group.owners[:rows], page_size=group.page_size,
        max_len=group.max_len, rows=rows, total=rows, max_q=1, decode=True,
    )  # fmt: skip


class CudaCapture:
    """Captures CUDA graphs into one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Capture`. It runs twice before: what is compiled or allocated at first is then."""
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: what they do is no part of it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = run()
        return graph.replay, logits


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A `Capture` for devices without graphs: it runs again, on the same tensors. For tests of all
    that stands around a graph.
    """
    logits = run()

    def replay() -> None:
        logits.copy_(run())

    return replay, logits


def can_capture(cache: CacheBooks) -> bool:
    """Whether a cache lies wholly on one CUDA device, served by kernels that can be captured: those
    of compressed pages plan each launch anew.
    """
    devices: Sequence[torch.device] = [group.device for group in cache.groups]
    return (
        not cache.compressed
        and all(device == devices[0] for device in devices)
        and devices[0].type == "cuda"
        and all(backend == "triton" for backend in cache.backends)
    )
