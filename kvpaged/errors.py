"""The errors of kvpaged: one base, six kinds, each message naming the fact and the values."""


class KVPagedError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(KVPagedError, ValueError):
    """An option or an argument is impossible; nothing was allocated or changed."""


class OutOfPagesError(KVPagedError, MemoryError):
    """The pool has fewer free pages than a step needs.

    Raised before anything changed: the sequences are as long as they were, and closing any of them
    (or another session) makes room.

    Attributes:
        needed: pages the step asked for, in the class that ran out.
        available: pages that class could still have been given.
    """

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class UsageError(KVPagedError, RuntimeError):
    """A call came in a state that does not allow it (closed, out of order, or with other
    tokens).
    """


class UnsupportedModelError(KVPagedError, TypeError):
    """A model, or one way of calling it, whose attention cannot be served from pages."""


class IntegrityError(KVPagedError, AssertionError):
    """Bytes or books are not what they must be; the message names the first page or count that is
    off.
    """


class StorageError(KVPagedError, OSError):
    """A disk, or whoever holds it, refuses: full, failing, locked, too slow, or out of its budget.

    What was asked for has not happened; what was stored before can still be read.
    """
