"""A device whose copies end late, out of order, wrong or never: for tests of who waits for what."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvpaged.errors import UsageError
from kvpaged.offload.copies import Copies, InTicket, OutTicket, Sums
from kvpaged.pages.extents import Ids

Drive = Literal["hand", "wait", "thread"]
Fate = Literal["ends", "fails", "never"]


class _Flight:
    """A copy that was begun: pages that have yet to move, and what came of those that have."""

    def __init__(self, of: "SimulatedCopies", count: int, move: Callable[[int], Any], fate: Fate):
        self._of = of
        self.fate = fate
        self.move = move
        self.left = list(range(count))
        self.results: dict[int, Any] = {}
        self.ended = False

    def wait(self, timeout: float | None = None) -> bool:
        """See `Ticket.wait`."""
        return self._of.wait_for(self, timeout)

    def order(self) -> None:
        """See `Ticket.order`: what the caller does next comes after the copy, so it moves now."""
        self._of.finish(self)

    def rows(self) -> list[Any]:
        """What came of each page, in order; raises what a failed copy raises."""
        if not self.ended:
            raise UsageError("the result of a copy was asked for before it had ended")
        if self.fate == "fails":
            raise RuntimeError("the simulated device failed in a copy")
        return [self.results[row] for row in sorted(self.results)]


class _Out(_Flight, OutTicket):
    def sums(self) -> Sums:
        return np.stack(self.rows())


class _In(_Flight, InTicket):
    def wrong(self) -> npt.NDArray[np.bool_]:
        return np.array(self.rows(), np.bool_)


_F = TypeVar("_F", bound=_Flight)


class SimulatedCopies(Copies):
    """Makes the copies of `inner` page by page, when the simulation comes to them.

    A page is read from its source and written at that time, not when the copy was begun: a page
    that is reused while its copy is in flight really ends up with somebody else's bytes. Copies in
    flight take turns by chance, so they end in another order than they began in.

    Any thread may call. What becomes of a copy depends on the seed and on how many were begun
    before it; the order of moves, driven by hand or by waits, on the seed and the calls.

    Invariants:
        1. No byte moves but within `advance`, `finish`, a wait where waits drive, or the thread.
        2. A copy that never ends moves all its pages but the last.
    """

    def __init__(
        self,
        inner: Copies,
        *,
        seed: int,
        drive: Drive = "hand",
        never: float = 0.0,
        fails: float = 0.0,
        corrupts: float = 0.0,
        delay: float = 1e-3,
    ) -> None:
        """
        Args:
            inner: makes the copies, within the call (`CpuCopies`).
            seed: of everything that is left to chance.
            drive: what moves pages besides `advance` and `order`: nothing ("hand": a wait blocks
                until another thread has moved them), waits ("wait": simulated time passes only
                there, and a wait with a timeout is over when nothing is left that can move), or a
                thread ("thread": until `close`).
            never, fails: shares of copies that never end, and that fail (`sums` and `wrong`
                raise).
            corrupts: share of pages copied in of which a bit flips on the way.
            delay: the most seconds between two moves of the thread.
        """
        self._inner = inner
        self._seed = seed
        self._drive: Drive = drive
        self._shares = never, fails, corrupts
        self._delay = delay
        self._rng = random.Random(f"{seed} order")
        self._condition = threading.Condition(threading.RLock())
        self._flights: list[_Flight] = []
        self._closed = False
        self.begun = 0
        """Copies begun so far."""
        self.moved = 0
        """Pages moved so far."""
        self._thread: threading.Thread | None = None
        if drive == "thread":
            self._thread = threading.Thread(target=self._run, name="simulated-copies", daemon=True)
            self._thread.start()

    def out(self, ids: Ids, records: Tensor) -> OutTicket:
        """See `Copies.out`."""
        if not ids.size:
            return self._inner.out(ids, records)
        pages = ids.copy()

        def move(row: int) -> Sums:
            ticket = self._inner.out(pages[row : row + 1], records[row : row + 1])
            found: Sums = ticket.sums()[0].copy()
            return found

        with self._condition:
            return self._begin(_Out(self, ids.size, move, self._fate()))

    def into(self, ids: Ids, records: Tensor, sums: Sums, layers: slice) -> InTicket:
        """See `Copies.into`."""
        if not ids.size:
            return self._inner.into(ids, records, sums, layers)
        pages, expected = ids.copy(), sums.copy()
        with self._condition:
            chance = random.Random(f"{self._seed} bits {self.begun}")
            flips = [chance.random() < self._shares[2] for _ in range(ids.size)]

            def move(row: int) -> bool:
                record = records[row : row + 1]
                if flips[row]:
                    record = self._damaged(record, layers, sums.shape[1], chance)
                one = slice(row, row + 1)
                ticket = self._inner.into(pages[one], record, expected[one], layers)
                return bool(ticket.wrong()[0])

            return self._begin(_In(self, ids.size, move, self._fate()))

    def in_flight(self) -> int:
        """Copies that were begun and have not ended."""
        with self._condition:
            return len(self._flights)

    def advance(self, moves: int = 1) -> int:
        """Move up to so many pages, each the next of some copy; how many there were to move."""
        with self._condition:
            for done in range(moves):
                able = [flight for flight in self._flights if self._can_move(flight)]
                if not able:
                    return done
                self._move(self._rng.choice(able))
            return moves

    def finish(self, flight: _Flight) -> None:
        """Move all of one copy.

        Raises:
            UsageError: it is one that never ends: what waits for it would stand still.
        """
        with self._condition:
            if flight.fate == "never":
                raise UsageError("a simulated copy that never ends is waited for")
            while not flight.ended:
                self._move(flight)

    def wait_for(self, flight: _Flight, timeout: float | None) -> bool:
        """What tickets do on `wait`."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            while not flight.ended:
                if self._drive == "wait":
                    if self.advance():
                        continue
                    if timeout is None:
                        raise UsageError("a simulated copy that never ends is waited for")
                    return False
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._condition.wait(left)
            return True

    def close(self) -> None:
        """End the thread, if there is one; what has not moved by then does not."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _begin(self, flight: _F) -> _F:
        self.begun += 1
        self._flights.append(flight)
        return flight

    def _fate(self) -> Fate:
        never, fails, _ = self._shares
        drawn = random.Random(f"{self._seed} fate {self.begun}").random()
        return "never" if drawn < never else "fails" if drawn < never + fails else "ends"

    @staticmethod
    def _can_move(flight: _Flight) -> bool:
        return len(flight.left) > (1 if flight.fate == "never" else 0)

    def _move(self, flight: _Flight) -> None:
        row = flight.left.pop(self._rng.randrange(len(flight.left)))
        flight.results[row] = flight.move(row)
        self.moved += 1
        if not flight.left:
            flight.ended = True
            self._flights.remove(flight)
            self._condition.notify_all()

    def _damaged(self, record: Tensor, layers: slice, count: int, chance: random.Random) -> Tensor:
        first, stop, _ = layers.indices(count)
        size = record.shape[1] // count
        damaged = record.clone()
        damaged[0, chance.randrange(first * size, stop * size)] ^= 1 << chance.randrange(8)
        return damaged

    def _run(self) -> None:
        pauses = random.Random(f"{self._seed} pauses")
        while True:
            with self._condition:
                if self._closed:
                    return
                self._condition.wait(pauses.random() * self._delay)
                if not self._closed:
                    self.advance()
