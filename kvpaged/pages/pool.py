"""The pool: one budget of bytes on one device, holding pages of one or more classes."""

import functools
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch

from kvpaged.config import format_bytes
from kvpaged.errors import ConfigError
from kvpaged.geometry import UNIT_BYTES, Kind, PageGeometry, View
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


class PagePool:
    """One byte budget on one device, cut into frames, dealt out to classes of pages.

    Page-major classes share one allocation. Layer-major ones have storage of their own, as large as
    the budget but committed by the system only where it was touched; a frame that changes its class
    is handed back to the system there, so the bytes in use stay within the budget either way.

    Not thread-safe: the cache's lock is held around every call that takes or gives back pages.
    """

    def __init__(
        self,
        geometries: Sequence[PageGeometry],
        *,
        memory: int,
        device: torch.device,
        checksums: bool = True,
    ) -> None:
        """
        Args:
            geometries: one for each class; all of the same layout.
            memory: bytes; never exceeded by pages in use.
            device: where the pages live.
            checksums: keep a checksum a layer of every sealed page (8 bytes each, outside the
                budget).

        Raises:
            ConfigError: the budget is more than the device has free, or less than a page of every
                class; mixed layouts.
        """
        layouts = {geometry.layout for geometry in geometries}
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
        self.classes = tuple(
            self._make_class(geometry, per_frame, shared, checksums)
            for geometry, per_frame in zip(geometries, self.plan.pages_per_frame, strict=True)
        )

    def _make_class(
        self, geometry: PageGeometry, per_frame: int, shared: torch.Tensor | None, checksums: bool
    ) -> PageClass:
        size = geometry.page_bytes * per_frame * self.plan.frames
        runs = 2 * geometry.layers * geometry.kv_heads  # of a layer's head, each in one piece
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
        self, system: mmap.mmap, geometry: PageGeometry, per_frame: int, frame: int
    ) -> None:
        """Hand the touched memory of a layer-major frame back to the system (whole system pages
        only).
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        pages = per_frame * self.plan.frames
        for kind in ("k", "v") if geometry.v_width else ("k",):
            row = geometry.page_size * geometry.width(kind) * geometry.itemsize
            for layer in range(geometry.layers):
                view = geometry.view(layer, kind, pages=pages, storage_bytes=len(system))
                for head in range(geometry.kv_heads):
                    first = (
                        view.offset + head * view.stride[1]
                    ) * geometry.itemsize + frame * per_frame * row
                    start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
                    end = (first + per_frame * row) // mmap.PAGESIZE * mmap.PAGESIZE
                    if end > start:
                        system.madvise(mmap.MADV_DONTNEED, start, end - start)

    def used_bytes(self) -> int:
        """Bytes of pages in use (referenced or leased) over all classes."""
        return sum(c.bytes_of(c.allocator.used_pages()) for c in self.classes)

    def cached_bytes(self) -> int:
        """Bytes of pages that nobody holds and that are kept for reuse."""
        return sum(c.bytes_of(c.allocator.cached_pages()) for c in self.classes)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if an allocator's books do not add up."""
        for page_class in self.classes:
            page_class.allocator.check_integrity()
