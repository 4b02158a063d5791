"""Guessing the next tokens of a reply from what followed the same words before."""

import numpy as np
import numpy.typing as npt

LONGEST, SHORTEST = 4, 2
"""Tokens that must agree: the longest run that occurs earlier counts, down to the shortest."""


def guess(ids: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.int32]:
    """Up to `count` tokens that followed the latest earlier occurrence of the last tokens of `ids`.

    Saxena, "Prompt Lookup Decoding" (2023).
    """
    nothing = ids[:0]
    if count <= 0 or len(ids) < SHORTEST + 1:
        return nothing
    ends = np.flatnonzero(ids[:-1] == ids[-1])
    best = nothing
    for length in range(2, LONGEST + 1):
        ends = ends[ends >= length - 1]
        ends = ends[ids[ends - length + 1] == ids[-length]] if len(ids) >= length else ends[:0]
        if not len(ends):
            break
        if length >= SHORTEST:
            last = int(ends[-1])
            best = ids[last + 1 : last + 1 + count]
    return best
