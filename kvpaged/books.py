"""The books of a cache: its memory, where layers live, who holds what."""

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from kvpaged.config import Backend, Layout, format_bytes
from kvpaged.errors import ConfigError, IntegrityError, OutOfPagesError, UsageError
from kvpaged.formats.kv import KVFormat
from kvpaged.geometry import LayerGroup, PageGeometry
from kvpaged.given import as_groups, config_of, one_each
from kvpaged.group_rows import GroupRows, Ints
from kvpaged.keys import Salt, encode_salt
from kvpaged.mixed_rows import MixedRows
from kvpaged.offload.mover import Mover
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.pool import PoolView, view_of
from kvpaged.offload.report import OffloadStats, report
from kvpaged.ops import LayerPages
from kvpaged.pages.allocator import SEALED
from kvpaged.pages.build import build_pools
from kvpaged.pages.coding import verify_class
from kvpaged.pages.extents import Ids
from kvpaged.pages.mixed import AnyClass, MixedClass
from kvpaged.pages.prefix import PrefixIndex
from kvpaged.pages.room import wait_for_room
from kvpaged.pages.table import BlockTable
from kvpaged.pages.trail import Trail
from kvpaged.stats import (
    CacheStats,
    Counters,
    ReuseStats,
    group_stats,
)
from kvpaged.tiers.base import Tier

T = TypeVar("T")
MAX_TENANTS = 4096
"""Salts whose figures are kept, the latest."""


class Home(NamedTuple):
    """Where a layer lives: its group, its place among the group's layers, and what serves them."""

    group: int
    place: int
    pages: AnyClass
    layers: tuple[LayerPages, ...]
    window: int | None
    backend: Backend


class Holder(Protocol):
    """Whoever holds pages: a batch."""

    def held(self, group: int) -> Ids:
        """Page ids of a group it holds, as often as it holds them."""

    def tokens_held(self, group: int) -> int:
        """Token slots of a group it has filled."""


class CacheBooks:
    """What a cache owns and must account for; batches and sessions know it as this.

    Used from any thread: `lock` guards the books (which page is whose); copies and checksums of
    pages run outside it.
    """

    def __init__(
        self,
        geometry: PageGeometry | Sequence[LayerGroup],
        memory: int | str,
        *,
        namespace: bytes = b"",
        kv_format: str | KVFormat = "auto",
        device: torch.device | str = "cpu",
        layout: Layout | None = None,
        backend: Backend | None = None,
        checksums: bool = True,
        tiers: Sequence[Tier] = (),
        offload: OffloadOptions | None = None,
    ) -> None:
        """
        Args:
            geometry: the page of a model whose layers are all alike, or its layer groups.
            memory: bytes of the page pool ("4GiB"), exact. Planned before anything is allocated.
            namespace: what makes KV bytes valid (weights, adapters, config, ...) as you identify
                it: full pages are kept and serve every sequence that begins with their tokens under
                an equal one. Empty: nothing is known of that, and nothing is shared but by forks.
            kv_format: how full pages hold K and V: "auto", as they were; "fp8", "int8", "k8v4",
                "int4": compressed as they fill (docs/formats.md); or a `KVFormat`.
            device: where pages live, for a single geometry (groups name their own).
            layout: see `CacheConfig`; `None`: what suits the device, whatever the geometry says.
            backend: see `CacheConfig`.
            checksums: see `CacheConfig`.
            tiers: where pages go when they leave the pool, and are found again, the fastest first;
                the cache closes them.
            offload: dials of that.

        Raises:
            ConfigError: an option is impossible, or memory is more than the device has or less than
                one page.
        """
        groups = as_groups(geometry, torch.device(device))
        self.config = config_of(groups, memory, layout, backend, checksums)
        self._namespace = bytes(namespace)
        self._epoch = 0
        self.groups = tuple(
            group.with_layout(self.config.layout_on(group.device.type), self.config.page_size)
            for group in groups
        )
        dtypes = {group.geometry.dtype for group in self.groups}
        self.kv_format = KVFormat.of(kv_format, dtypes)
        self._format_key = self.kv_format.key()
        self.backends = tuple(self.config.backend_on(group.device.type) for group in self.groups)
        self._places = {
            layer: (number, place)
            for number, group in enumerate(self.groups)
            for place, layer in enumerate(group.layers)
        }
        if len(self._places) != sum(len(group.layers) for group in self.groups):
            raise ConfigError("a layer belongs to one group only")
        self.layers = tuple(sorted(self._places))
        with torch.inference_mode(False):  # else pages could only be written in that mode
            self.pools, self.classes = build_pools(self.groups, self.config, self.kv_format)
        self.compressed = any(isinstance(each, MixedClass) for each in self.classes)
        """Whether full pages of some group are coded."""
        self.spare = 2 if self.compressed else 1
        """Pages that rows keep behind a window, so that they can rewind by a page's tokens; a row
        that comes to end within a compressed page ends before it.
        """
        self._homes = {
            layer: Home(
                group=number, place=place, pages=self.classes[number],
                layers=self.classes[number].layers,
                window=self.groups[number].window, backend=self.backends[number],
            )
            for layer, (number, place) in self._places.items()
        }  # fmt: skip
        self.lock = threading.RLock()
        self._returned = threading.Condition(self.lock)  # nobody says so: copies are short
        self.saving = threading.Lock()
        """Held while what is saved under a name changes; tiers are waited for under it."""
        self.index = PrefixIndex(
            [page_class.allocator for page_class in self.classes],
            [group.window for group in self.groups],
            self.config.page_size,
            keep=self.kv_format.keep if self.compressed else None,
        )
        self.counters = Counters()
        self._tenants: OrderedDict[bytes | None, Counters] = OrderedDict()
        self.closed = False
        self._garbage: deque[list[BlockTable]] = deque()
        self._batches: weakref.WeakSet[Holder] = weakref.WeakSet()
        self._view: PoolView | None = None
        self.mover: Mover | None = None
        if tiers:
            self.mover = Mover(self.page_view(), tiers, offload or OffloadOptions())

    # -- looking after itself ----------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Where the memory is now."""
        self.check_open()
        with self.lock:
            alive = list(self._batches)
            self.collect_garbage()
            groups = tuple(
                group_stats(group, pages, self.kv_format.name, [b.tokens_held(i) for b in alive])
                for i, (group, pages) in enumerate(zip(self.groups, self.classes, strict=True))
            )
            return CacheStats(
                memory=self.config.memory,
                used=sum(pool.used_bytes() for pool in self.pools),
                cached=sum(pool.cached_bytes() for pool in self.pools),
                batches=len(alive),
                pages_sealed=self.counters.sealed,
                pages_evicted=self.index.evicted,
                reuse=ReuseStats(asked=self.counters.asked, reused=self.counters.reused),
                groups=groups,
                offload=self._offload_stats(),
            )

    def _offload_stats(self) -> OffloadStats | None:
        """Of the tiers, and what became of sealed pages; the lock is held."""
        if self.mover is None:
            return None
        return report(self.mover, self.counters.sealed)

    def tenant_stats(self, salt: Salt) -> ReuseStats:
        """`stats().reuse` of the sequences of one salt (`None`: of those without), as long as they
        are among the latest 4,096 salts.
        """
        self.check_open()
        with self.lock:
            counters = self._tenants.get(encode_salt(salt), Counters())
            return ReuseStats(asked=counters.asked, reused=counters.reused)

    def check_integrity(self, *, deep: bool = True) -> None:
        """Verify the books, and with `deep` the bytes of every sealed page against its checksums.

        Call it while no other thread is in a step.

        Raises:
            IntegrityError: naming the first thing that is off.
        """
        self.check_open()
        with self.lock:
            alive = list(self._batches)  # held: none may go between the notes and the count
            self.collect_garbage()
            for pool in self.pools:
                pool.check_integrity()
            self.index.check_integrity()
            if (offload := self._offload_stats()) is not None:
                offload.check()
            for number, page_class in enumerate(self.classes):
                held = [batch.held(number) for batch in alive]
                counted = np.bincount(
                    np.concatenate(held) if held else [], minlength=page_class.allocator.capacity
                )
                wrong = np.flatnonzero(counted != page_class.allocator.refs)
                if wrong.size:
                    page = int(wrong[0])
                    raise IntegrityError(
                        f"group {number}, page {page}: {int(counted[page])} rows hold it, "
                        f"{int(page_class.allocator.refs[page])} references are counted"
                    )
                if deep:
                    full = page_class.allocator.states >= SEALED  # cached ones too
                    sealed = np.flatnonzero(full).astype(np.int32)
                    verify_class(page_class, sealed, backend=self.backends[number])

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every page that should be in a tier is there, `timeout` seconds at most
        (`None`: `OffloadOptions.close_s`); false if that was not enough. Without tiers there is
        nothing to wait for.
        """
        self.check_open()
        return True if self.mover is None else self.mover.flush(timeout)

    def note_pass(self, tokens: int, seconds: float) -> None:
        """A forward pass over so many tokens took so long."""
        if self.mover is not None:
            self.mover.note_pass(tokens, seconds)

    def close(self) -> None:
        """Let go of the memory. Batches still alive become unusable. Closing twice is nothing."""
        if self.mover is not None and not self.closed:
            self.mover.close()
        self.closed = True
        with self.lock:
            self._garbage.clear()
            self._homes = {}
            self._tenants.clear()
            self.index = PrefixIndex([], [], self.config.page_size)
            self.pools = ()
            self.classes = ()
            self._view = None

    def check_open(self) -> None:
        """Raise `UsageError` once closed."""
        if self.closed:
            raise UsageError("the cache is closed")

    # -- the prefix index --------------------------------------------------------------------------

    @property
    def namespace(self) -> bytes:
        """What makes the bytes of its pages valid; empty: nothing is kept for others."""
        return self._namespace

    @property
    def private(self) -> str | None:
        """Why nothing new is kept for others now, or `None`."""
        return None if self._namespace else "the cache has no namespace"

    def clear(self) -> None:
        """Free the pages that nobody uses and that were kept for reuse."""
        self.check_open()
        with self.lock:
            self.collect_garbage()
            self.index.clear()

    def current(self) -> tuple[object, bytes, str | None]:
        """What the namespace stands for now (equal things give equal pages), the namespace, and why
        nothing is kept for others now, or `None`.

        What it stands for is how often it has changed: one that was left and taken up again is not
        what a sequence began with, for it may have taken tokens meanwhile.
        """
        with self.lock:
            return self._epoch, self._namespace, self.private

    def is_identity(self, identity: object) -> bool:
        """Whether the namespace stands for that still."""
        return identity == self.current()[0]

    def watch(self, identity: object) -> bool:
        """The same at a glance, for each pass."""
        return True

    def trails(
        self,
        rows: int,
        salt: Salt | Sequence[Salt] = None,
        salt_from: int | Sequence[int] = 0,
        *,
        extra: bytes = b"",
    ) -> list[Trail | None]:
        """For the sequences of a new batch: where each begins in the prefix index.

        Args:
            rows: how many there are.
            salt: one for all, or one for each.
            salt_from: the token from whose page on the salt counts; one for all, or for each.
            extra: what else their pages' bytes depend on.

        Raises:
            UsageError: not as many salts as rows, or one is not a salt.
        """
        self.check_open()
        salts = [encode_salt(s) for s in one_each("salt", salt, rows, (bytes, str, type(None)))]
        starts = one_each("salt_from", salt_from, rows, (int, np.integer))
        if any(start < 0 for start in starts):
            raise UsageError(f"salt_from is a token's place, 0 or more, got {min(starts)}")
        identity, namespace, private = self.current()
        if not namespace or private is not None:
            return [None] * rows
        extra = self._format_key + extra
        with self.lock:
            root = self.index.root(namespace, extra)
        size = self.config.page_size
        return [
            Trail(root, each, start // size, identity)
            for each, start in zip(salts, starts, strict=True)
        ]

    def count_reuse(
        self, salts: Salt | Sequence[Salt], asked: Sequence[int], reused: Sequence[int]
    ) -> None:
        """Note what sequences asked for and what was found, for each salt too."""
        each = one_each("salt", salts, len(asked), (bytes, str, type(None)))
        with self.lock:
            for salt, wanted, found in zip(map(encode_salt, each), asked, reused, strict=True):
                tenant = self._tenants.setdefault(salt, Counters())
                self._tenants.move_to_end(salt)
                for counters in (self.counters, tenant):
                    counters.asked += int(wanted)
                    counters.reused += int(found)
            while len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)

    # -- for batches and sessions ------------------------------------------------------------------

    def place_of(self, layer: int) -> tuple[int, int]:
        """The group a model's layer belongs to and its place in the group's pages."""
        home = self.home_of(layer)
        return home.group, home.place

    def home_of(self, layer: int) -> "Home":
        """Where a model's layer lives."""
        self.check_open()
        try:
            return self._homes[layer]
        except KeyError:
            raise UsageError(f"layer {layer} is not cached; cached are {self.layers}") from None

    def page_view(self) -> PoolView:
        """Its pages, for whoever copies them out of the pool or into it."""
        if self._view is None:  # on a GPU copies are measured when they are made
            order = [self._places[layer] for layer in self.layers]
            self._view = view_of(self.lock, self.index, self.classes, self.backends, order)
        return self._view

    def make_rows(self, rows: int) -> list[GroupRows]:
        """For a new batch: its rows in each group, without pages."""
        made: list[GroupRows] = []
        for pages, group, backend in zip(self.classes, self.groups, self.backends, strict=True):
            facts = group.device, group.window, backend, self.spare
            if isinstance(pages, MixedClass):
                made.append(MixedRows(pages, rows, *facts))
            else:
                made.append(GroupRows(pages, rows, *facts))
        return made

    def register(self, batch: Holder) -> None:
        """Count a batch among those whose pages `check_integrity` adds up."""
        with self.lock:
            self._batches.add(batch)

    def batches_alive(self) -> int:
        """How many batches and sessions hold rows now."""
        return len(self._batches)

    def with_room(self, take: Callable[[], T]) -> T:
        """What `take` gives, which takes pages, or nothing where it raises `OutOfPagesError`. Where
        copies in flight have the pages that it lacks, they are waited for; the lock is held, and
        let go meanwhile.

        Raises:
            OutOfPagesError: there is no room.
        """
        allocators = [page_class.allocator for page_class in self.classes]
        return wait_for_room(take, self._returned, allocators, lambda: self.closed)

    def shortage(
        self, error: OutOfPagesError, mine: int, counts: Ints, lengths: Ints
    ) -> OutOfPagesError:
        """`error` in the words of a batch that holds `mine` bytes.

        Its rows have `lengths` tokens and were to get `counts` more.
        """
        others = sum(pool.used_bytes() for pool in self.pools) - mine
        return OutOfPagesError(
            f"out of pages: {int(counts.sum())} new tokens in {len(lengths)} sequences (longest "
            f"{int((lengths + counts).max(initial=0))} tokens): {error}; of the pool's "
            f"{format_bytes(self.config.memory)} this batch holds {format_bytes(mine)} and "
            f"{self.batches_alive() - 1} others hold {format_bytes(others)}",
            needed=error.needed,
            available=error.available,
        )

    def leave_garbage(self, tables: list[BlockTable]) -> None:
        """Note tables nobody uses any more. Callable from a finaliser: takes no lock, touches no
        books.
        """
        self._garbage.append(tables)

    def collect_garbage(self) -> None:
        """Give back the pages of forgotten batches; the lock is held."""
        while self._garbage:
            self.release_tables(self._garbage.popleft())

    def release_tables(self, tables: list[BlockTable]) -> None:
        """Give back all pages of some tables; the lock is held. After `close` there is nothing to
        give back to.
        """
        for table, page_class in zip(tables, self.classes, strict=False):
            page_class.allocator.release(table.all_held())

    def unregister(self, batch: Holder) -> None:
        """Forget a closed batch."""
        self._batches.discard(batch)
