"""Memory in large system pages: who holds it, where it begins, and where there is none."""

import mmap
import random
import resource
import weakref

import pytest
import torch

from kvpaged.errors import ConfigError, OutOfPagesError
from kvpaged.geometry import PageGeometry
from kvpaged.pages.pool import LARGE_FROM, PagePool, wants_large_pages
from kvpaged_kernels.cpu.large_pages import CHUNK, LARGE, LINE, LargePages


def test_copies_are_equal_apart_and_begin_on_lines():
    pages = LargePages()
    given = [
        torch.randn(n).to(dtype) for n in (1, 7, 1000) for dtype in (torch.bfloat16, torch.float32)
    ]
    copies = [pages.copy(x) for x in given]
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    assert all(x.data_ptr() % LINE == 0 for x in copies)
    assert len({x.untyped_storage().data_ptr() for x in copies}) == 1
    copies[1].fill_(5)
    assert torch.equal(copies[0], given[0])
    assert torch.equal(copies[2], given[2])


def test_a_chunk_begins_at_a_large_page_and_what_is_larger_has_its_own():
    pages = LargePages()
    small = pages.copy(torch.zeros(3))
    large = pages.copy(torch.zeros(CHUNK + 5, dtype=torch.uint8))
    assert small.data_ptr() % LARGE == large.data_ptr() % LARGE == 0
    assert large.untyped_storage().data_ptr() != small.untyped_storage().data_ptr()


def test_memory_lives_as_long_as_a_tensor_of_it(monkeypatch):
    made = []

    class Noted(mmap.mmap):
        pass

    def note(*given, **more):
        system = Noted(*given, **more)
        made.append(weakref.ref(system))
        return system

    monkeypatch.setattr(mmap, "mmap", note)
    pages = LargePages()
    first, second = pages.copy(torch.ones(3)), pages.copy(torch.ones(5))
    del pages, first
    assert made[0]() is not None
    assert second.tolist() == [1.0] * 5
    del second
    assert made[0]() is None


def test_without_large_pages_or_address_space_there_is_ordinary_memory(monkeypatch):
    def none(*given, **more):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", none)
    pages = LargePages()
    for n in (3, 100):
        copy = pages.copy(torch.arange(n))
        assert torch.equal(copy, torch.arange(n))
        assert copy.data_ptr() % LINE == 0


def test_only_one_class_of_long_runs_wants_large_pages():
    assert wants_large_pages(LARGE_FROM, 1)
    assert not wants_large_pages(LARGE_FROM - 1, 1)
    assert not wants_large_pages(1 << 40, 2)


def test_a_pool_without_address_space_says_how_much_it_wanted():
    geometry = PageGeometry(
        layers=1, kv_heads=1, head_dim=64, page_size=16, dtype=torch.float32, layout="layer-major"
    )
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        have = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (have + (64 << 20), hard))
    try:
        with pytest.raises(ConfigError, match=r"256.0 MiB of address space"):
            PagePool([geometry], memory=256 << 20, device=torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_classes_that_take_turns_commit_no_more_than_the_budget():
    classes = [
        PageGeometry(
            layers=layers, kv_heads=1, head_dim=64, page_size=64, dtype=torch.float32,
            layout="layer-major",
        )
        for layers in (2, 1)
    ]  # fmt: skip
    pool = PagePool(classes, memory=128 << 20, device=torch.device("cpu"))
    before, turn = resident(), random.Random(0)
    open_ = list(pool.classes)
    while open_:
        one = turn.choice(open_)
        try:
            pages = one.allocator.alloc(8)
        except OutOfPagesError:
            open_.remove(one)
            continue
        for layer in one.layers:
            assert layer.v_pages is not None
            for x in (layer.k_pages, layer.v_pages):
                x[torch.from_numpy(pages).long()] = 1
    assert pool.used_bytes() > 0.9 * pool.memory
    assert resident() - before < 1.1 * pool.memory
