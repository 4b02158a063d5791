"""When a tier that does not work is asked again."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

FAILURES = 3
"""In a row, after which a tier is left alone for a while."""
REST_S, LONGEST_REST_S = 1.0, 60.0
WRITES = frozenset({"put", "delete"})
"""Kinds of calls whose failures stop calls of these kinds alone."""


@dataclass(slots=True)
class _Row:
    """Failures in a row of one kind of call, and the rest that they bring."""

    rest_s: float
    failures: int = 0
    until: float = 0.0


class Health:
    """Whether a tier is asked. After some failures in a row it is left alone, then asked once
    more; the rest doubles with each time that fails.

    Each kind of call has a row of its own: a tier that takes what it is given and hangs in reads
    does not get well by writing. Where writes fail only those are left alone, for what is there
    may still be read; where anything else fails, everything is. Any thread may call.

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
        self._rows: dict[str, _Row] = {}
        self.failures = 0
        self.why = ""

    def failing(self, kind: str = "") -> list[str]:
        """The kinds that failed too often in a row and stop this one: the next such call is to see
        whether they still do.
        """
        with self._lock:
            return [
                of for of, row in self._rows.items()
                if row.failures >= self._most and stops(of, kind)
            ]  # fmt: skip

    def ill(self, kind: str = "") -> bool:
        """Whether some are failing."""
        return bool(self.failing(kind))

    def left_s(self, kind: str = "") -> float:
        """Seconds until such a call is made again."""
        with self._lock:
            return self._left(kind)

    def rests(self, kind: str = "") -> bool:
        """Such calls are not made now."""
        return self.left_s(kind) > 0

    def row(self, kind: str = "") -> int:
        """Failures in a row, of one kind of call."""
        with self._lock:
            return self._rows[kind].failures if kind in self._rows else 0

    def succeeded(self, kind: str = "") -> None:
        """A call gave what was asked for."""
        with self._lock:
            self._rows.pop(kind, None)

    def failed(self, why: object, kind: str = "", *, enough: bool = False) -> bool:
        """A call failed, or did not return in time; `enough`: it rests at once. Whether that began
        a rest.
        """
        with self._lock:
            self.failures += 1
            self.why = str(why)
            row = self._rows.setdefault(kind, _Row(self._first))
            row.failures = max(row.failures + 1, self._most * enough)
            if row.failures < self._most or self._left(kind):  # then it is of a call from before
                return False
            row.until = self._clock() + row.rest_s
            row.rest_s = min(2 * row.rest_s, self._longest)
            return True

    def _left(self, kind: str) -> float:
        until = [row.until for of, row in self._rows.items() if stops(of, kind)]
        return max(0.0, max(until, default=0.0) - self._clock())


def stops(failing: str, kind: str) -> bool:
    """Whether calls of a kind are not made because those of another fail."""
    return failing not in WRITES or kind in WRITES
