"""The one lock of a store, which knows the process it belongs to."""

import os
import threading

from kvpaged.errors import UsageError


class StoreLock(threading.Condition):
    """A condition that a forked process cannot enter: the threads that would answer it are not
    there, another thread may have held it at that moment, and both would write the same files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process = os.getpid()

    @property
    def forked(self) -> bool:
        """This is another process than the one that made it."""
        return os.getpid() != self.process

    def __enter__(self) -> bool:
        if self.forked:
            raise UsageError(
                f"process {self.process} opened the store, and this is process {os.getpid()}: "
                "a forked process opens it anew, read_only"
            )
        return super().__enter__()
