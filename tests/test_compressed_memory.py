"""How much compressed pages hold, counted whole: by arithmetic, by a cache's own count, and by
prompts that no exact pool of the size would take. And what is refused, by name.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvpaged import Generator, LayerGroup, PagedKVCache, PageGeometry
from kvpaged.errors import ConfigError, OutOfPagesError, UsageError
from kvpaged.formats.kv import NAMED, KVFormat
from kvpaged.pages.mixed import MixedClass
from kvpaged.slot_batch import SlotBatch
from tests.hf.tiny import tiny

BF16 = {torch.bfloat16}


def geometry(
    head_dim: int = 64, page_size: int = 64, layers: int = 30, heads: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> PageGeometry:  # fmt: skip
    """As SmolLM2-135M's."""
    return PageGeometry(
        layers=layers, kv_heads=heads, head_dim=head_dim, page_size=page_size, dtype=dtype
    )


def group(of: PageGeometry) -> LayerGroup:
    return LayerGroup(geometry=of, layers=tuple(range(of.layers)))


@pytest.mark.parametrize("page_size", [32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_page_of_int4_is_of_four_and_a_half_bits(head_dim, page_size):
    sealed = KVFormat.of("int4", BF16).sealed(group(geometry(head_dim, page_size)))
    assert sealed is not None
    assert sealed.bits_per_element() <= 4.5
    for name, most in (("fp8", 8.3), ("int8", 8.6), ("k8v4", 6.5)):
        other = KVFormat.of(name, BF16).sealed(group(geometry(head_dim, page_size)))
        assert other is not None
        assert sealed.page_bytes < other.page_bytes
        assert other.bits_per_element() <= most


@pytest.mark.parametrize(("code", "bits"), [("int4g16", 5.0), ("int4", 4.5), ("int4g64", 4.25)])
def test_groups_of_int4_decide_its_bits(code, bits):
    sealed = KVFormat(k=code, v=code).sealed(group(geometry(64, 64)))
    assert sealed is not None
    assert sealed.bits_per_element() == bits


@pytest.mark.parametrize(("tokens", "least"), [(8000, 3.3), (1500, 2.8)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_that_a_sequence_holds_by_arithmetic(head_dim, tokens, least):
    """The page that takes tokens, and the first one, are exact."""
    exact = geometry(head_dim)
    kv_format = KVFormat.of("int4", BF16)
    sealed = kv_format.sealed(group(exact))
    assert sealed is not None
    pages = -(-tokens // exact.page_size)
    held = 2 * exact.page_bytes + (pages - 2) * sealed.page_bytes
    assert pages * exact.page_bytes / held >= least


def write(cache: PagedKVCache, batch: Any, seed: int) -> None:
    """Random keys and values of a step, the same for all layers."""
    step = batch.step
    shape = (2, step.total, cache.groups[0].geometry.kv_heads, cache.groups[0].geometry.head_dim)
    k, v = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for layer in cache.layers:
        batch.write(layer, k, v)
        step.attended.add(layer)
    batch.commit_computed()


def test_all_that_sequences_hold_by_a_caches_own_count():
    """A sequence of 8,000 tokens, then four of 1,500, of SmolLM2's geometry, against bf16 pages."""
    exact = geometry()
    with PagedKVCache(exact, "80MiB", kv_format="int4") as cache:
        for lengths, least in (([8000], 3.3), ([1500] * 4, 2.8)):
            batch = cache.batch([range(1, n + 1) for n in lengths])
            write(cache, batch, len(lengths))
            pages = sum(-(-n // exact.page_size) for n in lengths)
            of = cache.classes[0]
            assert isinstance(of, MixedClass)
            planned = sum(
                2 * exact.page_bytes
                + (-(-n // exact.page_size) - 2 + (n % exact.page_size == 0))
                * of.sealed.geometry.page_bytes
                - (n % exact.page_size == 0) * exact.page_bytes
                for n in lengths
            )
            assert batch.memory_bytes() == cache.stats().used == planned
            assert pages * exact.page_bytes / cache.stats().used >= least
            cache.check_integrity()
            batch.close()
            assert cache.stats().used == 0
        with pytest.raises(OutOfPagesError):
            cache.batch([range(20_000)])


def test_a_prompt_three_times_as_long_as_the_pool_holds_exactly():
    """In one forward pass of a session, and by the generator, with the same tokens."""
    model = tiny(max_position_embeddings=4096)
    page = geometry(16, 32, 2, 2, torch.float32).page_bytes
    pages, prompt = 24, torch.randint(2, 128, (1, 3 * 24 * 32), generator=_seeded())
    with (
        PagedKVCache.for_model(model, pages * page, page_size=32) as exact,
        exact.session(prompt) as past, pytest.raises(OutOfPagesError), torch.no_grad(),
    ):  # fmt: skip
        model(prompt, past_key_values=past)
    with PagedKVCache.for_model(model, pages * page, page_size=32, kv_format="int4") as cache:
        with cache.session(prompt, private=True) as past, torch.no_grad():
            logits = model(prompt, past_key_values=past).logits
            assert past.batch.lengths.tolist() == [prompt.shape[1]]
            assert past.memory_bytes() == cache.stats().used <= pages * page
            cache.check_integrity()
        with Generator(model, cache, chunk=256) as generator:
            done = generator.generate([prompt[0].tolist()], max_new_tokens=5)
        assert done[0].error is None
        assert done[0].tokens[0] == int(logits[0, -1].argmax())


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv_format", "message"),
    [
        ("int5", "kv_format is one of auto, bf16, fp16, fp32, fp8, int8, k8v4, int4"),
        (
            "fp16",
            r"kv_format 'fp16' is for models of torch\.float16, this one's pages are of torch",
        ),
        (KVFormat, "kv_format is one of"),
    ],
)
def test_formats_that_are_not(kv_format, message):
    with pytest.raises(ConfigError, match=message):
        PagedKVCache(geometry(), "64MiB", kv_format=kv_format)


def test_formats_made_wrong():
    with pytest.raises(ConfigError, match=r"are coded as exact, fp8, int8, int4, .* got 'fp8'"):
        KVFormat(k="fp8", v="int3")
    with pytest.raises(ConfigError, match="0 or more pages exact, got -1"):
        KVFormat(k="fp8", v="fp8", keep=-1)
    with pytest.raises(ConfigError, match="not a KVFormat in JSON"):
        KVFormat.from_json('{"kvpaged_kv_format": 1}')
    assert set(NAMED) == {"fp8", "int8", "k8v4", "int4"}


@pytest.mark.parametrize(("page_size", "head_dim"), [(48, 64), (80, 64), (64, 18)])
def test_pages_that_no_format_can_code_are_no_pages(page_size, head_dim):
    with pytest.raises(ConfigError, match=f"got {head_dim if head_dim % 8 else page_size}"):
        PagedKVCache(geometry(head_dim, page_size, 1, 1), "8MiB", kv_format="int4")


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 96, 256])
@pytest.mark.parametrize("page_size", [16, 32, 256])
def test_pages_of_every_size_and_width_can_be_coded(page_size, head_dim, name):
    of = geometry(head_dim, page_size, 2, 1)
    sealed = KVFormat.of(name, BF16).sealed(group(of))
    assert sealed is not None
    assert sealed.content_bytes < of.page_bytes


def test_documents_hold_exact_pages(tmp_path: Path):
    small = geometry(16, 32, 1, 1)
    with PagedKVCache(small, "1MiB", kv_format="int4", namespace=b"x") as cache:
        with pytest.raises(UsageError, match=r"exact pages, .* compressed \(int4\)"):
            cache.export_document(tmp_path / "a", range(64))
        with pytest.raises(UsageError, match=r"exact pages, .* compressed \(int4\)"):
            cache.import_document(tmp_path / "a")


def test_a_rewind_into_tokens_that_are_not_known_changes_nothing():
    small = geometry(16, 32, 1, 1)
    with PagedKVCache(small, "1MiB", kv_format="int4") as cache:
        batch = SlotBatch(cache, 2)
        batch.begin(np.array([100, 40]))
        k = torch.randn(140, 1, 16, generator=_seeded()).bfloat16()
        batch.write(0, k, k)
        batch.commit()
        used, pages = cache.stats().used, [ids.tolist() for ids in batch.page_map()]
        with pytest.raises(UsageError, match="row 0 cannot rewind to 70, within a compressed page"):
            batch.rewind(0, 70)
        assert batch.lengths.tolist() == [100, 40]
        assert (cache.stats().used, [ids.tolist() for ids in batch.page_map()]) == (used, pages)
        cache.check_integrity()
        batch.rewind(0, 64)
        assert batch.lengths.tolist() == [64, 40]
        batch.rewind(0, 20)  # the first page stays exact
        assert batch.lengths.tolist() == [20, 40]
        cache.check_integrity()
        batch.close()
