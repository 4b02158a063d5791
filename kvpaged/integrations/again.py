"""Tokens that a session's rows owe: computed again, in a forward pass of their own.

A compressed page is rewound whole, and shared whole. So a session that is cropped to within one, or
whose rows could go on from unlike places of what was found, holds less than its columns say; the
tokens between are computed before the next pass, by the model itself.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.integrations.attention import Preparation
from kvpaged.tokens import Ids


class Owed:
    """The tokens that rows of a batch owe, as a pass: padded on the left.

    Attributes:
        ids: of each row.
        width: columns.
        counts: int64 `[rows]`.
    """

    def __init__(self, batch: Batch) -> None:
        self.ids: list[Ids] = batch.owed
        self.counts = np.array([len(each) for each in self.ids], np.int64)
        self.width = int(self.counts.max())
        self._starts = batch.lengths

    def compute(self, preparation: Preparation, session: Any, device: torch.device) -> None:
        """Run the model over them; `session` sees to its side of the pass."""
        shape = len(self.ids), self.width
        tokens, places = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, ids in enumerate(self.ids):
            if len(ids):
                tokens[row, -len(ids) :] = ids
                places[row, -len(ids) :] = np.arange(len(ids)) + self._starts[row]
        inner = preparation.model.base_model
        with torch.no_grad():
            inner(
                input_ids=torch.from_numpy(tokens).to(device),
                position_ids=torch.from_numpy(places).to(device),
                past_key_values=session, use_cache=True,
            )  # fmt: skip

    def taken(self, device: torch.device) -> Tensor | None:
        """Which of the pass's places are tokens, int64; `None`: all."""
        if (self.counts == self.width).all():
            return None
        seen = np.arange(self.width) >= (self.width - self.counts)[:, None]
        return torch.from_numpy(np.flatnonzero(seen)).to(device)
