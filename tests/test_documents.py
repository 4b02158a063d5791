"""Documents as files: what one cache computed, another begins with; damage is found and named."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvpaged import DiskTier, HostTier, PagedKVCache
from kvpaged.errors import IntegrityError, StorageError, UsageError
from kvpaged.tiers.document import DocumentReader
from tests.hf.test_not_shared import reused, rope
from tests.hf.test_sharing import windowed
from tests.hf.tiny import assert_same_tokens, generate, ids, tiny
from tests.test_shared_batches import PAGE, make, serve

TOKENS = 100
FULL = TOKENS // PAGE * PAGE


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A document of 100 tokens, by a cache whose pages are page-major."""
    path = tmp_path_factory.mktemp("documents") / "document.kv"
    with opened(model, layout="page-major") as cache:
        compute(cache, model, ids(1, TOKENS))
        assert cache.export_document(path, ids(1, TOKENS)) == FULL
    assert [file.name for file in path.parent.iterdir()] == ["document.kv"]
    return path


def opened(model: Any, memory: int | str = "4MiB", **options: Any) -> PagedKVCache:
    return PagedKVCache.for_model(model, memory, page_size=PAGE, **options)


def compute(cache: PagedKVCache, model: Any, prompt: torch.Tensor, **options: Any) -> None:
    with cache.session(prompt, **options) as past, torch.no_grad():
        model(prompt[:, past.columns :], past_key_values=past)


def asked(
    cache: PagedKVCache, model: Any, document: torch.Tensor, **options: Any
) -> tuple[int, torch.Tensor]:
    """A question about a document: columns that were there; the tokens are as without it."""
    prompt = torch.cat([document, ids(1, 7, 9)], dim=1)
    with cache.session(prompt, **options) as past:
        reused = past.reused
        out = generate(model, past, prompt, max_new_tokens=12)
        cache.check_integrity()
    theirs = generate(model, DynamicCache(config=model.config), prompt, max_new_tokens=12)
    assert_same_tokens(model, out, theirs, None)
    return reused, out


@pytest.mark.parametrize("layouts", [*itertools.product(("page-major", "layer-major"), repeat=2)])
@pytest.mark.parametrize("kind", ["plain", "all", "some"])
def test_another_layout_begins_with_it(tmp_path, layouts, kind):
    model, document = tiny() if kind == "plain" else windowed(kind), ids(1, TOKENS)
    with opened(model, layout=layouts[0]) as cache:
        compute(cache, model, document)
        assert cache.export_document(tmp_path / "d", document) == FULL
    with opened(model, layout=layouts[1]) as cache:
        assert cache.import_document(tmp_path / "d") == FULL
        cache.check_integrity()
        assert cache.stats().used == 0
        assert asked(cache, model, document)[0] == FULL
        assert cache.export_document(tmp_path / "again", document) == FULL
    assert (tmp_path / "d").read_bytes() == (tmp_path / "again").read_bytes()


def test_importing_twice_and_beside_what_is_there(model, exported):
    document = ids(1, TOKENS)
    with opened(model) as cache:
        compute(cache, model, document[:, :40])
        before = cache.stats().cached
        for _ in range(2):
            assert cache.import_document(exported) == FULL
            cache.check_integrity()
            assert cache.stats().cached == before // 2 * 6
        assert asked(cache, model, document)[0] == FULL


def test_what_is_not_computed_is_counted(model, tmp_path):
    with opened(model) as cache:
        compute(cache, model, ids(1, 50))
        with pytest.raises(
            UsageError, match="of the document's 96 tokens in full pages the first 48 are computed"
        ):
            cache.export_document(tmp_path / "d", ids(1, TOKENS)[:, :50].repeat(1, 2))
        with pytest.raises(UsageError, match="the first 0 are computed"):
            cache.export_document(tmp_path / "d", ids(1, 50), salt="a")
        with pytest.raises(UsageError, match="at least a page of 16 tokens, this one 15"):
            cache.export_document(tmp_path / "d", ids(1, 50)[0, :15])
        with pytest.raises(UsageError, match="tokens are a flat sequence of ints"):
            cache.export_document(tmp_path / "d", ids(2, 50))
        with pytest.raises(StorageError, match="cannot be written"):
            cache.export_document(tmp_path / "no" / "d", ids(1, 50)[0].tolist())
        cache.check_integrity()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="the cache is closed"):
        cache.export_document(tmp_path / "d", ids(1, 50))


def test_pages_of_a_window_that_are_gone_are_named(tmp_path):
    model, prompt = windowed("some"), ids(1, 160)
    with opened(model) as cache:
        compute(cache, model, prompt)
        with cache.session(prompt) as past:
            generate(model, past, prompt, max_new_tokens=2)
        group = next(n for n, group in enumerate(cache.groups) if group.window)
        allocator = cache.classes[group].allocator
        while allocator.cached_pages():
            page = allocator.oldest_cached(1)[0]
            cache.index._evict(group, page)
            allocator.drop(page)
        with pytest.raises(UsageError, match="a window are gone, the first of page 8"):
            cache.export_document(tmp_path / "d", prompt)


def page_bytes(model: Any) -> int:
    with opened(model) as cache:
        return cache.groups[0].geometry.page_bytes


def test_a_small_pool_takes_what_it_has_room_for(model, exported):
    memory = str(4 * page_bytes(model))
    with opened(model, memory) as cache:
        assert cache.import_document(exported) == 4 * PAGE
        cache.check_integrity()
        with cache.session(ids(1, 4 * PAGE)) as past:
            assert past.reused == 4 * PAGE - 1
        with cache.session(ids(1, TOKENS)) as past:
            assert past.reused == 4 * PAGE
            assert cache.import_document(exported) == 4 * PAGE, "pages a session holds are shared"


@pytest.mark.parametrize("tiers", ["host", "disk", "both"])
def test_what_the_pool_has_no_room_for_is_in_tiers(model, exported, tmp_path, tiers):
    def levels() -> Iterator[Any]:
        if tiers != "disk":
            yield HostTier("4MiB")
        if tiers != "host":
            yield DiskTier(tmp_path, "64MiB")

    memory = 4 * page_bytes(model)
    with opened(model, memory, tiers=list(levels())) as cache:
        assert cache.import_document(exported) == FULL
        cache.check_integrity()
        assert cache.mover is not None
        stack = cache.mover.stack
        assert len(stack.directory.held[len(stack.levels) - 1]) == (2 if tiers == "host" else 6), (
            "all in one that lasts"
        )
    if tiers != "host":
        with opened(model, "4MiB", tiers=list(levels())) as cache:
            assert asked(cache, model, ids(1, TOKENS))[0] == FULL
            figures = cache.stats().offload
            assert figures is not None
            assert figures.loaded == 6


def test_pages_that_have_left_the_pool_are_exported_from_tiers(model, tmp_path):
    with opened(model, tiers=[HostTier("4MiB", policy="write-through")]) as cache:
        compute(cache, model, ids(1, TOKENS))
        cache.export_document(tmp_path / "pool", ids(1, TOKENS))
        assert cache.flush()
        cache.clear()
        assert cache.stats().cached == 0
        compute(cache, model, ids(1, 40))
        assert cache.export_document(tmp_path / "both", ids(1, TOKENS)) == FULL
        cache.check_integrity()
    assert (tmp_path / "pool").read_bytes() == (tmp_path / "both").read_bytes()


def test_salts_are_not_in_the_file(model, tmp_path):
    document = ids(1, TOKENS)
    with opened(model) as cache:
        compute(cache, model, document, salt="hush", salt_from=32)
        with pytest.raises(UsageError, match="the first 32 are computed"):
            cache.export_document(tmp_path / "d", document)
        cache.export_document(tmp_path / "d", document, "hush", salt_from=32)
        compute(cache, model, document)
        cache.export_document(tmp_path / "plain", document)
    with (
        DocumentReader(tmp_path / "d") as one,
        DocumentReader(tmp_path / "plain") as other,
    ):
        assert one.header == other.header
    assert b"hush" not in (tmp_path / "d").read_bytes()
    with opened(model, tiers=[HostTier("4MiB", policy="write-through")]) as cache:
        assert cache.import_document(tmp_path / "d", "mine", salt_from=16) == FULL
        assert cache.flush()
        cache.clear()
        assert [
            asked(cache, model, document, salt=salt, salt_from=16)[0] for salt in ("mine", None)
        ] == [FULL, 16]


def test_another_models_is_refused_by_name(model, exported, tmp_path):
    other = tiny(rope_theta=5000.0)
    with opened(other) as cache, pytest.raises(UsageError, match=r"document\.kv is of another mod"):
        cache.import_document(exported)
    with (
        PagedKVCache.for_model(model, "4MiB", page_size=32) as cache,
        pytest.raises(UsageError, match="of another model"),
    ):
        cache.import_document(exported)
    with opened(model, prefix_sharing=False) as cache:
        with pytest.raises(UsageError, match="but the cache has no namespace"):
            cache.import_document(exported)
        with pytest.raises(UsageError, match="but the cache has no namespace"):
            cache.export_document(tmp_path / "d", ids(1, 20))


def test_loops_of_ones_own(tmp_path):
    rows = [list(range(70))]
    with make() as cache:
        serve(cache, rows)
        assert cache.export_document(tmp_path / "d", rows[0]) == 64
    with make() as cache:
        assert cache.import_document(tmp_path / "d") == 64
        assert serve(cache, rows) == [64]
    with make(namespace=b"other") as cache, pytest.raises(UsageError, match="a namespace of yours"):
        cache.import_document(tmp_path / "d")
    geometry = make().groups[0].geometry
    wide = type(geometry)(
        layers=geometry.layers, kv_heads=geometry.kv_heads, head_dim=2 * geometry.head_dim,
        page_size=PAGE, dtype=geometry.dtype,
    )  # fmt: skip
    with (
        PagedKVCache(wide, "1MiB", namespace=b"weights") as cache,
        pytest.raises(UsageError, match="layer group 0 of the document is"),
    ):
        cache.import_document(tmp_path / "d")
    half = type(geometry)(
        layers=geometry.layers, kv_heads=geometry.kv_heads, head_dim=geometry.head_dim,
        page_size=2 * PAGE, dtype=geometry.dtype,
    )  # fmt: skip
    with (
        PagedKVCache(half, "1MiB", namespace=b"weights") as cache,
        pytest.raises(UsageError, match="pages of 16 tokens in 1 layer groups"),
    ):
        cache.import_document(tmp_path / "d")


def starts(reader: DocumentReader, length: int) -> Sequence[int]:
    """Every byte of the header, of a head, and some of all others."""
    header = len(reader.header.encode())
    return [*range(header + 400), *range(header + 400, length, 997), length - 1]


def test_every_damaged_byte_is_found_and_nothing_is_taken(tmp_path):
    path = tmp_path / "d"
    with make() as cache:
        serve(cache, [list(range(40))])
        cache.export_document(path, list(range(40)))
    good = path.read_bytes()
    with DocumentReader(path) as reader:
        places = starts(reader, len(good))
    with make() as cache:
        for place in places:
            wrong = bytearray(good)
            wrong[place] ^= 1 << place % 8
            path.write_bytes(wrong)
            with pytest.raises((IntegrityError, UsageError)) as found:
                cache.import_document(path)
            assert str(path) in str(found.value)
        for cut in (0, 7, 47, 60, 200, len(good) - 1):
            path.write_bytes(good[:cut])
            with pytest.raises(IntegrityError, match=r"left in the file|are missing at its end"):
                cache.import_document(path)
        path.write_bytes(good + b"\0")
        with pytest.raises(IntegrityError, match="1 bytes follow its last page"):
            cache.import_document(path)
        half = len(good) - (len(good) - reader._starts) // 2
        path.write_bytes(good[: reader._starts] + good[half:] + good[reader._starts : half])
        with pytest.raises(IntegrityError, match="page 0, layer group 0: another page is in its"):
            cache.import_document(path)
        with pytest.raises(StorageError, match="cannot be read"):
            cache.import_document(tmp_path)
        assert cache.stats().cached == cache.stats().pages_sealed == 0
        path.write_bytes(good)
        assert cache.import_document(path) == 32


def test_a_document_is_of_the_angles_it_was_computed_under(tmp_path):
    """Angles that change with the length: a short document is none of a long prompt's."""
    model = rope("longrope")  # up to 64 tokens, and beyond
    short, long = ids(1, 48), ids(1, 96)
    long[:, :48] = short
    with opened(model) as cache:
        compute(cache, model, torch.cat((short, ids(1, 5, 3)), 1))
        assert cache.export_document(tmp_path / "short", short) == 48
        compute(cache, model, long)
        assert cache.export_document(tmp_path / "long", long) == 96
    with opened(model) as cache:
        assert cache.import_document(tmp_path / "short") == 48
        assert reused(cache, model, torch.cat((short, ids(1, 7, 9)), 1)) == 48
        assert reused(cache, model, torch.cat((long, ids(1, 7, 9)), 1)) == 0
    with opened(model) as cache:
        assert cache.import_document(tmp_path / "long") == 96
        assert reused(cache, model, torch.cat((long, ids(1, 7, 9)), 1)) == 96
        assert reused(cache, model, torch.cat((short, ids(1, 7, 9)), 1)) == 0
