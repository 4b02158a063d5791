"""The pool, as whoever moves its pages sees it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvpaged.config import Backend
from kvpaged.geometry import PageGeometry, SealedGeometry
from kvpaged.offload.copies import Copies, MixedCopies
from kvpaged.offload.cpu_copies import CpuCopies
from kvpaged.offload.cuda_copies import CudaCopies
from kvpaged.pages.mixed import AnyClass, MixedClass
from kvpaged.pages.pool import SealedClass
from kvpaged.pages.prefix import PrefixIndex
from kvpaged.tiers.record import body_bytes

TOGETHER = 6
"""Layers that land together on a CPU, where a call costs as much as copying some pages' layer."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """Pages, who holds them, and how they are copied: one of each for each layer group.

    Attributes:
        lock: guards allocators and the index.
        index: which tokens pages hold.
        classes: pages.
        copies: how they are copied.
        immediate: copies of a class are made within the call that begins them.
        blocks: the layers of a model in its order, those that land together together: of each
            block, groups and places among their layers.
    """

    lock: threading.RLock
    index: PrefixIndex
    classes: tuple[AnyClass, ...]
    copies: tuple[Copies, ...]
    immediate: tuple[bool, ...]
    blocks: tuple[tuple[tuple[int, slice], ...], ...]

    def geometry(self, group: int, place: int) -> PageGeometry | SealedGeometry:
        """What a full page of a group is like at a place of its sequence."""
        pages = self.classes[group]
        if isinstance(pages, MixedClass) and place >= pages.keep:
            return pages.sealed.geometry
        return pages.geometry

    def body_bytes(self, group: int, place: int) -> int:
        """Bytes of the record of a group's page at a place of its sequence, its head apart."""
        return body_bytes(self.geometry(group, place))

    def most_body_bytes(self) -> int:
        """Of any page."""
        return max(body_bytes(pages.geometry) for pages in self.classes)


def copies_of(page_class: AnyClass | SealedClass, backend: Backend) -> Copies:
    """Copies for the pages of a class, by its device."""
    if isinstance(page_class, MixedClass):
        both = copies_of(page_class.exact, backend), copies_of(page_class.sealed, backend)
        return MixedCopies(page_class.allocator.first_sealed, *both)
    device = page_class.flat.device
    if device.type == "cuda":
        copies = CudaCopies(page_class, backend, device)
        copies.calibrate()
        return copies
    return CpuCopies(page_class, backend)


def blocks_of(
    order: Sequence[tuple[int, int]], together: int
) -> tuple[tuple[tuple[int, slice], ...], ...]:
    """Layers in order, `together` at a time: of each block the places of each group it has."""
    blocks = []
    for start in range(0, len(order), together):
        places: dict[int, list[int]] = {}
        for group, place in order[start : start + together]:
            places.setdefault(group, []).append(place)
        blocks.append(tuple((g, slice(min(of), max(of) + 1)) for g, of in places.items()))
    return tuple(blocks)


def view_of(
    lock: threading.RLock, index: PrefixIndex, classes: Sequence[AnyClass],
    backends: Sequence[Backend], order: Sequence[tuple[int, int]],
) -> PoolView:  # fmt: skip
    """The view of a cache's pages; `order`: a model's layers in order, each its group and its place
    among the group's.
    """
    immediate = tuple(c.flat.device.type == "cpu" for c in classes)
    return PoolView(
        lock, index, tuple(classes),
        tuple(copies_of(c, b) for c, b in zip(classes, backends, strict=True)),
        immediate, blocks_of(order, TOGETHER if all(immediate) else 1),
    )  # fmt: skip
