"""Prompts as transformers gives them: ids and masks, checked, with their padding counted."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.errors import UsageError


def to_host(tensor: Tensor) -> npt.NDArray[np.int64]:
    """Ints of a tensor on the host; waits for its device."""
    host: npt.NDArray[np.int64] = tensor.detach().to("cpu", torch.int64).numpy()
    return host


def check_prompts(input_ids: Tensor, mask: Tensor | None) -> None:
    """Raise `UsageError` unless ids are ints `[rows, columns]` and the mask has their shape."""
    if (
        input_ids.ndim != 2
        or input_ids.dtype not in (torch.int64, torch.int32)
        or not len(input_ids)
    ):
        raise UsageError(
            f"input_ids are ints [rows, columns], got {tuple(input_ids.shape)} of {input_ids.dtype}"
        )
    if mask is not None and mask.shape != input_ids.shape:
        raise UsageError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}"
        )


def left_pads(mask: Tensor | None, rows: int, columns: int) -> npt.NDArray[np.int64]:
    """Columns hidden at the start of each row.

    Raises:
        UsageError: a row hides columns elsewhere.
    """
    if mask is None:
        return np.zeros(rows, np.int64)
    seen = to_host(mask) != 0
    pads = (~seen).sum(axis=1)
    wrong = np.flatnonzero((seen != (np.arange(columns) >= pads[:, None])).any(axis=1))
    if wrong.size:
        raise UsageError(
            f"row {int(wrong[0])} is padded elsewhere than on the left: pad on the left"
        )
    counted: npt.NDArray[np.int64] = pads.astype(np.int64)
    return counted
