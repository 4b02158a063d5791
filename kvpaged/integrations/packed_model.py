"""A causal language model run over packed tokens: eagerly, compiled, or as captured graphs."""

import inspect
import logging
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import UnsupportedModelError
from kvpaged.integrations.attention import Preparation
from kvpaged.integrations.beside import LinearsBeside
from kvpaged.integrations.compiling import Run, any_size, compile_run, kept_on_disk, shape_of
from kvpaged.integrations.graphs import Capture, DecodeGraphs
from kvpaged.integrations.linears import PackedLinears
from kvpaged.integrations.packed import PackedPass
from kvpaged.slot_batch import SlotBatch
from kvpaged_kernels.cpu.native import NativeError, one_thread

log = logging.getLogger("kvpaged")

FEW = 12
"""Tokens of a step up to which a compiled model's own kernels run in one thread on a CPU, where
products are native: it takes less time than waking another (SmolLM2 at 8 tokens 3 % less, at 16 of
them 7 % more).
"""

SOME = 64
"""Tokens up to which a step is compiled where products are torch's own: what holds kernels to one
thread would hold those, too.
"""


class PackedModel:
    """A causal language model, run over packed tokens: eagerly, or compiled.

    The model's own forward runs. What is compiled is compiled for any number of tokens, by
    `check`; `compile_s` tells how long that took, in seconds.
    """

    def __init__(
        self, cache: CacheBooks, preparation: Preparation, batch: Batch, *, compiled: bool,
        pack_weights: bool, capture: Capture | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            cache, preparation, batch: what it runs over.
            compiled: through `torch.compile`.
            pack_weights: on a CPU, see `PackedLinears`; elsewhere `LinearsBeside`.
            capture: how decode steps are captured as graphs; `None`: they are not.

        Raises:
            UnsupportedModelError: its forward can't be told positions, or which logits to give.
        """
        names = inspect.signature(preparation.model.forward).parameters
        missing = [name for name in ("position_ids", "logits_to_keep") if name not in names]
        if missing:
            raise UnsupportedModelError(
                f"{type(preparation.model).__name__}.forward takes no {' and no '.join(missing)}: "
                "it can't run over packed tokens"
            )
        self._model = preparation.model
        self._cpu = batch.device.type == "cpu"
        self.past = PackedPass(cache, preparation, batch, native=compiled and self._cpu)
        self.compiled = compiled
        self.compile_s: float | None = None
        linears = _pack(self._model, compiled=compiled, cpu=self._cpu) if pack_weights else None
        self._linears = linears
        native = isinstance(linears, PackedLinears) and linears.native
        self._any_size = native and linears.cover(self._model)  # type: ignore[union-attr]
        self._fast: Run | None = None  # the compiled forward
        self._shape: list[Any] = []  # of the model it was compiled of
        self.graphs: DecodeGraphs | None = None
        if capture is not None:
            try:
                self.graphs = DecodeGraphs(cache, batch, self._model, self._run, capture=capture)
            except BaseException:
                self.release()
                raise

    def __call__(self, ids: Tensor, positions: Tensor, take: Tensor, every: bool = False) -> Tensor:
        """One pass over the tokens of the running step.

        Args:
            ids, positions: int64 `[tokens]`.
            take: ints `[n]`, the tokens whose logits are wanted; none: `n` is 0.
            every: those are all, in order.

        Returns:
            `[n, vocabulary]`, of the model's dtype; valid until the next pass.
        """
        step = self.past.batch.step
        if every and step is not None and self.graphs is not None and self.graphs.serves(step):
            return self.graphs(step, ids, positions)
        wanted = len(take)
        take = take.long() if wanted else ids.new_zeros(1)
        logits = self._run(ids, positions, take)
        self.past.check_attended()
        return logits[:wanted]

    def _run(self, ids: Tensor, positions: Tensor, take: Tensor) -> Tensor:
        fast = self._fast
        if fast is None or (self._cpu and len(ids) > SOME and not self._any_size):
            with torch.no_grad():
                return self._call(ids[None], positions[None], take)
        self.past.enter(self._model, {})
        # Not while it is compiled, for that looks how many threads there are.
        few = self._cpu and len(ids) <= FEW
        held = few and self._any_size and self.compile_s is not None
        with torch.no_grad(), any_size(), one_thread() if held else nullcontext():
            return fast(ids, positions, take)

    def check(self, batch: SlotBatch) -> None:
        """See that packing sequences changes nothing for them, in a pass of two and two of one; a
        compiled model is compiled here. `batch` is empty before and after.

        Raises:
            UnsupportedModelError: it does change them: the model mixes tokens elsewhere than in
                attention, or takes no notice of positions; or the compiled model differs from the
                one it was made of.
        """
        device = batch.device
        first, second = (torch.tensor(x, device=device) for x in ([1, 5, 3], [4, 2]))
        batch.admit(0, second.cpu().numpy(), None)
        other = self._probe(batch, [2], second)
        batch.vacate(0)
        batch.admit(0, first.cpu().numpy(), None)
        alone = self._probe(batch, [3], first)
        if batch.rows > 1:
            batch.admit(1, second.cpu().numpy(), None)
            packed = self._probe(batch, [3, 2], torch.cat([first, second]))
            batch.vacate(1)
            self._must_agree("when another is packed before it", packed, torch.cat([alone, other]))
        self._must_agree("a token at a time", self._probe(batch, [1], first[:1]), alone[:1])
        batch.vacate(0)
        if self.compiled:
            self._compile(batch)
        if self.graphs is not None:
            self.graphs.capture()

    def _must_agree(self, when: str, got: Tensor, wanted: Tensor) -> None:
        got, exact = got.float(), wanted.float()
        wrong, most = (got - exact).abs().max(), exact.abs().max()
        if not wrong <= torch.finfo(wanted.dtype).eps ** 0.5 * most:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} gives a sequence other scores (by {wrong:.3g}, "
                f"where they reach {most:.3g}) {when}: it can't run over packed tokens"
            )

    def _check_compiled(self, batch: SlotBatch) -> None:
        """Raise `UnsupportedModelError` unless most tokens' scores are those of the eager model.

        Most, because in bf16 other roundings alone (inductor keeps fp32 within a kernel) can turn
        the scores of a single early token over: of SmolLM2 one in a dozen, others by 0.1 to 2 %
        (mean square over variance); tokens that see something else differ by 100 % and more.
        """
        vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        ids = torch.arange(1, 12, device=batch.device) * vocabulary // 12
        batch.admit(0, ids.cpu().numpy(), None)
        scores, fast = [], self._fast
        try:
            for self._fast in (fast, None):
                scores.append(self._probe(batch, [len(ids)], ids).float())
        finally:
            self._fast = fast
            batch.vacate(0)
        got, exact = scores
        apart = float(((got - exact).square().mean(-1) / exact.var(-1)).median())
        if not apart <= 4 * torch.finfo(self._model.dtype).eps ** 0.5:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} gives other scores when it is compiled (mean square "
                f"of the difference over the variance: {apart:.3g})"
            )

    def _compile(self, batch: SlotBatch) -> None:
        """Compile the model as it is; `batch` is empty before and after.

        Raises:
            UnsupportedModelError: see `_check_compiled`.
        """
        start = time.perf_counter()
        model, past = self._model, self.past

        def run(ids: Tensor, positions: Tensor, take: Tensor) -> Tensor:
            """Without the model's own hooks, which are Python's. The one row is made within, where
            its number is no variable of the graph: loops over tokens are outermost then.
            """
            out = model.forward(
                input_ids=ids[None], position_ids=positions[None], past_key_values=past,
                use_cache=True, logits_to_keep=take,
            )  # fmt: skip
            logits: Tensor = out.logits[0]
            return logits

        self._fast = compile_run(run, batch.device, one_thread=not self._any_size)
        self._shape, self.compile_s = shape_of(model), None
        ids = torch.tensor([1, 5, 3], device=batch.device)
        batch.admit(0, ids.cpu().numpy(), None)
        try:
            with kept_on_disk():  # no two sizes alike: else they are so for ever
                self._probe(batch, [3], ids, take=2)
            self.compile_s = time.perf_counter() - start
            batch.vacate(0)
            self._check_compiled(batch)
        except BaseException:
            self._shape = []  # the next request tries again
            raise
        finally:
            batch.vacate(0)

    def _probe(
        self, batch: SlotBatch, counts: list[int], ids: Tensor, take: int | None = None
    ) -> Tensor:
        """Logits of all tokens, or the first `take`, of a step over the first rows; the step is
        dropped.
        """
        every = np.zeros(batch.rows, np.int64)
        every[: len(counts)] = counts
        step = batch.begin(every, order=np.arange(len(counts)))
        try:
            positions = step.positions.long()
            return self(ids, positions, torch.arange(take or len(ids), device=ids.device))
        finally:
            batch.drop_step()

    def refresh(self, batch: SlotBatch) -> None:
        """Look whether weights or the model have changed, between requests: `batch` is empty.

        Raises:
            UnsupportedModelError: it was compiled anew, and differs from what it was made of.
        """
        if self._linears is not None:
            self._linears.refresh()
            self._any_size = self._any_size and len(self._linears) > 0
        if self.compiled and shape_of(self._model) != self._shape:
            self._compile(batch)
        if self.graphs is not None and self.graphs.is_stale():
            self.graphs.capture()

    def release(self) -> None:
        """Leave the model as it was found."""
        self._fast, self.graphs = None, None  # they hold on to weights
        if self._linears is not None:
            self._linears.release()

    def _call(self, ids: Tensor, positions: Tensor, take: Tensor) -> Tensor:
        out = self._model(
            input_ids=ids, position_ids=positions, past_key_values=self.past, use_cache=True,
            logits_to_keep=take,
        )  # fmt: skip
        logits: Tensor = out.logits[0]
        return logits


def _pack(
    model: torch.nn.Module, *, compiled: bool, cpu: bool
) -> PackedLinears | LinearsBeside | None:
    if not cpu:
        return LinearsBeside(model) if compiled else None
    if compiled:
        try:
            return PackedLinears(model, native=True)
        except NativeError as error:
            log.warning("products stay with oneDNN: %s", error)
    return PackedLinears(model)
