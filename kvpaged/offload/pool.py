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


@dataclass(frozen=True, slots=True)
class PoolView:
    """Pages, who holds them, and how they are copied: one of each for each layer group.

    Attributes:
        lock: guards allocators and the index.
        index: which tokens pages hold.
        classes: pages.
        copies: how they are copied.
        immediate: copies of a class are made within the call that begins them.
        order: the layers of a model in its order: group, and place among the group's.
    """

    lock: threading.RLock
    index: PrefixIndex
    classes: tuple[PageClass, ...]
    copies: tuple[Copies, ...]
    immediate: tuple[bool, ...]
    order: tuple[tuple[int, int], ...]

    def body_bytes(self, group: int) -> int:
        """Bytes of the record of a group's page, its head apart."""
        return body_bytes(self.classes[group].geometry)


def copies_of(page_class: PageClass, backend: Backend) -> Copies:
    """Copies for the pages of a class, by its device."""
    device = page_class.flat.device
    if device.type == "cuda":
        return CudaCopies(page_class, backend, device)
    return CpuCopies(page_class, backend)


def view_of(
    lock: threading.RLock, index: PrefixIndex, classes: Sequence[PageClass],
    backends: Sequence[Backend], order: Sequence[tuple[int, int]],
) -> PoolView:  # fmt: skip
    """The view of a cache's pages; `order`: see `PoolView`."""
    return PoolView(
        lock, index, tuple(classes),
        tuple(copies_of(c, b) for c, b in zip(classes, backends, strict=True)),
        tuple(c.flat.device.type == "cpu" for c in classes),
        tuple(order),
    )  # fmt: skip
