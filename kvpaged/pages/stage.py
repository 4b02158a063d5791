"""One host-to-device transfer a step, whatever a step has to tell the device."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Stage:
    """Sends int32 arrays to a device in one copy.

    On a GPU two pinned buffers take turns; one is written again only when the copy out of it has
    ended, so the host runs ahead of the device by at most one step here. Used by one thread at a
    time (its batch's).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.transfers = 0
        """Copies made so far: one for each `send` of at least one number."""
        self._pinned: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []

    def send(self, arrays: Sequence[npt.NDArray[np.int32]]) -> list[Tensor]:
        """The arrays on the device, int32, each one-dimensional, as views of one transfer."""
        sizes = [array.size for array in arrays]
        if not sum(sizes):
            return [torch.empty(0, dtype=torch.int32, device=self.device) for _ in arrays]
        self.transfers += 1
        joined = np.concatenate([array.reshape(-1) for array in arrays]).astype(
            np.int32, copy=False
        )
        if self.device.type == "cuda":
            sent = self._send_pinned(joined)
        else:
            sent = torch.from_numpy(joined).to(self.device)
        return list(torch.split_with_sizes(sent, sizes))

    def _send_pinned(self, joined: npt.NDArray[np.int32]) -> Tensor:
        turn = self.transfers % 2
        if not self._pinned:
            self._pinned = [torch.empty(0, dtype=torch.int32, pin_memory=True) for _ in range(2)]
            self._events = [torch.cuda.Event() for _ in range(2)]
        self._events[turn].synchronize()
        if self._pinned[turn].numel() < joined.size:
            size = max(joined.size, 2 * self._pinned[turn].numel(), 1024)
            self._pinned[turn] = torch.empty(size, dtype=torch.int32, pin_memory=True)
        pinned = self._pinned[turn][: joined.size]
        pinned.copy_(torch.from_numpy(joined))
        sent = pinned.to(self.device, non_blocking=True)
        self._events[turn].record()
        return sent
