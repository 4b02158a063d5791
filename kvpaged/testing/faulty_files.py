"""A directory in memory that fails as disks and machines do, for tests of a store.

It knows what was written and what was synced. `killed` gives what a process finds that starts after
this one was killed; `powerless` what it finds after a loss of power: of the writes that were not
synced some are there, some are not and some are torn; of changes of names that were not synced some
are there and some are not, in any order, which is worse than most file systems do.
"""

import errno
import random
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvpaged.errors import StorageError
from kvpaged.lsm.files import Bytes

SECTOR = 512


class Died(BaseException):
    """The process ended here: not an `Exception`, for nothing may handle it."""


class _Held(bytearray):
    """A mapping: keeps its file's bytes on disk."""

    inode: "_Inode"


class _Inode:
    """A file's bytes: as processes see them, as they are synced, and what was written since."""

    def __init__(self, data: bytes = b""):
        self.data = bytearray(data)
        self.synced = bytes(data)
        self.unsynced: list[tuple[int, bytes]] = []
        self.holders: list[weakref.ref[Any]] = []

    def held(self) -> bool:
        """Somebody has it open or mapped."""
        self.holders = [holder for holder in self.holders if holder() is not None]
        return bool(self.holders)

    def write(self, offset: int, raw: bytes) -> None:
        if len(self.data) < offset + len(raw):
            self.data.extend(bytes(offset + len(raw) - len(self.data)))
        self.data[offset : offset + len(raw)] = raw
        self.unsynced.append((offset, raw))

    def sync(self) -> None:
        self.synced = bytes(self.data)
        self.unsynced.clear()

    def copy(self) -> "_Inode":
        """The same bytes, which nobody has open."""
        other = _Inode(bytes(self.data))
        other.synced, other.unsynced = self.synced, list(self.unsynced)
        return other

    def after_power_loss(self, rng: random.Random) -> "_Inode":
        left = _Inode(self.synced)
        for offset, raw in self.unsynced:
            fate = rng.random()
            if fate < 0.4:
                left.write(offset, raw)
            elif fate < 0.7:
                for start, piece in _sectors(offset, raw):
                    if rng.random() < 0.5:
                        left.write(start, piece)
        left.sync()
        return left


def _sectors(offset: int, raw: bytes) -> list[tuple[int, bytes]]:
    return [(offset + at, raw[at : at + SECTOR]) for at in range(0, len(raw), SECTOR)]


class FaultyFile:
    """A file of `FaultyFiles`; see `kvpaged.lsm.files.File`."""

    def __init__(self, files: "FaultyFiles", inode: _Inode, name: str):
        self._files, self._inode, self._name = files, inode, name
        inode.holders.append(weakref.ref(self))

    def write(self, offset: int, data: Bytes, *, direct: bool) -> None:
        """See `File.write`; a call that fails may have written a part."""
        raw = data.tobytes()
        grown = max(0, offset + len(raw) - len(self._inode.data))
        self._files._call(
            "write", self._name, torn=lambda rng: self._tear(offset, raw, rng), room=grown
        )
        self._inode.write(offset, raw)
        self._files._measure()

    def _tear(self, offset: int, raw: bytes, rng: random.Random) -> None:
        if rng.random() < 0.5:  # the first bytes only
            self._inode.write(offset, raw[: rng.randrange(len(raw) + 1)])
            return
        for start, piece in _sectors(offset, raw):
            if rng.random() < 0.5:
                self._inode.write(start, piece)

    def read(self, offset: int, into: Sequence[Bytes], *, direct: bool) -> int:
        """See `File.read`."""
        self._files._call("read", self._name)
        total = 0
        for piece in into:
            raw = self._inode.data[offset + total : offset + total + len(piece)]
            piece[: len(raw)] = np.frombuffer(raw, np.uint8)
            total += len(raw)
            if len(raw) < len(piece):
                break
        return total

    def size(self) -> int:
        """See `File.size`."""
        return len(self._inode.data)

    def map(self) -> Bytes:
        """See `File.map`."""
        self._files._call("map", self._name)
        held = _Held(self._inode.data)
        held.inode = self._inode
        self._inode.holders.append(weakref.ref(held))
        return np.frombuffer(held, np.uint8)

    def sync(self) -> None:
        """See `File.sync`."""
        self._files._call("sync", self._name)
        self._inode.sync()

    def close(self) -> None:
        """See `File.close`."""


_Change = dict[str, _Inode | None]
"""Names and what they stand for from then on, `None` for nothing."""


def _apply(names: dict[str, _Inode], change: _Change) -> None:
    for name, inode in change.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


class FaultyLock:
    """See `kvpaged.lsm.files.Lock`."""

    def __init__(self, files: "FaultyFiles"):
        self._files = files

    def close(self) -> None:
        """See `Lock.close`."""
        self._files.locked = False


class FaultyFiles:
    """See `kvpaged.lsm.files.Files`, and the module.

    Args:
        seed: of what is torn and lost.
        capacity: bytes of the disk; writes beyond are refused with ENOSPC, when half done.

    Attributes:
        calls: so far that change something (writes, syncs, names).
        peak: most bytes there were, those of removed files that are still read included.
        failing: "read": all reads fail with EIO, "write": all calls that change something.
    """

    def __init__(self, seed: int = 0, *, capacity: int | None = None):
        self.rng = random.Random(seed)
        self.capacity = capacity
        self.calls = self.peak = 0
        self.failing: str | None = None
        self.locked = False
        self._names: dict[str, _Inode] = {}
        self._synced_names: dict[str, _Inode] = {}
        self._changes: list[_Change] = []
        self._inodes: weakref.WeakSet[_Inode] = weakref.WeakSet()
        self._die_in: int | None = None
        self._refuse_in: tuple[int, int] | None = None
        self._dead = False

    def __str__(self) -> str:
        return "faulty"

    # -- faults ------------------------------------------------------------------------------------

    def die_in(self, calls: int | None) -> None:
        """The process ends in the middle of the `calls`-th call from now that changes something."""
        self._die_in = calls

    def refuse_in(self, calls: int | None, number: int = errno.EIO) -> None:
        """That call fails, half done, with this error."""
        self._refuse_in = None if calls is None else (calls, number)

    def killed(self) -> "FaultyFiles":
        """What is there once this process is dead."""
        return self._next(self._names)

    def powerless(self) -> "FaultyFiles":
        """What is there after a loss of power."""
        names = dict(self._synced_names)
        for change in self._changes:
            if self.rng.random() < 0.5:
                _apply(names, change)
        return self._next({name: inode.after_power_loss(self.rng) for name, inode in names.items()})

    def _next(self, names: dict[str, _Inode]) -> "FaultyFiles":
        after = FaultyFiles(self.rng.randrange(1 << 30), capacity=self.capacity)
        after._names = {name: inode.copy() for name, inode in names.items()}
        after._synced_names = dict(after._names)
        for inode in after._names.values():
            after._inodes.add(inode)
        return after

    def contents(self) -> dict[str, bytes]:
        """Bytes of all files."""
        return {name: bytes(inode.data) for name, inode in self._names.items()}

    def with_contents(self, contents: dict[str, bytes]) -> "FaultyFiles":
        """Another disk with these files."""
        return self._next({name: _Inode(data) for name, data in contents.items()})

    def used(self) -> int:
        """Bytes of all files, those of removed ones that are still read included."""
        named = {id(inode) for inode in self._names.values()}
        return sum(len(i.data) for i in self._inodes if id(i) in named or i.held())

    def _measure(self) -> None:
        self.peak = max(self.peak, self.used())

    def _call(self, kind: str, name: str, *, torn: Any = None, room: int = 0) -> None:
        if self._dead:
            raise Died
        if kind in ("read", "map"):
            if self.failing == "read" and name.endswith(".seg"):
                raise OSError(errno.EIO, "read fails", name)
            return
        self.calls += 1
        if self._die_in is not None:
            self._die_in -= 1
            if self._die_in <= 0:
                self._dead = True
                if torn is not None:
                    torn(self.rng)
                raise Died
        if self._refuse_in is not None:
            calls, number = self._refuse_in
            self._refuse_in = (calls - 1, number)
            if calls <= 1:
                self._refuse_in = None
                if torn is not None:
                    torn(self.rng)
                raise OSError(number, f"{kind} fails", name)
        if self.failing == "write":
            raise OSError(errno.EIO, f"{kind} fails", name)
        if self.capacity is not None and room and self.used() + room > self.capacity:
            raise OSError(errno.ENOSPC, "the disk is full", name)

    # -- what a store uses -------------------------------------------------------------------------

    def open(self, name: str, *, write: bool = False, create: bool = False) -> FaultyFile:
        """See `Files.open`."""
        if self._dead:
            raise Died
        if create:
            self._call("create", name)
            if name in self._names:
                raise FileExistsError(errno.EEXIST, "is there", name)
            inode = _Inode()
            self._inodes.add(inode)
            self._change({name: inode})
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, "is not there", name)
        return FaultyFile(self, self._names[name], name)

    def list(self) -> list[str]:
        """See `Files.list`."""
        if self._dead:
            raise Died
        return sorted(self._names)

    def rename(self, old: str, new: str) -> None:
        """See `Files.rename`."""
        self._call("rename", old)
        self._change({old: None, new: self._names[old]})

    def remove(self, name: str) -> None:
        """See `Files.remove`."""
        self._call("remove", name)
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, "is not there", name)
        self._change({name: None})

    def _change(self, change: "_Change") -> None:
        _apply(self._names, change)
        self._changes.append(change)

    def sync(self) -> None:
        """See `Files.sync`."""
        self._call("sync names", "")
        self._synced_names = dict(self._names)
        self._changes.clear()

    def lock(self, name: str) -> FaultyLock:
        """See `Files.lock`."""
        if self.locked:
            raise StorageError("faulty is open for writing already, by this process")
        self.locked = True
        return FaultyLock(self)
