"""What a cache reports of itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpaged.geometry import LayerGroup
from kvpaged.offload.report import OffloadStats
from kvpaged.pages.allocator import OPEN, SEALED
from kvpaged.pages.mixed import AnyClass, MixedClass
from kvpaged.pages.pool import SealedClass


@dataclass(slots=True)
class Counters:
    """Running totals of a cache; read through `CacheStats`."""

    sealed: int = 0
    asked: int = 0
    reused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseStats:
    """How much of what was asked for was there.

    Attributes:
        asked: tokens of the sequences that sessions and batches began with.
        reused: how many of them were found in the cache and not computed again.
    """

    asked: int = 0
    reused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats:
    """One layer group.

    Attributes:
        layers: how many layers share its pages.
        window: tokens a query sees, or `None`.
        page_bytes: bytes of the budget a page takes, an exact one.
        pages: exact pages the whole budget would be.
        open_pages: pages that take new tokens.
        sealed_pages: full, immutable pages in use.
        cached_pages: full pages nobody uses, kept until memory is needed.
        tokens: token slots filled, shared ones once for each row that holds them.
        compressed: of full pages that are coded; `None`: none are.
    """

    layers: int
    window: int | None
    page_bytes: int
    pages: int
    open_pages: int
    sealed_pages: int
    cached_pages: int
    tokens: int
    compressed: "CompressedStats | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedStats:
    """The compressed pages of a layer group.

    Attributes:
        format: its name.
        page_bytes: bytes of the budget that one takes.
        bits: of one for each element of K and V, scales, zero points and padding in it.
        pages: compressed pages the whole budget would be.
        used: pages in use.
        cached: pages nobody uses.
        error_k, error_v: the largest absolute error of K and V among those that were coded here.
    """

    format: str
    page_bytes: int
    bits: float
    pages: int
    used: int
    cached: int
    error_k: float
    error_v: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """A cache at one moment.

    Attributes:
        memory: bytes of the budget.
        used: bytes of pages in use.
        cached: bytes of pages nobody uses, kept until memory is needed.
        batches: sessions and batches alive.
        pages_sealed: pages sealed since the cache was made.
        pages_evicted: cached pages given up since then.
        reuse: over all sessions and batches since then.
        groups: one for each layer group.
        offload: of its tiers; `None`: it has none.
    """

    memory: int
    used: int
    cached: int
    batches: int
    pages_sealed: int
    pages_evicted: int
    reuse: ReuseStats
    groups: tuple[GroupStats, ...]
    offload: OffloadStats | None = None


def compressed_stats(name: str, pages: SealedClass) -> CompressedStats:
    """Of the compressed pages of a group, in the format of that name."""
    allocator, geometry = pages.allocator, pages.geometry
    there = np.flatnonzero(allocator.states >= SEALED)
    errors = pages.errors[torch.from_numpy(there).to(pages.errors.device)]
    most = errors.nan_to_num(0.0).amax((0, 1)).tolist() if len(there) else (0.0, 0.0)
    return CompressedStats(
        format=name, page_bytes=geometry.page_bytes, bits=geometry.bits_per_element(),
        pages=allocator.capacity, used=allocator.used_pages(), cached=allocator.cached_pages(),
        error_k=most[0], error_v=most[1],
    )  # fmt: skip


def group_stats(
    group: LayerGroup, pages: AnyClass, kv_format: str, tokens: Sequence[int]
) -> GroupStats:
    """Of a layer group; `kv_format`: what its format is called, `tokens`: what each batch holds."""
    allocator = pages.allocator
    compressed, exact = None, allocator
    if isinstance(pages, MixedClass):
        exact = pages.exact.allocator
        compressed = compressed_stats(kv_format, pages.sealed)
    return GroupStats(
        layers=len(group.layers),
        window=group.window,
        page_bytes=group.geometry.page_bytes,
        pages=exact.capacity,
        open_pages=int((allocator.states == OPEN).sum()),
        sealed_pages=int((allocator.states == SEALED).sum()),
        cached_pages=allocator.cached_pages(),
        tokens=sum(tokens),
        compressed=compressed,
    )
