"""Whose turn it is: threads in the order in which they asked."""

import threading
from collections import deque


class Turns:
    """A lock that goes to whoever has waited longest; its owner may take it again.

    Python's own goes to who asks first once it is free: the thread that has just given it back. A
    loop that takes it for each step would keep all others out until it ends.

    A `KeyboardInterrupt` while it is taken or given back may lose it: hold those back around it
    (`held_interrupts`). One raised while it is waited for does no harm.
    """

    def __init__(self) -> None:
        self._books = threading.RLock()  # the collector may run a stream's end within
        self._owner: int | None = None
        self._depth = 0
        self._line: deque[tuple[int, threading.Lock]] = deque()

    def is_mine(self) -> bool:
        """Whether this thread has it."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._books:
            if self._owner in (me, None):
                self._owner = me
                self._depth += 1
                return
            called = threading.Lock()
            called.acquire()
            self._line.append((me, called))
        try:
            called.acquire()  # `__exit__` has made this thread the owner
        except BaseException:
            with self._books:
                waits = (me, called) in self._line
                if waits:
                    self._line.remove((me, called))
            if not waits:
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._books:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._line:
                (self._owner, called), self._depth = self._line.popleft(), 1
                called.release()
