"""The pool, as whoever moves its pages sees it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvpaged.config import Backend
from kvpaged.offload.copies import Copies
from kvpaged.offload.cpu_copies import CpuCopies
from kvpaged.offload.cuda_copies import CudaCopies
from kvpaged.pages.pool import PageClass
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
    classes: tuple[PageClass, ...]
    copies: tuple[Copies, ...]
    immediate: tuple[bool, ...]
    blocks: tuple[tuple[tuple[int, slice], ...], ...]

    def body_bytes(self, group: int) -> int:
        """Bytes of the record of a group's page, its head apart."""
        return body_bytes(self.classes[group].geometry)


def copies_of(page_class: PageClass, backend: Backend) -> Copies:
    """Copies for the pages of a class, by its device."""
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
    lock: threading.RLock, index: PrefixIndex, classes: Sequence[PageClass],
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
