"""What a session does between forward passes: what transformers may ask of a cache."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.integrations.passlog import PassLog
from kvpaged.integrations.prompts import left_pads
from kvpaged.tokens import Ids


class SessionRows(Cache):
    """The rows of a session: `SessionCache` is made of it and of its side of forward passes."""

    batch: Batch
    columns: int
    reused: int
    pads: Ids
    _cache: CacheBooks
    _prompt: Ids
    _passes: PassLog
    _pads_known: bool

    def close(self) -> None:
        """Give the pages back; full ones wait in the cache for the next that begins so. Closing
        twice is nothing; any other use afterwards is a `UsageError`.
        """
        try:
            if not self.batch.closed and not self._cache.closed:
                self._write_logs()
                self.batch.publish()
        finally:
            self.batch.close()

    def pages(self) -> int:
        """Pages held, over all layer groups, shared ones once."""
        return self.batch.pages()

    def memory_bytes(self) -> int:
        """Bytes of those pages."""
        return self.batch.memory_bytes()

    def tokens(self, row: int) -> Ids | None:
        """Token ids a row holds, without pads; `None` where a forward pass came without ids
        (embeddings).
        """
        self._write_logs()
        ids = self.batch.logs[row].ids
        return None if ids is None else np.concatenate((ids, self.batch.owed[row]))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held, pads included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns a mask would have, and the first."""
        return self.columns + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` columns of every row.

        Raises:
            ValueError: positive, or more than there are.
            UsageError: so far back that pages a window would see were given back.
        """
        if tokens_to_remove > 0 or -tokens_to_remove > self.columns:
            raise ValueError(
                f"crop takes minus the columns to remove, -{self.columns} to 0, got "
                f"{tokens_to_remove}"
            )
        self._write_logs()
        self.batch.publish()
        columns = self.columns + tokens_to_remove
        lengths = np.maximum(columns - self.pads, 0)
        self.batch.rewind_all(lengths.astype(np.int64))
        self.columns = columns
        self._prompt = self._prompt[:, :columns]

    def reset(self) -> None:
        """Forget everything; the next forward pass says how many rows there are, and their pads.

        Nothing is searched for it then, and nothing of it is kept for others.
        """
        self.batch.check_open()
        self.close()
        self.batch = Batch(self._cache, self.batch.rows)
        self._passes.clear()
        self.columns = self.reused = 0
        self.pads = np.zeros(self.batch.rows, np.int64)
        self._prompt = np.zeros((self.batch.rows, 0), np.int64)
        self._pads_known = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row `i` what row `beam_idx[i]` is: tables change, pages are shared, nothing is
        copied.
        """
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`repeats` rows for each row, side by side, sharing its pages."""
        self._select([row for row in range(self.batch.rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (ints, or a bool for each row) and give back the others'
        pages.
        """
        chosen = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
        self._select(chosen.tolist())

    @property
    def batch_size(self) -> int:
        """Rows, beams included."""
        return self.batch.rows

    def _select(self, rows: list[int]) -> None:
        self._write_logs()
        self.batch.select(rows)
        self.pads = self.pads[rows]
        self._prompt = self._prompt[rows]

    def _pads_of(self, mask: Any, width: int) -> Ids:
        """After a reset, the padding that the first pass's mask says."""
        shape = (self.batch.rows, width)
        return left_pads(mask if isinstance(mask, Tensor) and mask.shape == shape else None, *shape)

    def _write_logs(self, but: int = 0) -> None:
        """Move the ids of committed steps to the rows' logs, but for those of the last `but`."""
        for row, known in self._passes.take(but=but, padded=bool(self.pads.any())):
            self.batch.logs[row].extend(known)
