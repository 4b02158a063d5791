"""The pool: unlike pages in one budget, memory that goes back, checksums by hand."""

import mmap

import numpy as np
import pytest
import torch

from kvpaged.errors import ConfigError, OutOfPagesError
from kvpaged.geometry import PageGeometry
from kvpaged.pages.allocator import OPEN
from kvpaged.pages.classops import clear_pages, copy_pages, page_checksums
from kvpaged.pages.pool import PageClass, PagePool
from kvpaged_kernels.reference.checksum import checksum_numpy, root

CPU = torch.device("cpu")


def geometries(layout: str) -> list[PageGeometry]:
    """A windowed group of 5 layers and one of a single layer with heads of another width."""
    common = {"page_size": 16, "dtype": torch.float32, "layout": layout}
    return [
        PageGeometry(layers=5, kv_heads=2, head_dim=64, **common),  # type: ignore[arg-type]
        PageGeometry(layers=1, kv_heads=1, head_dim=80, v_dim=32, **common),  # type: ignore[arg-type]
    ]


def fill(page_class: PageClass, page: int, value: float) -> None:
    entry = int(page_class.entries(np.array([page], np.int32))[0])
    for layer in page_class.layers:
        layer.k_pages[entry] = value
        assert layer.v_pages is not None
        layer.v_pages[entry] = -value


def holds(page_class: PageClass, page: int, value: float) -> bool:
    entry = int(page_class.entries(np.array([page], np.int32))[0])
    return all(
        bool((layer.k_pages[entry] == value).all())
        and layer.v_pages is not None
        and bool((layer.v_pages[entry] == -value).all())
        for layer in page_class.layers
    )


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
def test_pages_of_unlike_sizes_never_overlap(layout):
    """Both classes come and go at random; every page in use keeps its own number in every slot."""
    shapes = geometries(layout)
    pool = PagePool(shapes, memory=40 * shapes[0].page_bytes, device=CPU)
    rng = np.random.default_rng(1)
    held: list[tuple[PageClass, int, float]] = []
    refused = 0
    for number in range(1, 400):
        page_class = pool.classes[int(rng.integers(2))]
        if rng.random() < 0.6:
            try:
                page = int(page_class.allocator.alloc(1)[0])
            except OutOfPagesError:
                refused += 1
                continue
            fill(page_class, page, number)
            held.append((page_class, page, number))
        elif held:
            owner, page, _ = held.pop(int(rng.integers(len(held))))
            owner.allocator.release(np.array([page], np.int32))
        assert pool.used_bytes() <= pool.memory
        pool.check_integrity()
    assert refused, "the budget was never reached: the test shows nothing"
    assert all(holds(*each) for each in held)


def test_a_frame_that_changes_its_class_goes_back_to_the_system():
    shapes = [
        PageGeometry(layers=4, kv_heads=1, head_dim=128, page_size=256, layout="layer-major"),
        PageGeometry(layers=1, kv_heads=1, head_dim=128, page_size=256, layout="layer-major"),
    ]
    pool = PagePool(shapes, memory=8 * shapes[0].page_bytes, device=CPU)
    large, small = pool.classes
    pages = large.allocator.alloc(large.allocator.available())
    for page in pages.tolist():
        fill(large, page, 1.0)
    large.allocator.release(pages)
    taken = small.allocator.alloc(small.allocator.available())
    assert len(taken) == small.allocator.capacity
    if hasattr(mmap, "MADV_DONTNEED"):
        assert holds(large, int(pages[0]), 0.0), "its memory was given up, and reads as zeros"


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_copies_clears_and_sums_of_whole_pages(layout, backend):
    shapes = geometries(layout)
    pool = PagePool(shapes, memory=20 * shapes[0].page_bytes, device=CPU)
    for page_class in pool.classes:
        a, b, c = (int(page) for page in page_class.allocator.alloc(3))
        for page in (a, b, c):
            fill(page_class, page, page + 1)
        for layer in page_class.layers:
            layer.k_pages[page_class.entries(np.array([a], np.int32))[0]] += torch.rand(16, 1)
        ids = [np.array([page], np.int32) for page in (a, b, c)]
        before = page_checksums(page_class, ids[0], backend=backend)
        copy_pages(page_class, ids[0], ids[1], backend=backend)
        assert torch.equal(page_checksums(page_class, ids[1], backend=backend), before)
        assert not torch.equal(page_checksums(page_class, ids[2], backend=backend), before)
        clear_pages(page_class, ids[1])
        assert holds(page_class, b, 0.0)
        assert not page_checksums(page_class, ids[1], backend=backend).any()
        assert holds(page_class, c, c + 1), "its neighbour is untouched"
        by_hand = [
            torch.cat((layer.k_pages[e].flatten(), layer.v_pages[e].flatten()))
            for layer in page_class.layers
            if layer.v_pages is not None
            for e in page_class.entries(ids[0]).tolist()
        ]
        words = torch.stack(by_hand).view(torch.int32)[None, :, None].numpy()
        assert checksum_numpy(words, np.array([0])).tolist() == before.tolist()
        assert root(before).shape == (1,)
        assert (page_class.allocator.states[[a, b, c]] == OPEN).all()


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError, match="one layout, got"):
        PagePool(
            [*geometries("page-major"), *geometries("layer-major")], memory=1 << 20, device=CPU
        )
    with pytest.raises(ConfigError, match=r"1.0 PiB was asked|1024.0 TiB was asked"):
        PagePool(geometries("page-major"), memory=1 << 50, device=CPU)
