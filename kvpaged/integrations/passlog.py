"""Which token ids the passes of a session have added, until the rows' logs are told."""

from collections.abc import Iterator

from torch import Tensor

from kvpaged.integrations.prompts import Ints, own_positions, to_host


class PassLog:
    """Ids and positions of committed passes, still on their device.

    Tokens at other positions than their own are not known: their keys are rotated otherwise, and
    nobody else can use them.
    """

    def __init__(self) -> None:
        self._due: list[tuple[Tensor | None, Tensor | None, Ints, Ints]] = []

    def add(self, ids: Tensor | None, positions: Tensor | None, starts: Ints, counts: Ints) -> None:
        """A pass that added `counts` tokens to rows that had `starts`; `ids` `[rows, tokens]`."""
        self._due.append((ids, positions, starts, counts))

    def clear(self) -> None:
        """Forget what nobody was told."""
        self._due.clear()

    def take(self, *, but: int, padded: bool) -> Iterator[tuple[int, Ints | None]]:
        """Rows and the ids each got (`None`: not known), of all passes but the last `but`."""
        due = self._due[: len(self._due) - but]
        del self._due[: len(due)]
        for ids, positions, starts, counts in due:
            host = None if ids is None else to_host(ids)
            own = own_positions(positions, starts, counts, padded=padded)
            for row, count in enumerate(counts.tolist()):
                if count:
                    yield row, None if host is None or not own[row] else host[row, -count:]
