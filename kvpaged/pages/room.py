"""Waiting for pages that copies in flight keep from being taken."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvpaged.errors import OutOfPagesError
from kvpaged.pages.mixed import AnyAllocator

T = TypeVar("T")
LEASES_S = 1.0
"""What is waited for them, if there is no other room."""


def wait_for_room(
    take: Callable[[], T], lock: threading.Condition, allocators: Sequence[AnyAllocator],
    closed: Callable[[], bool],
) -> T:  # fmt: skip
    """What `take` gives, which takes pages, or nothing where it raises `OutOfPagesError`; tried
    again while leased pages of the allocators are what it lacks.

    Args:
        take: see above.
        lock: held, and let go while it waits; nobody notifies it: copies are short.
        allocators: all from which pages may be taken.
        closed: nothing is to be waited for any more.

    Raises:
        OutOfPagesError: there is no room.
    """
    until: float | None = None
    while True:
        try:
            return take()
        except OutOfPagesError as error:
            until = time.monotonic() + LEASES_S if until is None else until
            held = sum(allocator.held_back() for allocator in allocators)
            lacking = (error.needed or 0) - (error.available or 0)
            if lacking > held or time.monotonic() > until:
                raise
            lock.wait(0.001)
            if closed():
                raise
