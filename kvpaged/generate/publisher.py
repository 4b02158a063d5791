"""When the full pages of running rows go into the prefix index."""

import time

from kvpaged.slot_batch import SlotBatch

EVERY = 16
"""Steps from one look at which pages are full to the next; prompts are looked at when they end."""

LATE_S = 0.3
"""Steps may be slow: after so long all that is full is entered at once, for what is not entered is
in no tier.
"""


class Publisher:
    """Spreads the entering of pages over steps: a look now and then, a share of what it found in
    each step until the next.
    """

    def __init__(self, batch: SlotBatch) -> None:
        self._batch = batch
        self._since = 0
        self._due: list[tuple[int, int]] = []
        self._share = 0
        self._looked = time.monotonic()

    def after_step(self) -> None:
        """A step has ended."""
        self._since += 1
        late = time.monotonic() - self._looked > LATE_S
        if self._since >= EVERY or late:
            self._looked = time.monotonic()
            self.enter_all()
            self._batch.leave_windows()
            self._due = self._batch.due()
            self._share = len(self._due) if late else -(-len(self._due) // EVERY)
            self._since = 0
        if self._due:
            now, self._due = self._due[: self._share], self._due[self._share :]
            self._batch.enter_pages(now)

    def enter_all(self) -> None:
        """Enter what has been found and not entered yet."""
        due, self._due = self._due, []
        self._batch.enter_pages(due)

    def publish(self) -> None:
        """Look, and enter everything now."""
        self._due, self._since = [], 0
        self._batch.publish()

    def forget(self, row: int) -> None:
        """A row loses its sequence."""
        if self._due:
            self._due = [due for due in self._due if due[0] != row]
