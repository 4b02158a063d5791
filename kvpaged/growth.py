"""The pages of a step, taken in all layer groups or in none; the cache's lock is held."""

from collections.abc import Sequence

import numpy as np

from kvpaged.errors import OutOfPagesError
from kvpaged.group_rows import Flags, GroupRows, Growth, Ints
from kvpaged.pages.extents import Ids
from kvpaged.pages.table import Successor


def take_all(
    groups: Sequence[GroupRows], lengths: Ints, counts: Ints, touched: Flags | None,
    single: Flags | None,
) -> list[Growth]:  # fmt: skip
    """What `counts` new tokens a row need, in each group.

    Args:
        groups: of a batch.
        lengths, counts: of each row.
        touched, single: see `GroupRows.needs`.

    Raises:
        OutOfPagesError: there is no room; nothing is held.
    """
    needs = [rows.needs(lengths, counts, touched, single) for rows in groups]
    growths: list[Growth] = []
    try:
        for rows, need in zip(groups, needs, strict=True):
            growths.append(rows.take(need))
    except OutOfPagesError:
        for rows, growth in zip(groups, growths, strict=False):
            rows.give_back(growth)
        raise
    return growths


def take_each(
    groups: Sequence[GroupRows], lengths: Ints, full: Ints, filling: Ints
) -> list[tuple[Ids, list[Successor]]]:
    """The same of one more token a row: a page for each of the rows `full`, and what is to follow
    the open pages of the rows `filling`.

    Raises:
        OutOfPagesError: there is no room; nothing is held.
    """
    taken: list[tuple[Ids, list[Successor]]] = []
    try:
        for rows in groups:
            ids = rows.take_each(full) if len(full) else np.empty(0, np.int32)
            taken.append((ids, []))
            taken[-1] = ids, rows.take_successors(filling, lengths)
    except OutOfPagesError:
        for rows, (ids, successors) in zip(groups, taken, strict=False):
            rows.page_class.allocator.release(ids)
            rows.give_back(Growth([], [], successors))
        raise
    return taken
