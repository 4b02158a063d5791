"""Steps under way: launched, their tokens not yet read."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.generate.rows import Rows
from kvpaged.generate.sampling import Choice, Picked
from kvpaged.step import Ints


class Arrival:
    """A tensor on its way to the host: what the device does after it is not waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._here = here.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._here = tensor.to("cpu")

    def read(self) -> npt.NDArray:
        """It, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._here.numpy()


@dataclass(slots=True)
class Flight:
    """A step between its launch and its landing.

    Attributes:
        choice: whose tokens it gives.
        tokens: int64 `[n]` on the device.
        ends: int64 `[n]`, how many tokens each row has with the one it gives; not with drafts.
        arrival: the tokens on their way; `logprobs`: the rest of what was picked.
        picked: see `Picked`.
        epochs, changes: of the rows, when it was launched.
    """

    choice: Choice
    picked: Picked
    arrival: Arrival
    logprobs: list[Arrival]
    epochs: Ints
    changes: int
    ends: Ints

    @classmethod
    def launched(cls, choice: Choice, picked: Picked, rows: Rows) -> "Flight":
        """One that has just been; `ends` is its user's to fill in."""
        return cls(
            choice=choice,
            picked=picked,
            arrival=Arrival(picked.tokens),
            logprobs=[Arrival(tensor) for tensor in picked.logprobs or ()],
            epochs=rows.epoch[choice.index].copy(),
            changes=rows.changes,
            ends=choice.slots,
        )

    @property
    def tokens(self) -> Tensor:
        """int64 `[n]`, on the device."""
        return self.picked.tokens

    def alive(self, rows: Rows) -> npt.NDArray[np.bool_] | None:
        """Which of its rows still have the reply they had; `None`: all."""
        if rows.changes == self.changes:
            return None
        alive: npt.NDArray[np.bool_] = rows.epoch[self.choice.index] == self.epochs
        return None if alive.all() else alive
