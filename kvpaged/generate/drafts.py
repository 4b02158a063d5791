"""Drafts: tokens guessed ahead of replies, checked together, and what of them was right."""

import numpy as np
import numpy.typing as npt

from kvpaged.generate.lookup import guess
from kvpaged.generate.replies import tell
from kvpaged.generate.rows import Rows
from kvpaged.slot_batch import SlotBatch
from kvpaged.step import Ints


def write_drafts(batch: SlotBatch, rows: Rows) -> Ints:
    """Write guesses behind the known tokens of rows that ask for them.

    Returns:
        int64 `[rows]`, how many each row has: never so many that it would reach its limit by them,
        or that a wrong one could lie in a page that is compressed.
    """
    drafts = np.zeros(batch.rows, np.int64)
    for slot in np.flatnonzero((rows.lookup > 0) & ~rows.prefilling).tolist():
        known = int(batch.known[slot])
        most = min(int(rows.lookup[slot]), int(rows.limit[slot]) - known - 1)
        if batch.compressed:
            most = min(most, batch.page_size - 1 - known % batch.page_size)
        if known and most > 0:
            ids = guess(batch.tokens[slot, :known], most)
            batch.tokens[slot, known : known + len(ids)] = ids
            drafts[slot] = len(ids)
    return drafts


def accept_drafts(
    batch: SlotBatch, rows: Rows, drafts: Ints, slots: Ints, tokens: npt.NDArray[np.int64]
) -> tuple[Ints, npt.NDArray[np.int64]]:
    """Count drafts that were right among the known tokens, and take back the keys of the others.

    Args:
        batch: its step has been committed.
        rows: who they are.
        drafts: what `write_drafts` returned.
        slots, tokens: int64 `[n]`, the tokens chosen: of a row with drafts one for each place.

    Returns:
        Each row once, with the token that comes after its drafts.
    """
    lengths = batch.lengths.copy()
    firsts = np.flatnonzero(np.diff(slots, prepend=-1) != 0)
    last = firsts.copy()
    for number, first in enumerate(firsts.tolist()):
        slot = int(slots[first])
        count = int(drafts[slot])
        if not count:
            continue
        known = int(batch.known[slot])
        chosen = tokens[first : first + count]
        wrong = np.flatnonzero(batch.tokens[slot, known : known + count] != chosen)
        ends = np.flatnonzero((rows.stops[slot][:, None] == chosen).any(0))
        right = min(int(wrong[0]) if len(wrong) else count, int(ends[0]) if len(ends) else count)
        reply = rows.replies[slot]
        if reply is not None:
            reply.completion.drafted += count
            for place, token in enumerate(chosen[:right].tolist() if rows.talks[slot] else ()):
                if tell(reply, token, last=False):
                    right = place  # a stop text ends it here
                    reply.unsent.pop()
                    break
            reply.completion.accepted += right
            del reply.logprobs[known + right + 1 - int(rows.prompt[slot]) :]  # of wrong guesses
        batch.known[slot] += right
        lengths[slot] = known + right
        last[number] = first + right
    if (lengths < batch.lengths).any():
        batch.rewind_all(lengths)
    return slots[last], tokens[last]
