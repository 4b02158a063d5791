"""`TensorStore`: an embedded store of tensors on disk."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from types import TracebackType
from typing import Any

from kvpaged.codecs import codec as codec_of
from kvpaged.config import parse_bytes
from kvpaged.errors import ConfigError, StorageError, UsageError
from kvpaged.lsm import manifest as manifests
from kvpaged.lsm.batch import Put, WriteBatch
from kvpaged.lsm.eviction import Policy, lru
from kvpaged.lsm.files import Files, LocalFiles, Lock
from kvpaged.lsm.keeper import Keeper
from kvpaged.lsm.loading import follow, load
from kvpaged.lsm.lock import StoreLock
from kvpaged.lsm.log import Coming, SlabPool
from kvpaged.lsm.lookup import Lookup
from kvpaged.lsm.options import Durability, StoreOptions
from kvpaged.lsm.reader import Reader
from kvpaged.lsm.snapshot import Snapshot
from kvpaged.lsm.stats import FileInfo, StoreStats, collect, files_of
from kvpaged.lsm.tree import Found, Tree
from kvpaged.lsm.values import Tensors, coming_delete, coming_value
from kvpaged.lsm.verify import Damage, verify_log, verify_manifests, verify_segment
from kvpaged.lsm.view import View
from kvpaged.lsm.writer import WRITE_FROM, Writer
from kvpaged.lsm.writes import Begun

LOCK = "LOCK"
SLABS = 4
"""Pieces of memory that the memtable is made of."""
MOST_TTL = 1e10
"""Seconds: three centuries. `None` is for ever."""
OPENINGS = 20
"""How often a reader starts again because the writer removed a file meanwhile."""


Puts = Mapping[bytes, Tensors] | Iterable[Put]
"""Values by key, or with all that belongs to them."""


class TensorStore(Lookup):
    """Tensors by key, on disk, in one directory. Any thread may call; one process at a time may
    have it open for writing, any number for reading (`read_only`).

    Args:
        path: of the directory; it is made.
        max_bytes: what all files take up at most, bytes or a string like `"10GiB"`; `None`: as much
            as comes. Values that were not asked for longest go when there is no room.
        codec: how tensors are stored, see `StoreOptions.codec`; `"lossless"` unless said otherwise.
        durability: when a put returns, see `StoreOptions.durability`; `"process"` unless said
            otherwise.
        read_only: see what is there; `refresh` looks again.
        options: the other dials.
        policy: which values go when there is no room.
        on_gone: called with the key of each value that is given up by the store itself: evicted,
            expired, damaged and dropped, or found and not written (durability `none`). Under the
            store's lock, by any thread: it must be quick and not call the store. What expires
            counts when that is noticed.
        files: the file system, for tests.

    Raises:
        StorageError: another process writes to it (the message names it), or it can't be opened.
        IntegrityError: its manifest is damaged in both copies.
        ConfigError: an option is impossible.

    What is damaged otherwise does not keep it from opening: `stats().damage` names it, and the rest
    is there.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int | str | None = None,
        codec: str | None = None, durability: Durability | None = None, read_only: bool = False,
        options: StoreOptions | None = None, policy: Policy = lru,
        on_gone: Callable[[bytes], None] | None = None, files: Files | None = None,
    ):  # fmt: skip
        given = options or StoreOptions()
        self.options = changed(
            given, codec=codec or given.codec, durability=durability or given.durability,
            max_bytes=given.max_bytes if max_bytes is None else parse_bytes(max_bytes),
        )  # fmt: skip
        self.read_only = read_only
        self._codec = codec_of(self.options.codec)
        self._clock: Callable[[], int] = self.options.clock
        self._closed = False
        try:
            self._files = LocalFiles(path, make=not read_only) if files is None else files
            self._lock: Lock | None = None if read_only else self._files.lock(LOCK)
            try:
                self._tree = self._load()
            except BaseException:
                if self._lock is not None:
                    self._lock.close()
                raise
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{path} cannot be opened: {error}") from error
        self._tree.on_gone = on_gone
        cond = StoreLock()
        reader = Reader(
            lambda: self._tree, threads=self.options.read_threads, direct=self.options.direct
        )
        super().__init__(cond, reader)
        self._writer: Writer | None = None
        self._keeper: Keeper | None = None
        if not read_only:
            self._writer = Writer(self._tree, cond, self.options)
            self._keeper = Keeper(self._tree, cond, self._writer, self.options, policy)
            self._writer.keeper = self._keeper
            self._keeper.start()
            self._writer.start()

    def _load(self) -> Tree:
        if self.read_only and not set(manifests.NAMES) & set(self._files.list()):
            raise StorageError(f"{self._files} holds no store")
        slab = min(self.options.memtable_bytes // SLABS, self.options.file_bytes)
        pool = SlabPool(max(64 << 10, slab), SLABS)
        for _ in range(OPENINGS):
            try:
                return load(self._files, pool, self._clock(), writable=not self.read_only)
            except FileNotFoundError as error:
                missing = error
        raise StorageError(f"{self._files} changes faster than it can be opened: {missing}")

    # -- writing -----------------------------------------------------------------------------------

    def put(
        self, key: bytes, value: Tensors, *, metadata: Mapping[str, Any] | None = None,
        parent: bytes = b"", ttl: float | None = None,
    ) -> None:  # fmt: skip
        """Put a value, in place of what is there; see `Put` for what the arguments are.

        Raises:
            ConfigError: the value or the key is none.
            StorageError: the disk refuses, or there was no room in time. Nothing has changed then,
                as far as this process can tell; what was half written may be found after a crash.
        """
        self.put_many([Put(key, value, metadata, parent, ttl)])

    def add(
        self, key: bytes, value: Tensors, *, metadata: Mapping[str, Any] | None = None,
        parent: bytes = b"", ttl: float | None = None,
    ) -> bool:  # fmt: skip
        """`put`, only if there is no value; whether it was put."""
        return self.add_many([Put(key, value, metadata, parent, ttl)])[0]

    def replace(
        self, key: bytes, value: Tensors, *, metadata: Mapping[str, Any] | None = None,
        parent: bytes = b"", ttl: float | None = None,
    ) -> bool:  # fmt: skip
        """`put`, only if there is a value; whether it was put."""
        return self.replace_many([Put(key, value, metadata, parent, ttl)])[0]

    def delete(self, key: bytes) -> bool:
        """Delete a value; whether there was one. Raises `StorageError` as `put` does."""
        return self.delete_many([key])[0]

    def put_many(self, puts: Puts) -> None:
        """`put` of each, written together. If one is refused, those before it may have been put."""
        self._put(self._each(puts), None)

    def add_many(self, puts: Puts) -> list[bool]:
        """`add` of each."""
        return self._put(self._each(puts), False)

    def replace_many(self, puts: Puts) -> list[bool]:
        """`replace` of each."""
        return self._put(self._each(puts), True)

    def delete_many(self, keys: Iterable[bytes]) -> list[bool]:
        """`delete` of each."""
        return self._put(map(coming_delete, keys), True)

    def put_stored(self, coming: Iterable[Coming]) -> None:
        """Put values as they are stored elsewhere (see `archive`)."""
        self._put(coming, None)

    def batch(self) -> WriteBatch:
        """Puts and deletions that happen together, or not at all, after a crash as well."""
        writer = self._writing()
        return WriteBatch(
            partial(self._coming, own=True), lambda coming: writer.put(coming, atomic=True)
        )

    def _coming(self, put: Put, *, own: bool = False) -> Coming:
        if put.ttl is not None and not 0 < put.ttl <= MOST_TTL:
            raise ConfigError(f"ttl is above 0, {MOST_TTL:g} s at most, not {put.ttl:g}")
        expires = 0 if put.ttl is None else self._clock() + max(1, int(put.ttl * 1000))
        return coming_value(
            put.key, put.value, self._codec, metadata=put.metadata, parent=put.parent,
            expires=expires, own=own,
        )  # fmt: skip

    def _each(self, puts: Puts) -> Iterator[Coming]:
        """Each made ready. One that is made only now, by a generator, may be of a tensor that is
        filled anew for the next: its bytes are copied.
        """
        if isinstance(puts, Mapping):
            puts = [Put(key, value) for key, value in puts.items()]
        return map(partial(self._coming, own=not isinstance(puts, Sequence)), puts)

    def _put(self, coming: Iterable[Coming], present: bool | None) -> list[bool]:
        """Put entries, some at a time; while those are written the next are made ready."""
        writer = self._writing()
        begun: list[Begun] = []
        some: list[Coming] = []
        size, most, ahead = 0, self._together(), writer.ahead
        try:
            for one in coming:
                if some and size + one.entry.room > most:
                    begun.append(writer.begin(some, present=present, ahead=ahead))
                    if not ahead:
                        writer.finish(begun[-1])
                    some, size = [], 0
                some.append(one)
                size += one.entry.room
            if some:
                begun.append(writer.begin(some, present=present))
        except BaseException:
            for one_begun in begun:
                writer.finish(one_begun)
            raise
        return [put for one_begun in begun for put in writer.finish(one_begun)]

    def _together(self) -> int:
        most = min(self.options.memtable_bytes, self.options.file_bytes) // 2
        return min(most, WRITE_FROM) if self._writing().ahead else most

    def _writing(self) -> Writer:
        self._check_open()
        if self._writer is None:
            raise UsageError(f"{self._files} is open for reading only")
        return self._writer

    def _keeping(self) -> Keeper:
        self._writing()
        assert self._keeper is not None
        return self._keeper

    # -- reading, see Lookup -----------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the store is closed")

    def _find(self, key: bytes) -> Found | None:
        return self._tree.find(key, self._clock)

    def _touch(self, found: Found) -> None:
        self._tree.touch(found, self._clock())

    def _scan(self, prefix: bytes) -> Iterator[tuple[bytes, Found]]:
        with self._cond:
            self._check_open()
            view = View(self._tree, self._clock())
        return view.scan(prefix)

    def _damaged(self, found: Found, *, drop: bool) -> None:
        with self._cond:
            self._reader.counts.damaged += 1
            if drop and self._tree.find(found.entry.key) == found:
                self._tree.give_up(found)

    def __len__(self) -> int:
        """Values, those that have expired and were not looked at since included."""
        with self._cond:
            self._check_open()
            return self._tree.live_values

    @property
    def live_bytes(self) -> int:
        """Bytes that values take up on disk."""
        with self._cond:
            return self._tree.live_bytes

    def touch_many(self, keys: Iterable[bytes]) -> list[bool]:
        """Whether there is a value of each key; those that are there count as asked for."""
        with self._cond:
            self._check_open()
            found = [self._find(key) for key in keys]
            for one in found:
                if one is not None:
                    self._touch(one)
        return [one is not None for one in found]

    def snapshot(self) -> Snapshot:
        """The store as it is now, to be read while writes go on. Files it needs stay, and count
        against `max_bytes`, until it is closed.
        """
        with self._cond:
            self._check_open()
            return Snapshot(self._cond, self._reader, View(self._tree, self._clock()))

    def refresh(self) -> None:
        """See what another process has written since (`read_only`; else there is nothing to do).

        Raises:
            IntegrityError: the manifest is damaged in both copies.
            StorageError: the files cannot be read.
        """
        if not self.read_only:
            return
        with self._cond:
            self._check_open()
            for _ in range(OPENINGS):
                try:
                    newer = follow(self._tree, self._clock())
                    newer.on_gone = self._tree.on_gone
                    self._tree = newer
                    return
                except FileNotFoundError as error:
                    missing = error
                except OSError as error:
                    raise StorageError(f"{self._files} cannot be read: {error}") from error
        raise StorageError(f"{self._files} changes faster than it can be read: {missing}")

    # -- care --------------------------------------------------------------------------------------

    def flush(self) -> None:
        """All that was put survives a loss of power when this returns. Raises `StorageError`."""
        self._keeping().flush()

    def compact(self) -> int:
        """See `Keeper.compact`."""
        return self._keeping().compact()

    def stats(self) -> StoreStats:
        """The store in figures."""
        with self._cond:
            self._check_open()
            return collect(self._tree, self._reader.counts, self._writer, self._keeper)

    def files(self) -> list[FileInfo]:
        """Its files, by name."""
        with self._cond:
            self._check_open()
            return files_of(self._tree)

    def verify(self) -> list[Damage]:
        """Read every byte of every file, and say what is wrong; what is not written yet is not
        looked at, nor what compaction removes meanwhile.
        """
        with self._cond:
            self._check_open()
            segments = list(self._tree.segments)
            logs = [(log.number, log.written_end()) for log in self._tree.logs()]
        found = list(verify_manifests(self._files))
        for number in segments:
            damage = list(verify_segment(self._files, number))
            with self._cond:
                found += damage if number in self._tree.segments else []
        for number, end in logs:
            found += verify_log(self._files, number, end)
        return found

    def check_integrity(self) -> None:
        """Check the books; raises `IntegrityError`, naming the first thing that is off."""
        with self._cond:
            self._check_open()
            self._tree.check_integrity()

    def close(self) -> None:
        """Seal all that was put, and let the lock go. What was viewed stays valid. In a forked
        process nothing happens, and nothing else may be called.

        Raises:
            StorageError: the disk refuses; the store is closed all the same, and what was put is as
                safe as its durability says.
        """
        if self._cond.forked:  # nothing of it is this process's
            return
        with self._cond:
            if self._closed:
                return
            self._closed = True
        try:
            if self._keeper is not None:
                self._keeper.close()
        finally:
            self._reader.close()
            with self._cond:
                self._tree.close()
            if self._lock is not None:
                self._lock.close()

    def __enter__(self) -> "TensorStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()
