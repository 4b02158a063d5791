"""Host memory that pages go through between the pool and the tiers."""

import threading
from collections.abc import Callable

from torch import Tensor

from kvpaged.tiers.arena import Arena

ALIGNED = 4096
"""What room begins at a multiple of: a disk is read into it directly."""


class Countdown:
    """Does something once it was called so many times, from whichever threads."""

    def __init__(self, times: int, action: Callable[[], None]) -> None:
        self._left, self._action = times, action
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """One more time."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._action()


class Staging:
    """A bounded arena of room for records side by side. Any thread may call."""

    def __init__(self, size: int, *, pin: bool) -> None:
        self._arena = Arena(size, pin=pin)
        self._cond = threading.Condition()
        self.size = size
        self.used = 0

    def take(
        self, records: int, record_bytes: int, timeout: float = 0.0
    ) -> tuple[Tensor, Callable[[], None]] | None:
        """Room for some records, uint8 `[records, record_bytes]`, and what gives it back (once; a
        second call is nothing); `None` if there is none within `timeout` seconds.
        """
        size = records * record_bytes + ALIGNED
        with self._cond:
            found: list[int] = []

            def room() -> bool:
                offset = self._arena.alloc(size)
                if offset is not None:
                    found.append(offset)
                return offset is not None

            if size > self.size or not self._cond.wait_for(room, timeout):
                return None
            offset = -(-found[0] // ALIGNED) * ALIGNED
            self.used += size

        def give_back() -> None:
            with self._cond:
                if found:
                    self._arena.free(found.pop(), size)
                    self.used -= size
                    self._cond.notify_all()

        memory = self._arena.memory[offset : offset + records * record_bytes]
        return memory.view(records, record_bytes), give_back

    def close(self) -> None:
        """Let the memory go, once nobody uses it."""
        with self._cond:
            if not self.used:
                self._arena.close()
