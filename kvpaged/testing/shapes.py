"""Small caches to drive: what they are made of, and what their pages hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpaged.cache import PagedKVCache
from kvpaged.config import Backend, Layout
from kvpaged.formats.kv import KVFormat
from kvpaged.geometry import LayerGroup, PageGeometry
from kvpaged.offload.options import OffloadOptions
from kvpaged.pages.allocator import FREE, PageAllocator
from kvpaged.pages.extents import Ids
from kvpaged.pages.mixed import AnyClass, MixedClass
from kvpaged.pages.table import BlockTable
from kvpaged.testing.dense import DIM, LAYERS, NAMESPACES, PAGE
from kvpaged.tiers.base import Tier
from kvpaged_kernels.reference.seal import unseal
from kvpaged_kernels.sealed import Part

ROUNDING = 1e-6
"""Receipts are of fp32 sums, and so is what they are compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A cache to drive.

    Attributes:
        layout: of its pages.
        windows: of its groups; one alone has both layers, two have one each.
        memory: bytes of the pool; a layer's part of an exact page takes 1 KiB.
        kv_format: of full pages.
        backend: what computes.
    """

    layout: Layout
    windows: tuple[int | None, ...]
    memory: int
    kv_format: KVFormat | str = "auto"
    backend: Backend = "cpu"

    def make(
        self, tiers: Sequence[Tier] = (), offload: OffloadOptions | None = None
    ) -> PagedKVCache:
        """The cache."""
        each = LAYERS // len(self.windows)
        geometry = PageGeometry(
            layers=each, kv_heads=1, head_dim=DIM, page_size=PAGE, dtype=torch.float32
        )
        groups = [
            LayerGroup(geometry=geometry, layers=tuple(range(n * each, (n + 1) * each)), window=w)
            for n, w in enumerate(self.windows)
        ]
        return PagedKVCache(
            groups, self.memory, namespace=NAMESPACES[0], layout=self.layout, backend=self.backend,
            kv_format=self.kv_format, tiers=tiers, offload=offload,
        )  # fmt: skip


LAYOUTS: tuple[Layout, ...] = ("page-major", "layer-major")
WINDOWS: dict[str, tuple[int | None, ...]] = {
    "full": (None,), "full and window": (None, 24), "windows": (24, 40)
}  # fmt: skip
SHAPES = {
    f"{name}, {layout}": Shape(layout=layout, windows=WINDOWS[name], memory=memory << 10)
    for layout in LAYOUTS
    for name, memory in (("full", 72), ("full and window", 72), ("windows", 56))
}

FORMATS = {
    "int4": KVFormat(name="int4", k="int4", v="int4").with_queries(
        {n: torch.stack((torch.linspace(-3, 3, DIM), torch.ones(DIM)))[None] for n in range(LAYERS)}
    ),
    "int8": KVFormat(name="int8", k="int8", v="int8"),
    "k8v4": KVFormat(name="k8v4", k="int8", v="int4", keep=0),
    "fp8": KVFormat(name="fp8", k="fp8", v="fp8", keep=2),
    "by layer": KVFormat(name="by layer", k="int4", v="fp8", layers={0: ("exact", "exact")}),
}
"""Of each way to code, and pages that stay exact."""


def _compressed() -> Iterator[tuple[str, Shape]]:
    large, small = 40 << 10, 24 << 10
    each: tuple[tuple[str, str, int, Backend, int], ...] = (
        ("int4", "full", 0, "reference", small), ("int4", "full and window", 1, "cpu", small),
        ("int8", "full", 1, "cpu", large), ("int8", "windows", 0, "cpu", small),
        ("k8v4", "full and window", 0, "cpu", small), ("k8v4", "full", 1, "cpu", small),
        ("fp8", "full", 0, "cpu", large), ("fp8", "windows", 1, "reference", small),
        ("by layer", "full", 0, "cpu", large), ("by layer", "full and window", 1, "cpu", large),
    )  # fmt: skip
    for form, windows, layout, backend, memory in each:
        yield f"{form}, {windows}, {LAYOUTS[layout]}, {backend}", Shape(
            layout=LAYOUTS[layout], windows=WINDOWS[windows], memory=memory,
            kv_format=FORMATS[form], backend=backend,
        )  # fmt: skip


COMPRESSED = dict(_compressed())
"""Caches whose full pages are compressed."""


class Numbers:
    """What the pages of a group hold, `[pages, slots, columns]`, and how near that has to be to
    what was computed.
    """

    def __init__(self, found: np.ndarray, slack: np.ndarray | None) -> None:
        """`slack`: `[pages, columns]`, negative where pages are exact; `None`: all are."""
        self._found, self._slack = found.reshape(-1, found.shape[2]), slack

    def agree(self, slots: np.ndarray, expected: np.ndarray) -> bool:
        """Whether slots (`page * PAGE + slot`) hold these numbers: exact ones bit by bit, others
        within the receipts of their pages.
        """
        found = self._found[slots]
        same: np.ndarray = found.view(np.uint32) == expected.view(np.uint32)
        if self._slack is not None:
            same |= np.abs(found - expected) <= self._slack[slots // PAGE]
        return bool(same.all())


class GroupPages:
    """Reads the pages of a group, compressed ones unsealed.

    Attributes:
        keep: logical pages that stay exact; `None`: all.
        first_sealed: ids from there on are compressed pages.
    """

    def __init__(self, pages: AnyClass, *, receipts: bool = True) -> None:
        """`receipts`: compressed pages were all made here, so that each has its receipts."""
        self._pages, self._receipts = pages, receipts
        self._sealed = pages.sealed if isinstance(pages, MixedClass) else None
        exact = pages.exact if isinstance(pages, MixedClass) else pages
        self.keep = pages.keep if isinstance(pages, MixedClass) else None
        self.first_sealed = exact.allocator.capacity
        self._entries = exact.entries(np.arange(self.first_sealed, dtype=np.int32))
        self._views = [
            both.numpy()[:, 0]
            for layer in exact.layers
            for both in (layer.k_pages, layer.v_pages)
            if both is not None
        ]

    def allocators(self) -> tuple[PageAllocator, ...]:
        """Of its classes, each by itself."""
        both = self._pages.allocator
        return (both,) if isinstance(both, PageAllocator) else (both.exact, both.sealed)

    def read(self) -> Numbers:
        """All of them; compressed ones that nobody has hold anything."""
        exact = np.concatenate([view[self._entries] for view in self._views], axis=2)
        if self._sealed is None:
            return Numbers(exact, None)
        found = np.zeros((self._pages.allocator.capacity, *exact.shape[1:]), np.float32)
        found[: self.first_sealed] = exact
        slack = np.full((len(found), exact.shape[2]), -1, np.float32)
        ids = self.first_sealed + np.flatnonzero(self._sealed.allocator.states != FREE)
        for place in range(self._sealed.geometry.layers):
            columns = slice(place * 2 * DIM, (place + 1) * 2 * DIM)
            both, errors = self.layer(place, ids.astype(np.int32))
            found[ids, :, columns] = np.concatenate(both, axis=2)
            slack[ids, columns] = errors.repeat(DIM, axis=1)
        return Numbers(found, slack)

    def layer(self, place: int, ids: Ids) -> tuple[list[np.ndarray], np.ndarray]:
        """Of one layer of compressed pages: K and V, `[n, PAGE, DIM]`, and how far they may be from
        what was computed, `[n, 2]`.
        """
        assert self._sealed is not None
        numbers = ids - self.first_sealed
        layout = self._sealed.geometry.layouts[place]
        both = unseal(self._sealed.slices[place][self._sealed.entry_tensor(numbers)], layout)
        errors = self._sealed.errors[torch.from_numpy(numbers).long(), place].numpy()
        known = self._sealed.geometry.queries
        moved = bool(known and known[place])
        most = np.array([[_worst(layout.k, moved=moved), _worst(layout.v)]], np.float32)
        if not self._receipts:
            errors = np.where(np.isnan(errors), most, errors)
        return [x[:, 0].numpy() for x in both], np.minimum(errors, most) + np.float32(ROUNDING)

    def entries(self, pages: Ids, shown: dict[int, int]) -> Ids:
        """Block-table entries of a row's pages, where the device sees others in some places."""
        ids = pages.copy()
        for place, page in shown.items():
            ids[place] = page
        return self._pages.entries(ids)


def on_device(table: BlockTable, row: int) -> np.ndarray:
    """A row of the device's table, with the changes that are still to be sent."""
    entries = table.entries.cpu().numpy().copy()
    for places, values in zip(table._places, table._values, strict=True):
        entries.reshape(-1)[places] = values
    found: np.ndarray = entries[row]
    return found


def _worst(part: Part, *, moved: bool = False) -> float:
    """The largest error that numbers between -1 and 1 may come back with; `moved`: by up to two
    steps more, for queries that are known.
    """
    if part.form == "exact":
        return 0.0
    nearest = 0.04 if part.form == "fp8" else {8: 0.012, 4: 0.11}[part.bits]
    return nearest + 0.3 * moved
