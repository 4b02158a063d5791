"""Loops of one's own share prefixes: what a batch begins with, and what it leaves."""

import itertools
from typing import Any

import pytest
import torch

from kvpaged import PagedKVCache
from kvpaged.errors import OutOfPagesError, UsageError
from tests.dense import DIM, KV_HEADS, LAYERS, Q_HEADS, dense, geometry

PAGE = 16


def make(pages: int = 64, namespace: bytes = b"weights") -> PagedKVCache:
    shape = geometry(PAGE)
    return PagedKVCache(shape, shape.page_bytes * pages, namespace=namespace)


def kv(tokens: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that depend on a token and all before it, as a model's do."""
    rows, state = [], layer + 1
    for token in tokens:
        state = (state * 6364136223846793005 + token + 1442695040888963407) % 2**63
        rows.append(torch.randn(2 * KV_HEADS, DIM, generator=torch.Generator().manual_seed(state)))
    both = torch.stack(rows) if rows else torch.empty(0, 2 * KV_HEADS, DIM)
    return both[:, :KV_HEADS], both[:, KV_HEADS:]


def compute(cache: PagedKVCache, batch: Any, rows: list[list[int]]) -> None:
    """All layers over what waits; each row's output is that of dense attention over all of it."""
    bounds = batch.cu_seqlens.tolist()
    torch.manual_seed(bounds[-1])
    for layer in range(LAYERS):
        parts = [kv(row, layer) for row in rows]
        new = [b - a for a, b in itertools.pairwise(bounds)]
        k = torch.cat([p[0][len(p[0]) - n :] for p, n in zip(parts, new, strict=True)])
        v = torch.cat([p[1][len(p[1]) - n :] for p, n in zip(parts, new, strict=True)])
        q = torch.randn(len(k), Q_HEADS, DIM)
        out = cache.attend(layer, q, k, v, batch)
        for (keys, values), (a, b) in zip(parts, itertools.pairwise(bounds), strict=True):
            expected = dense(q[a:b], keys, values, None)
            torch.testing.assert_close(out[a:b].double(), expected, rtol=0, atol=2e-5)


def serve(cache: PagedKVCache, rows: list[list[int]], **options: Any) -> list[int]:
    """A batch of these rows, computed and closed; returns what each began with."""
    batch = cache.batch(rows, **options)
    compute(cache, batch, rows)
    reused: list[int] = batch.reused.tolist()
    cache.check_integrity()
    batch.close()
    cache.check_integrity()
    return reused


def test_rows_begin_with_what_is_there_each_by_itself():
    cache = make()
    a, b = list(range(50)), list(range(100, 140))
    assert serve(cache, [a, b]) == [0, 0]
    batch = cache.batch([a, b, [*b[:20], 7, 7], [9], []])
    assert batch.reused.tolist() == [48, 32, 20, 0, 0]
    assert batch.tokens.tolist() == [48, 49, *b[32:], 7, 7, 9]
    assert batch.positions.tolist() == [48, 49, *range(32, 40), 20, 21, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 10, 12, 13, 13]
    compute(cache, batch, [a, b, [*b[:20], 7, 7], [9], []])
    batch.close()
    assert cache.stats().used == 0
    assert (cache.stats().reuse.asked, cache.stats().reuse.reused) == (203, 100)


def test_what_is_generated_is_there_too():
    cache = make()
    row = list(range(30))
    batch = cache.batch([row])
    compute(cache, batch, [row])
    for token in range(40):
        row = [*row, 200 + token]
        batch.extend([row[-1]])
        compute(cache, batch, [row])
    batch.close()
    assert serve(cache, [[*row, 1, 2, 3]]) == [64]
    assert serve(cache, [row[:50]]) == [49]


def test_forks_publish_what_each_computes():
    cache = make()
    rows = [list(range(20))]
    batch = cache.batch(rows)
    compute(cache, batch, rows)
    assert batch.branch(0, 2) == [1, 2]
    rows = [[*rows[0], *[10 * n + i for i in range(15)]] for n in range(3)]
    batch.extend([row[20:] for row in rows])
    compute(cache, batch, rows)
    batch.close()
    assert serve(cache, [[*row, 5] for row in rows]) == [32, 32, 32]
    with pytest.raises(UsageError, match="at least 1 more, got 0"):
        cache.batch([[1]]).branch(0, 0)


def test_a_draft_that_is_rejected_leaves_nothing_wrong():
    """Speculative decoding: tokens are computed ahead, and those that do not hold are rewound."""
    cache = make()
    row = list(range(30))
    batch = cache.batch([row])
    compute(cache, batch, [row])
    for turn in range(12):
        draft = [*row, *[300 + turn + i for i in range(5)]]
        batch.extend([draft[len(row) :]])
        compute(cache, batch, [draft])
        row = draft[: len(row) + turn % 4 + 1]
        batch.rewind(0, to=len(row))
        cache.check_integrity()
        batch.extend([[7]])
        row = [*row, 7]
        compute(cache, batch, [row])
    batch.close()
    assert serve(cache, [[*row, 1]]) == [len(row) // PAGE * PAGE]


def test_without_a_namespace_nothing_is_shared():
    cache = make(namespace=b"")
    for _ in range(2):
        assert serve(cache, [list(range(40))]) == [0]
    assert cache.stats().cached == 0


def test_a_new_namespace_finds_nothing_of_the_old():
    cache = make()
    row = list(range(40))
    serve(cache, [row])
    open_batch = cache.batch([row])
    cache.refresh(b"other weights")
    assert serve(cache, [row]) == [0]
    compute(cache, open_batch, [row])
    open_batch.extend([list(range(40, 60))])
    compute(cache, open_batch, [list(range(60))])
    open_batch.close()
    assert serve(cache, [list(range(60))]) == [32], "nothing of the batch that began before"
    cache.refresh(b"weights")
    assert serve(cache, [list(range(60))]) == [32]
    with pytest.raises(UsageError, match="refreshed with a new namespace"):
        cache.refresh()


def test_salts_for_each_row():
    cache = make()
    row = list(range(40))
    assert serve(cache, [row, row, row], salt=["a", "b", None]) == [0, 0, 0]
    assert serve(cache, [row, row, row, row], salt=["a", None, "c", "b"]) == [32, 32, 0, 32]
    assert serve(cache, [row, row], salt=["d", "e"], salt_from=[20, 0]) == [16, 0]
    wrong: list[dict[str, Any]] = [
        {"salt": ["a"]}, {"salt": [1, 2]}, {"salt_from": -1}, {"salt_from": [1]},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(UsageError, match="salt"):
            cache.batch([row, row], **options)


def test_a_full_pool_gives_up_what_nobody_uses():
    cache = make(pages=8)
    for start in range(0, 1000, 100):
        assert serve(cache, [list(range(start, start + 70))]) == [0]
    assert cache.stats().pages_evicted > 20
    held = cache.batch([list(range(900, 970))])
    assert held.reused.tolist() == [64]
    with pytest.raises(OutOfPagesError, match="4 more pages are needed and 3 of 8"):
        cache.batch([list(range(5000, 5060))])
    compute(cache, held, [list(range(900, 970))])
    held.close()
    cache.clear()
    assert cache.stats().cached == 0


def test_a_search_that_fails_for_lack_of_pages_leaves_what_it_found():
    cache = make(pages=6)
    row = list(range(64))
    serve(cache, [row])
    with pytest.raises(OutOfPagesError):
        cache.batch([[*row, *range(500, 600)]])
    cache.check_integrity()
    assert cache.stats().used == 0
    assert serve(cache, [row]) == [63]
