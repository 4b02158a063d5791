"""What a cache reports of itself."""

from dataclasses import dataclass

from kvpaged.offload.report import OffloadStats


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
        page_bytes: bytes of the budget a page takes.
        pages: pages the whole budget would be.
        open_pages: pages that take new tokens.
        sealed_pages: full, immutable pages in use.
        cached_pages: full pages nobody uses, kept until memory is needed.
        tokens: token slots filled, shared ones once for each row that holds them.
    """

    layers: int
    window: int | None
    page_bytes: int
    pages: int
    open_pages: int
    sealed_pages: int
    cached_pages: int
    tokens: int


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
