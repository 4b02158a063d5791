"""Ctrl-C while books are kept waits until they are whole; at the end, what is open is closed."""

import atexit
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Within, a SIGINT that would raise `KeyboardInterrupt` in the main thread is kept back and
    raised at the end; a second one is raised at once. Elsewhere, or with a handler of the
    program's own, nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if seen:
        raise KeyboardInterrupt


class _Closes(Protocol):
    def close(self) -> None: ...


_OPEN: "weakref.WeakSet[_Closes]" = weakref.WeakSet()


def close_at_exit(what: _Closes) -> None:
    """Close it before the interpreter ends, if it is still there: a thread that is killed in the
    midst of a step takes the process with it (SIGABRT).
    """
    _OPEN.add(what)


@atexit.register
def _close_all() -> None:
    for each in list(_OPEN):
        each.close()
