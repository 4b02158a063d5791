"""The pool: one budget of bytes on one device, holding pages of one or more classes."""

import functools
import itertools
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch

from kvpaged.config import format_bytes
from kvpaged.errors import ConfigError
from kvpaged.geometry import UNIT_BYTES, Kind, PageGeometry, SealedGeometry, View
from kvpaged.ops import LayerPages
from kvpaged.pages.allocator import PageAllocator
from kvpaged.pages.extents import Ids
from kvpaged.pages.frames import FrameBudget, FramePlan, plan_frames

EXTENT_TOKENS = 256
"""Token slots a new run reserves room for, softly: long enough for one attention part, short enough
to stay dense.
"""

LARGE_FROM = 8 << 20
"""Bytes of a run of pages from which it is of large system pages (2 MiB on most): decoding 43 rows
of 365 tokens, cold, took 0.8 of the time.
"""


def wants_large_pages(run: int, classes: int) -> bool:
    """Whether a class's storage is to be of large system pages, its runs being of `run` bytes.

    Not where several classes take turns at frames: each has room for the whole budget, of which a
    frame is a small part of every run, and large pages would commit what lies around it, too.
    """
    return classes == 1 and run >= LARGE_FROM


def available_bytes(device: torch.device) -> int | None:
    """Bytes a new pool could have on `device`, or `None` where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    return None


class PageClass:
    """Pages of one geometry in a pool: their storage, their addresses, their allocator.

    Attributes:
        geometry: the page.
        allocator: who holds which page.
        flat: the storage as one vector of the geometry's dtype; layer views are cut from it.
        checksums: int64 `[pages, layers]`, a row valid while its page is sealed; `None` when not
            kept.
    """

    def __init__(
        self,
        geometry: PageGeometry,
        allocator: PageAllocator,
        storage: torch.Tensor,
        plan: FramePlan,
        *,
        checksums: bool,
    ) -> None:
        self.geometry = geometry
        self.allocator = allocator
        self.flat = storage.view(geometry.dtype)
        self._plan = plan
        self._per_frame = allocator.pages_per_frame
        self._storage_bytes = storage.numel()
        shape = (allocator.capacity, geometry.layers)
        self.checksums = (
            torch.zeros(shape, dtype=torch.int64, device=storage.device) if checksums else None
        )
        self.layers = tuple(self._layer_pages(layer) for layer in range(geometry.layers))

    def view(self, layer: int, kind: Kind) -> View:
        """Where `layer`'s K or V lies in `flat`."""
        pages = self.allocator.capacity
        return self.geometry.view(layer, kind, pages=pages, storage_bytes=self._storage_bytes)

    @functools.cached_property
    def pieces(self) -> tuple[torch.Tensor, ...]:
        """What a page consists of, whole: `[entries, pieces, elements]`, of K and of V where they
        lie apart.
        """
        kinds: tuple[Kind, ...] = ("k", "v")
        if self.geometry.layout == "page-major" or not self.geometry.v_width:
            kinds = ("k",)
        return tuple(self._pieces_of(kind) for kind in kinds)

    def _pieces_of(self, kind: Kind) -> torch.Tensor:
        pages = self.allocator.capacity
        view = self.geometry.pieces(kind, pages=pages, storage_bytes=self._storage_bytes)
        return self.flat.as_strided(view.size, view.stride, view.offset).squeeze(1)

    def _layer_pages(self, layer: int) -> LayerPages:
        k = self.view(layer, "k")
        v = self.view(layer, "v") if self.geometry.v_width else None
        return LayerPages.of(self.flat, k, v, step=self.geometry.entries_per_page())

    @functools.cached_property
    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all layers, `[entries, layers, kv_heads, slots, width]`."""
        pages = self.allocator.capacity
        found = []
        kinds: tuple[Kind, ...] = ("k", "v")
        for kind in kinds:
            first, layers = self.view(0, kind), self.geometry.layers
            step = self.geometry.layer_elements(kind, pages=pages)
            size, stride = list(first.size), list(first.stride)
            if self.geometry.layout == "page-major":  # a whole page fits at each entry
                size[0] -= -(-(layers - 1) * step // stride[0])
            size.insert(1, layers)
            stride.insert(1, step)
            found.append(self.flat.as_strided(size, stride, first.offset))
        return found[0], found[1]

    def entries(self, ids: Ids) -> Ids:
        """Block-table entries (int32) of page ids: see `geometry`."""
        if self.geometry.layout == "layer-major":
            return ids
        frame, place = np.divmod(ids, self._per_frame)
        units = (
            frame * (self._plan.frame_bytes // UNIT_BYTES)
            + place * self.geometry.entries_per_page()
        )
        entries: Ids = units.astype(np.int32)
        return entries

    def entry_tensor(self, ids: Ids) -> torch.Tensor:
        """The same on the device, int64, for indexing."""
        return torch.from_numpy(self.entries(ids).astype(np.int64)).to(self.flat.device)

    def bytes_of(self, pages: int) -> int:
        """Bytes of the budget that `pages` pages take."""
        return pages * self.geometry.page_bytes

    def bytes_held(self, ids: Ids) -> int:
        """Bytes of the budget that these pages, each named once, take."""
        return self.bytes_of(len(ids))

    @property
    def exact(self) -> "PageClass":
        """Itself: see `MixedClass`."""
        return self

    def sequence_bytes(self, tokens: int, first: int) -> int:
        """Bytes of the budget that a sequence of so many tokens takes from its page `first` on."""
        return self.bytes_of(-(-tokens // self.geometry.page_size) - first)

    # What admission counts in: here pages.

    @property
    def unit_bytes(self) -> int:
        """Bytes of the unit that `cost`, `units` and `available_units` are in."""
        return self.geometry.page_bytes

    @property
    def open_cost(self) -> int:
        """Units of a page that takes tokens."""
        return 1

    def cost(self, pages: int) -> int:
        """Units of a sequence of so many pages."""
        return pages

    def units(self) -> int:
        """Units of the whole budget."""
        return self.allocator.capacity

    def available_units(self) -> int:
        """Units that could still be taken."""
        return self.allocator.available()

    def room_units(self) -> int:
        """Units that could be taken without evicting any page."""
        return self.allocator.room()


class SealedClass:
    """Compressed pages of one format in a pool: whole runs of bytes, whatever the pool's layout.

    Attributes:
        geometry: the page.
        allocator: who holds which page.
        flat: the storage, uint8.
        slices: of each layer, uint8 `[entries, slice_bytes]`.
        runs: of adjacent layers coded alike: which, and uint8 `[entries, layers, slice_bytes]`.
        checksums: int64 `[pages, layers]`, valid while a page is sealed.
        errors: fp32 `[pages, layers, 2]`, the largest absolute error of K and V of pages that were
            coded here; NaN of pages that came from elsewhere.
    """

    def __init__(
        self, geometry: SealedGeometry, allocator: PageAllocator, storage: torch.Tensor,
        plan: FramePlan | None,
    ) -> None:  # fmt: skip
        """`plan`: of the frames of a storage that classes share; `None`: it is this class's own."""
        self.geometry = geometry
        self.allocator = allocator
        self.flat = storage
        self._plan = plan
        entries = (storage.numel() - geometry.content_bytes) // UNIT_BYTES + 1
        offsets, layouts = geometry.offsets, geometry.layouts
        self.slices = tuple(
            storage.as_strided((entries, layout.slice_bytes), (UNIT_BYTES, 1), at)
            for at, layout in zip(offsets, layouts, strict=False)
        )
        runs = []
        for layout, group in itertools.groupby(range(len(layouts)), layouts.__getitem__):
            places = list(group)
            size = layout.slice_bytes
            view = storage.as_strided(
                (entries, len(places), size), (UNIT_BYTES, size, 1), offsets[places[0]]
            )
            runs.append((slice(places[0], places[-1] + 1), view))
        self.runs = tuple(runs)
        shape = (allocator.capacity, geometry.layers)
        self.checksums = torch.zeros(shape, dtype=torch.int64, device=storage.device)
        self.errors = torch.full((*shape, 2), torch.nan, device=storage.device)
        self._queries = _queries_of(geometry, storage.device)

    def queries(self, layers: slice) -> torch.Tensor | None:
        """What queries of adjacent layers that are coded alike are like, fp32 `[layers, kv_heads,
        2, k_width]`; `None`: it is not known.
        """
        if self._queries is None or not any(self.geometry.queries[layers]):
            return None
        return self._queries[layers]

    def entries(self, ids: Ids) -> Ids:
        """Block-table entries (int32) of this class's page ids: multiples of 256 bytes."""
        per_page = self.geometry.page_bytes // UNIT_BYTES
        if self._plan is None:
            return (ids * per_page).astype(np.int32)
        frame, place = np.divmod(ids, self.allocator.pages_per_frame)
        units = frame * (self._plan.frame_bytes // UNIT_BYTES) + place * per_page
        entries: Ids = units.astype(np.int32)
        return entries

    def entry_tensor(self, ids: Ids) -> torch.Tensor:
        """The same on the device, int64, for indexing."""
        return torch.from_numpy(self.entries(ids).astype(np.int64)).to(self.flat.device)

    def bytes_of(self, pages: int) -> int:
        """Bytes of the budget that `pages` pages take."""
        return pages * self.geometry.page_bytes


def _queries_of(geometry: SealedGeometry, device: torch.device) -> torch.Tensor | None:
    """Of all layers, 0 of those that are not known; `None`: none is."""
    if not any(geometry.queries):
        return None
    shape = geometry.exact.kv_heads, 2, geometry.exact.k_width
    made = torch.zeros(geometry.layers, *shape)
    for layer, given in zip(made, geometry.queries, strict=True):
        if given:
            layer.copy_(torch.frombuffer(bytearray(given), dtype=torch.float16).view(shape))
    return made.to(device)


class PagePool:
    """One byte budget on one device, cut into frames, dealt out to classes of pages.

    Page-major classes share one allocation. Layer-major ones have storage of their own, as large as
    the budget but committed by the system only where it was touched; a frame that changes its class
    is handed back to the system there, so the bytes in use stay within the budget either way.

    Not thread-safe: the cache's lock is held around every call that takes or gives back pages.
    """

    def __init__(
        self,
        geometries: Sequence[PageGeometry | SealedGeometry],
        *,
        memory: int,
        device: torch.device,
        checksums: bool = True,
    ) -> None:
        """
        Args:
            geometries: one for each class; exact ones all of the same layout.
            memory: bytes; never exceeded by pages in use.
            device: where the pages live.
            checksums: keep a checksum a layer of every sealed page (8 bytes each, outside the
                budget).

        Raises:
            ConfigError: the budget is more than the device has free, or less than a page of every
                class; mixed layouts.
        """
        exact = [each for each in geometries if isinstance(each, PageGeometry)]
        layouts = {geometry.layout for geometry in exact}
        if len(layouts) != 1:
            raise ConfigError(f"the classes of a pool have one layout, got {sorted(layouts)}")
        free = available_bytes(device)
        if free is not None and memory > free:
            raise ConfigError(
                f"a pool of {format_bytes(memory)} was asked for and {device} has "
                f"{format_bytes(free)} free"
            )
        self.layout = layouts.pop()
        self.device = device
        self.memory = memory
        paged = self.layout == "page-major"
        unit = UNIT_BYTES if paged else 1
        sizes = [geometry.page_bytes for geometry in geometries]
        self.plan = plan_frames(memory // unit * unit, sizes, unit=unit)
        self.frames = FrameBudget(self.plan.frames)
        self._maps: list[mmap.mmap] = []
        shared = self._storage(self.plan.frame_bytes * self.plan.frames) if paged else None
        made = [
            self._make_class(geometry, per_frame, shared, checksums)
            for geometry, per_frame in zip(geometries, self.plan.pages_per_frame, strict=True)
        ]
        self.classes = tuple(each for each in made if isinstance(each, PageClass))
        self.sealed = tuple(each for each in made if isinstance(each, SealedClass))

    def _make_class(
        self, geometry: PageGeometry | SealedGeometry, per_frame: int,
        shared: torch.Tensor | None, checksums: bool,
    ) -> PageClass | SealedClass:  # fmt: skip
        size = geometry.page_bytes * per_frame * self.plan.frames
        runs = 1  # compressed pages lie in one piece altogether, else a layer's head does
        if isinstance(geometry, PageGeometry):
            runs = 2 * geometry.layers * geometry.kv_heads
        large = wants_large_pages(size // runs, len(self.plan.pages_per_frame))
        storage = self._storage(size, large=large) if shared is None else shared
        system = self._maps[-1] if shared is None and self._maps else None
        allocator = PageAllocator(
            frames=self.frames,
            pages_per_frame=per_frame,
            extent=max(1, EXTENT_TOKENS // geometry.page_size),
            on_surrender=None
            if system is None
            else lambda frame: self._decommit(system, geometry, per_frame, frame),
        )
        if isinstance(geometry, SealedGeometry):
            return SealedClass(geometry, allocator, storage, None if system else self.plan)
        return PageClass(geometry, allocator, storage, self.plan, checksums=checksums)

    def _storage(self, size: int, *, large: bool = False) -> torch.Tensor:
        """`size` zero bytes: committed on touch on a CPU (in large system pages if so asked), at
        once elsewhere.
        """
        if self.device.type != "cpu":
            return torch.zeros(size, dtype=torch.uint8, device=self.device)
        # Private: the system takes back pages of a shared mapping only when all of it goes.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            system = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise ConfigError(
                f"the system has no {format_bytes(size)} of address space for a pool of "
                f"{format_bytes(self.memory)}: {error}"
            ) from error
        if large and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system that has none
                system.madvise(mmap.MADV_HUGEPAGE)
        self._maps.append(system)
        return torch.frombuffer(system, dtype=torch.uint8)

    def _decommit(
        self, system: mmap.mmap, geometry: PageGeometry | SealedGeometry, per_frame: int, frame: int
    ) -> None:
        """Hand the touched memory of a frame of a class with storage of its own back to the system
        (whole system pages only).
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for first, size in self._ranges(len(system), geometry, per_frame, frame):
            start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (first + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                system.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _ranges(
        self, size: int, geometry: PageGeometry | SealedGeometry, per_frame: int, frame: int
    ) -> Iterator[tuple[int, int]]:
        """Where a frame lies in a storage of `size` bytes that a class has for itself: first byte
        and bytes.
        """
        if isinstance(geometry, SealedGeometry):
            yield frame * per_frame * geometry.page_bytes, per_frame * geometry.page_bytes
            return
        pages = per_frame * self.plan.frames
        kinds: tuple[Kind, ...] = ("k", "v") if geometry.v_width else ("k",)
        for kind in kinds:
            row = geometry.page_size * geometry.width(kind) * geometry.itemsize
            for layer in range(geometry.layers):
                view = geometry.view(layer, kind, pages=pages, storage_bytes=size)
                for head in range(geometry.kv_heads):
                    first = (view.offset + head * view.stride[1]) * geometry.itemsize
                    yield first + frame * per_frame * row, per_frame * row

    def _every(self) -> tuple[PageClass | SealedClass, ...]:
        return (*self.classes, *self.sealed)

    def used_bytes(self) -> int:
        """Bytes of pages in use (referenced or leased) over all classes."""
        return sum(c.bytes_of(c.allocator.used_pages()) for c in self._every())

    def cached_bytes(self) -> int:
        """Bytes of pages that nobody holds and that are kept for reuse."""
        return sum(c.bytes_of(c.allocator.cached_pages()) for c in self._every())

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if an allocator's books do not add up."""
        for page_class in self._every():
            page_class.allocator.check_integrity()
