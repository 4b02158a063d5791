"""Pages as arithmetic: both layouts, offsets beyond 2**31, and the same words in the same order."""

from typing import Any

import pytest
import torch

from kvpaged.errors import ConfigError
from kvpaged.geometry import UNIT_BYTES, Kind, LayerGroup, PageGeometry


def geometry(**changes: Any) -> PageGeometry:
    base: dict[str, Any] = {
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 80,
        "page_size": 16,
        "dtype": torch.float16,
    }
    return PageGeometry(**(base | changes))


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
@pytest.mark.parametrize("v_dim", [None, 64, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_views_of_all_layers_cover_every_element_of_every_page_once(layout, v_dim, dtype):
    shape = geometry(layout=layout, v_dim=v_dim, dtype=dtype)
    pages = 5
    storage = torch.zeros(pages * shape.page_bytes // shape.itemsize, dtype=dtype)
    for layer in range(shape.layers):
        for kind in ("k", "v") if shape.v_width else ("k",):
            view = shape.view(layer, kind, pages=pages, storage_bytes=pages * shape.page_bytes)
            tensor = storage.as_strided(view.size, view.stride, view.offset)
            for page in range(pages):
                tensor[page * shape.entries_per_page()] += 1
    written = pages * shape.layers * shape.slice_bytes // shape.itemsize
    assert int((storage == 1).sum()) == written
    assert int((storage == 0).sum()) == storage.numel() - written, "only padding is left"


def test_a_page_major_page_is_padded_to_whole_units():
    shape = geometry(layers=1, kv_heads=1, head_dim=8, v_dim=0)
    assert shape.slice_bytes == 256
    assert geometry(layers=1, kv_heads=1, head_dim=24, v_dim=0).page_bytes == 3 * UNIT_BYTES
    assert geometry(layers=1, kv_heads=1, head_dim=8, v_dim=16).page_bytes % UNIT_BYTES == 0


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
def test_offsets_beyond_two_to_the_31_address_the_last_page(layout):
    shape = PageGeometry(
        layers=80, kv_heads=8, head_dim=128, page_size=64, dtype=torch.bfloat16, layout=layout
    )
    pages = 70 * 2**30 // shape.page_bytes
    size = pages * shape.page_bytes
    storage = torch.empty(size // shape.itemsize, dtype=shape.dtype, device="meta")
    view = shape.view(79, "v", pages=pages, storage_bytes=size)
    tensor = storage.as_strided(view.size, view.stride, view.offset)
    last = (pages - 1) * shape.entries_per_page()
    offset = tensor[last, 7, 63].storage_offset()
    assert offset > 2**34
    assert offset + 128 == size // shape.itemsize, "the last row of the last page ends the pool"
    assert last < 2**31, "and its entry fits an int32"


def test_words_are_in_one_order_whatever_the_layout():
    values = torch.randn(3, 2, 16, 80).to(torch.float16), torch.randn(3, 2, 16, 64).half()
    seen = []
    for layout in ("page-major", "layer-major"):
        shape = geometry(layout=layout, v_dim=64)
        pages, size = 4, 4 * shape.page_bytes
        storage = torch.zeros(size // 2, dtype=torch.float16)
        entry = 2 * shape.entries_per_page()
        words = []
        kinds: tuple[Kind, Kind] = ("k", "v")
        for kind, value in zip(kinds, values, strict=True):
            for layer in range(3):
                view = shape.view(layer, kind, pages=pages, storage_bytes=size)
                storage.as_strided(view.size, view.stride, view.offset)[entry] = value[layer]
            view = shape.words(kind, pages=pages, storage_bytes=size)
            page = storage.view(torch.int32).as_strided(view.size, view.stride, view.offset)[entry]
            words.append(page.flatten(1))
            assert words[-1].shape[1] == (shape.v_first_word if kind == "k" else 2 * 16 * 64 // 2)
        seen.append(torch.cat(words, dim=1))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0][:, : 2 * 16 * 40], values[0].flatten(1).view(torch.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_size": 48}, "page_size must be 16, 32, 64, 128 or 256 token slots, got 48"),
        ({"page_size": 512}, "page_size must be"),
        ({"head_dim": 100}, "head_dim must be a multiple of 8 up to 256, got 100"),
        ({"head_dim": 264}, "head_dim"),
        ({"v_dim": 12}, "v_dim must be a multiple of 8 up to 256, got 12"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"kv_heads": 0}, "kv_heads must be at least 1"),
        ({"dtype": torch.float64}, "got torch.float64"),
        ({"layout": "row-major"}, "layout must be"),
    ],
)
def test_impossible_pages_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        geometry(**changes)


def test_groups_say_what_does_not_fit():
    with pytest.raises(ConfigError, match="geometry has 3 layers, the group names 2"):
        LayerGroup(geometry=geometry(), layers=(0, 1))
    with pytest.raises(ConfigError, match="distinct and ascending"):
        LayerGroup(geometry=geometry(), layers=(0, 2, 1))
    with pytest.raises(ConfigError, match="at least 1 token, got 0"):
        LayerGroup(geometry=geometry(), layers=(0, 1, 2), window=0)
