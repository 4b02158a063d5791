"""When a tier that does not work is asked again."""

import threading
import time
from collections import Counter
from collections.abc import Callable

FAILURES = 3
"""In a row, after which a tier is left alone for a while."""
REST_S, LONGEST_REST_S = 1.0, 60.0


class Health:
    """Whether a tier is asked. After some failures in a row it is left alone, then asked once
    more; the rest doubles with each time that fails.

    Each kind of call has a row of its own: a tier that takes what it is given and hangs in reads
    does not get well by writing. Any thread may call.

    Args:
        failures: in a row, after which it rests.
        rest_s: seconds of the first rest.
        longest_s: of the longest.
        clock: seconds.

    Attributes:
        failures: in all.
        why: the latest.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, failures: int = FAILURES,
        rest_s: float = REST_S, longest_s: float = LONGEST_REST_S,
    ) -> None:  # fmt: skip
        self._clock, self._most = clock, failures
        self._first, self._longest = rest_s, longest_s
        self._lock = threading.Lock()
        self._rows: Counter[str] = Counter()
        self._rest, self._until = rest_s, 0.0
        self.failures = 0
        self.why = ""

    @property
    def ill(self) -> bool:
        """It has failed too often in a row: the next call is to see whether it still does."""
        with self._lock:
            return self._ill()

    def _ill(self) -> bool:
        return any(row >= self._most for row in self._rows.values())

    @property
    def left_s(self) -> float:
        """Seconds until it is asked again."""
        return max(0.0, self._until - self._clock())

    @property
    def resting(self) -> bool:
        """It is left alone now."""
        return self.left_s > 0

    def row(self, kind: str = "") -> int:
        """Failures in a row, of one kind of call."""
        return self._rows[kind]

    def succeeded(self, kind: str = "") -> None:
        """A call gave what was asked for."""
        with self._lock:
            self._rows.pop(kind, None)
            if not self._ill():
                self._rest, self._until = self._first, 0.0

    def failed(self, why: object, kind: str = "", *, enough: bool = False) -> None:
        """A call failed, or did not return in time; `enough`: it rests at once."""
        with self._lock:
            self.failures += 1
            self.why = str(why)
            self._rows[kind] = max(self._rows[kind] + 1, self._most * enough)
            if self._rows[kind] < self._most or self.resting:  # then it is of a call from before
                return
            self._until = self._clock() + self._rest
            self._rest = min(2 * self._rest, self._longest)
