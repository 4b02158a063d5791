"""Small caches over tiers, and sequences whose every byte follows from their token ids."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpaged import PagedKVCache
from kvpaged.config import Layout
from kvpaged.errors import IntegrityError
from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.report import OffloadStats
from kvpaged.pages.allocator import FREE
from kvpaged.testing.dense import DIM, LAYERS, NAMESPACES, PAGE, Origin, Row, attention
from kvpaged.testing.shapes import WINDOWS, Shape
from kvpaged.tiers.base import Demotion, Tier
from kvpaged.tiers.disk import DiskTier
from kvpaged.tiers.host import HostTier
from kvpaged.token_batch import TokenBatch

PAGE_BYTES = LAYERS * 2 * DIM * 4 * PAGE
QUICK = OffloadOptions(
    staging_bytes=256 << 10, call_bytes=4 * PAGE_BYTES, deadline_s=5.0, write_deadline_s=5.0,
    close_s=5.0, linger_s=0.001,
)  # fmt: skip


def cache_of(
    tiers: Sequence[Tier], *, pages: int = 12, groups: str = "full",
    layout: Layout = "layer-major", options: OffloadOptions = QUICK,
) -> PagedKVCache:  # fmt: skip
    """A cache of 2 layers of one head of 8 numbers, and pages of 16 tokens."""
    shape = Shape(layout=layout, windows=WINDOWS[groups], memory=pages * PAGE_BYTES)
    return shape.make(tiers, options)


def host(pages: int = 256, policy: Demotion = "write-back") -> HostTier:
    """With room for so many records of `PAGE_BYTES`, heads included."""
    return HostTier(pages * (PAGE_BYTES + 256), policy=policy, pin=False)


def disk(path: Path, policy: Demotion = "write-through", size: str = "16MiB") -> DiskTier:
    return DiskTier(path, size, policy=policy)


def words(seed: int, count: int) -> list[int]:
    """Token ids that differ from the first page on between seeds."""
    found: list[int] = np.random.default_rng(seed).integers(0, 2**31, count).tolist()
    return found


def bytes_of(cache: PagedKVCache, batch: TokenBatch, row: int) -> list[tuple[int, np.ndarray]]:
    """Of each layer, the first place a row holds and K and V from there on, `[tokens, 2 DIM]`."""
    found = []
    for layer in range(LAYERS):
        group, place = cache.place_of(layer)
        page_class = cache.classes[group]
        ids = batch.page_map(group)[row]
        first = int(batch._groups[group].table.first[row]) * PAGE
        views = page_class.layers[place]
        assert views.v_pages is not None
        both = [
            pages.numpy()[page_class.entries(ids)][:, 0].reshape(-1, DIM)
            for pages in (views.k_pages, views.v_pages)
        ]
        found.append((first, np.concatenate(both, 1)))
    return found


def check(cache: PagedKVCache) -> OffloadStats:
    """The books, the bytes, and where pages have gone."""
    cache.check_integrity()
    stats = cache.stats().offload
    assert stats is not None
    stats.check()
    return stats


def settled(cache: PagedKVCache) -> None:
    """All that is to go down has gone."""
    assert cache.flush(10)
    check(cache)


def run(
    cache: PagedKVCache, ids: Sequence[int], *, more: int = 0, salt: bytes | None = None,
    keep: bool = False, namespace: bytes = NAMESPACES[0],
) -> Any:  # fmt: skip
    """Begin a sequence, compute what was not found, compare bytes and attention; tokens reused, and
    the batch if it is kept open.
    """
    batch = cache.batch([list(ids)], salt=salt)
    reused = int(batch.reused[0])
    row = row_of(ids[:reused], salt, namespace)
    compute(cache, batch, row, list(ids)[reused:], namespace)
    for token in range(more):
        batch.extend([[token]])
        compute(cache, batch, row, [token], namespace)
    if keep:
        return reused, batch
    batch.close()
    check(cache)
    return reused


def compute(
    cache: PagedKVCache, batch: TokenBatch, row: Row, ids: list[int], namespace: bytes
) -> None:
    """A step of one row, compared."""
    new = row.next(ids, namespace)
    states = torch.from_numpy(new[1]).view(-1, LAYERS, 2, 1, DIM)
    before = len(row.tokens)
    row.add(ids, new)
    for layer in range(LAYERS):
        k, v = states[:, layer, 0], states[:, layer, 1]
        out = cache.attend(layer, k, k, v, batch, scale=1.0)[:, 0].numpy()
        part = row.dense[:, layer * 2 * DIM : (layer + 1) * 2 * DIM]
        window = cache.groups[cache.place_of(layer)[0]].window
        expected = attention(part[:, :DIM], part[:, DIM:], part[before:, :DIM], window)
        assert np.abs(out - expected).max(initial=0) < 1e-5, "attention is over other bytes"
    batch.commit_computed()
    compare(cache, batch, row)


def compare(cache: PagedKVCache, batch: TokenBatch, row: Row) -> None:
    """Raise `IntegrityError` unless a batch's row holds its tokens' bytes."""
    for layer, (first, found) in enumerate(bytes_of(cache, batch, 0)):
        expected = row.dense[first:, layer * 2 * DIM : (layer + 1) * 2 * DIM]
        if not np.array_equal(found[: len(expected)], expected):
            raise IntegrityError("a row holds other bytes than its tokens'")


def row_of(ids: Sequence[int], salt: bytes | None = None, namespace: bytes = NAMESPACES[0]) -> Row:
    """What a sequence must hold."""
    row = Row(Origin(namespace, salt, 0))
    row.add(list(ids), row.next(list(ids), namespace))
    return row


def scramble(cache: PagedKVCache) -> None:
    """Free pages have other bytes than those they had: what is not copied into them shows. Pages
    that nobody has held are zeros, and those of other groups' frames are none of a class's.
    """
    with cache.lock:
        for page_class in cache.classes:
            allocator = page_class.exact.allocator
            free = np.array(
                [
                    page
                    for page in np.flatnonzero(allocator.states == FREE).tolist()
                    if page // allocator.pages_per_frame in allocator._used
                    and page not in allocator._leases
                    and allocator.generations[page]
                ],
                np.int32,
            )
            for layer in page_class.layers:
                for pages in (layer.k_pages, layer.v_pages):
                    if pages is not None:
                        pages[page_class.entries(free).tolist()] = torch.nan


def until(condition: Callable[[], object], what: str = "it did not come to that") -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.002)
