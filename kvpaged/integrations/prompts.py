"""Prompts as transformers gives them: ids and masks, checked, with their padding counted."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.errors import UnsupportedModelError, UsageError

Ints = npt.NDArray[np.int64]


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


def check_mask(mask: Any, pads: Ints, columns: int, width: int) -> None:
    """Raise unless a pass's mask hides exactly the pads, `[rows]`, before `columns + width`.

    On a GPU the mask of a single new column is not looked at: `generate()` appends ones, and a look
    is a synchronisation a token.
    """
    if mask is None:
        if pads.any() and columns == 0:
            raise UsageError("the session has padded rows and the forward pass has no mask")
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UnsupportedModelError("a session takes a mask of shape [rows, columns] or none")
    if tuple(mask.shape) != (len(pads), columns + width):
        raise UsageError(
            f"the mask has shape {tuple(mask.shape)}, the pass {(len(pads), columns + width)}"
        )
    if width == 1 and columns and mask.device.type != "cpu":
        return
    seen = to_host(mask) != 0
    wrong = (seen != (np.arange(seen.shape[1]) >= pads[:, None])).any(axis=1)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise UsageError(
            f"row {row}: the mask hides {int((~seen[row]).sum())} columns, the session was made "
            f"with {int(pads[row])} pads on the left"
        )


def check_prompt(ids: Tensor, prompt: Ints, pads: Ints, columns: int) -> None:
    """Raise unless the ids from `columns` on are the prompts (`[rows, columns]`) so far as they
    go.
    """
    stop = min(columns + ids.shape[1], prompt.shape[1])
    given = to_host(ids[:, : stop - columns])
    pads = np.repeat(pads, len(prompt) // len(pads))
    real = np.arange(columns, stop) >= pads[:, None]
    differ = (given != prompt[:, columns:stop]) & real
    if differ.any():
        row, place = (int(x[0]) for x in np.nonzero(differ))
        raise UsageError(
            f"row {row}, column {columns + place}: the session was made for token "
            f"{int(prompt[row, columns + place])}, the forward pass has {int(given[row, place])}"
        )


def check_not_again(positions: Any, lengths: Ints, width: int) -> None:
    """Raise if a pass ends before the position its rows (`lengths`) have reached: a prompt fed
    twice. Looked at only where a whole prompt could come again, which no decode step is.
    """
    held = int(lengths.max())
    if width < held or held < 2 or not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    last = to_host(positions[:, -1])
    if len(last) % len(lengths) == 0:
        lengths = np.repeat(lengths, len(last) // len(lengths))
    if (last < lengths).all():
        raise UsageError(
            f"the session holds {held} tokens and the pass begins at the start again: generate() "
            "feeds a prompt once more that is held whole; crop(-1) leaves it its last token"
        )


def own_positions(
    positions: Tensor | None, starts: Ints, counts: Ints, *, padded: bool
) -> list[bool]:
    """For each row, whether its new tokens stood at their own positions, `start ..`.

    A pass without positions numbers the columns, which is right where no row is padded.
    """
    if positions is None:
        return [not padded] * len(counts)
    if positions.ndim != 2:
        return [False] * len(counts)
    host = to_host(positions)
    host = np.broadcast_to(host, (len(counts), host.shape[1]))
    return [
        bool((host[row, host.shape[1] - n :] == np.arange(start, start + n)).all())
        for row, (start, n) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True))
    ]
