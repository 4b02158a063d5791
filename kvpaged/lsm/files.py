"""The files of a store: what it asks of a file system, and the one that is real.

Everything the store reads or writes goes through `Files`, so that tests can put one below it that
loses, tears, flips and refuses (`kvpaged.testing.faulty_files`).
"""

import errno
import fcntl
import os
import socket
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kvpaged.errors import StorageError
from kvpaged.lsm.layout import BLOCK

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

MOST_PIECES = 1024
"""Buffers of one vectored call (IOV_MAX of Linux)."""


class File(Protocol):
    """An open file. Errors are `OSError`s."""

    def write(self, offset: int, data: Bytes, *, direct: bool) -> None:
        """Write all of `data` (uint8, one dimension). `direct` passes by the page cache where the
        file system can: offset, bytes and address must then be multiples of `BLOCK`.
        """

    def read(self, offset: int, into: Sequence[Bytes], *, direct: bool) -> int:
        """Fill the buffers one after another; the bytes read, fewer only where the file ends."""

    def size(self) -> int:
        """In bytes."""

    def map(self) -> Bytes:
        """Its bytes as they are now, uint8; they stay readable after the file was removed. Writing
        to them changes no file.
        """

    def sync(self) -> None:
        """Return when what was written will survive a loss of power."""

    def close(self) -> None:
        """Its maps stay."""


class Files(Protocol):
    """A directory of files. Errors are `OSError`s."""

    def open(self, name: str, *, write: bool = False, create: bool = False) -> File:
        """Open a file for reading, or for writing too; `create` makes a new one."""

    def list(self) -> list[str]:
        """Names of all files."""

    def rename(self, old: str, new: str) -> None:
        """In one step, over a file of the new name if there is one."""

    def remove(self, name: str) -> None:
        """A file that is gone already is an error."""

    def sync(self) -> None:
        """Return when names will survive a loss of power."""

    def lock(self, name: str) -> "Lock":
        """The lock of this name, or a `StorageError` that names its holder."""


class Lock(Protocol):
    """Held until it is closed, or its process ends."""

    def close(self) -> None:
        """Let it go."""


class LocalFile:
    """A file by its path, opened a second time where it can be read past the page cache."""

    def __init__(self, path: Path, *, write: bool, create: bool):
        self._fd = -1
        self._direct: int | None = None
        self.path = path
        access = (os.O_RDWR if write or create else os.O_RDONLY) | os.O_CLOEXEC
        self._fd = os.open(path, access | (os.O_CREAT | os.O_EXCL if create else 0), 0o644)
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            try:
                self._direct = os.open(path, access | direct)
            except OSError:  # a file system without it: everything goes by the page cache
                self._direct = None

    def write(self, offset: int, data: Bytes, *, direct: bool) -> None:
        """See `File.write`."""
        fd = self._direct if direct and self._direct is not None else self._fd
        view = data.data
        while view:
            try:
                done = os.pwrite(fd, view, offset)
            except OSError as error:
                if fd == self._fd or error.errno != errno.EINVAL:
                    raise
                fd = self._fd  # opened for it, and yet does not do it
                continue
            if done % BLOCK:  # the rest is not aligned any more
                fd = self._fd
            offset += done
            view = view[done:]

    def read(self, offset: int, into: Sequence[Bytes], *, direct: bool) -> int:
        """See `File.read`."""
        fd = self._direct if direct and self._direct is not None else self._fd
        views = [piece.data for piece in into if len(piece)]
        total = 0
        while views:
            try:
                done = os.preadv(fd, views[:MOST_PIECES], offset + total)
            except OSError as error:
                if fd == self._fd or error.errno != errno.EINVAL:
                    raise
                fd = self._fd
                continue
            if done == 0:
                break
            total += done
            if done % BLOCK:
                fd = self._fd
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]
        return total

    def size(self) -> int:
        """See `File.size`."""
        return os.fstat(self._fd).st_size

    def map(self) -> Bytes:
        """See `File.map`. A mapping keeps no descriptor: a store may have thousands."""
        size = self.size()
        if not size:
            return np.empty(0, np.uint8)
        try:
            mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            gone = not self.path.exists()  # removed since it was opened: a FileNotFoundError
            number = errno.ENOENT if gone else errno.EIO
            raise OSError(number, f"cannot be mapped: {error}", str(self.path)) from error
        return mapped.numpy()

    def sync(self) -> None:
        """See `File.sync`."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """See `File.close`."""
        for fd in (self._fd, self._direct):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd = -1
        self._direct = None

    def __del__(self) -> None:
        """Whoever reads it last closes it."""
        self.close()


class LocalLock:
    """An advisory lock of a whole file; the file says who holds it."""

    def __init__(self, path: Path):
        self._fd = -1
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip()
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise
            raise StorageError(
                f"{path.parent} is open for writing already, by {holder or 'an unnamed process'}"
            ) from None
        self._fd = fd
        _held.add(self)
        with suppress(OSError):  # a full disk: it is held all the same
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def close(self) -> None:
        """See `Lock.close`. Processes forked meanwhile do not hold it either."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """It is another process's: close the descriptor only."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        """A store that was dropped holds nothing."""
        self.close()


_held: "weakref.WeakSet[LocalLock]" = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_held):
        lock.forget()


os.register_at_fork(after_in_child=_forget_locks)  # else a child would hold it when this one ends


class LocalFiles:
    """A directory on this machine; `make` makes it where there is none."""

    def __init__(self, path: str | os.PathLike[str], *, make: bool = True):
        self.path = Path(path).expanduser().absolute()  # wherever the process goes
        if make:
            self.path.mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return str(self.path)

    def open(self, name: str, *, write: bool = False, create: bool = False) -> LocalFile:
        """See `Files.open`."""
        return LocalFile(self.path / name, write=write, create=create)

    def list(self) -> list[str]:
        """See `Files.list`."""
        return sorted(os.listdir(self.path))

    def rename(self, old: str, new: str) -> None:
        """See `Files.rename`."""
        os.replace(self.path / old, self.path / new)

    def remove(self, name: str) -> None:
        """See `Files.remove`."""
        os.unlink(self.path / name)

    def sync(self) -> None:
        """See `Files.sync`."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def lock(self, name: str) -> LocalLock:
        """See `Files.lock`."""
        return LocalLock(self.path / name)


class OpenFiles:
    """The files last read, at most `most`, kept open. Any thread may call.

    A store has more files than a process may have descriptors. One that is pushed out is closed
    when its last reader drops it.
    """

    def __init__(self, files: Files, most: int = 64):
        self._files, self._most = files, most
        self._open: OrderedDict[str, File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> File:
        """The file, opened for reading. Raises `OSError`."""
        with self._lock:
            file = self._open.get(name)
            if file is not None:
                self._open.move_to_end(name)
                return file
        opened = self._files.open(name)
        with self._lock:
            file = self._open.setdefault(name, opened)
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return file

    def drop(self, name: str) -> None:
        """It is to be removed."""
        with self._lock:
            self._open.pop(name, None)

    def clear(self) -> None:
        """Drop all."""
        with self._lock:
            self._open.clear()


def aligned(size: int) -> Bytes:
    """Uninitialised bytes whose address is a multiple of `BLOCK`."""
    raw = np.empty(size + BLOCK, np.uint8)
    start = -raw.ctypes.data % BLOCK
    return raw[start : start + size]
