import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged_kernels.gpu.append import append as append_gpu
from kvpaged_kernels.gpu.append import append_launch
from kvpaged_kernels.reference.append import append as append_reference
from tests.ops.paging import LAYOUTS, make_pool

APPENDS = [
    pytest.param(append_reference, id="reference"),
    pytest.param(append_gpu, id="gpu"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes themselves, so that NaNs are compared too."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def random_bits(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit patterns, NaNs with payloads and denormals included."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("append", APPENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "page_size", "k_dim", "v_dim"),
    [(3, 16, 64, 64), (1, 32, 256, 256), (2, 16, 192, 128), (16, 16, 80, 96)],
)
def test_bytes_land_in_their_slots_and_nowhere_else(
    append, layout, dtype, kv_heads, page_size, k_dim, v_dim
):
    pool = make_pool(
        layout, 5, kv_heads=kv_heads, page_size=page_size, k_dim=k_dim, v_dim=v_dim, dtype=dtype
    )
    tokens = 23
    # Heads outermost in memory and only part of a wider tensor: as a model's projection gives it.
    k = random_bits(kv_heads, tokens, k_dim + 8, dtype=dtype, seed=1).transpose(0, 1)[..., 8:]
    v = random_bits(tokens, kv_heads, v_dim, dtype=dtype, seed=2)
    places = torch.randperm(5 * page_size, generator=torch.Generator().manual_seed(3))[:tokens]
    entry, slot = pool.entries[places // page_size], places % page_size
    expected = bits(pool.memory).clone()
    view = bits(pool.k_pages), bits(pool.v_pages)
    for pages, new in zip(view, (bits(k), bits(v)), strict=True):
        target = expected.as_strided(pages.shape, pages.stride(), pages.storage_offset())
        for token in range(tokens):
            target[entry[token], :, slot[token]] = new[token]

    append(k, v, pool.k_pages, pool.v_pages, entry * page_size + slot)

    assert torch.equal(bits(pool.memory), expected)


@pytest.mark.parametrize("append", APPENDS)
def test_a_group_without_v(append):
    pool = make_pool(
        "page-major", 3, kv_heads=1, page_size=16, k_dim=64, v_dim=64, dtype=torch.float16
    )
    k = torch.randn(2, 1, 64).to(torch.float16)
    slots = pool.entries[[2, 0]] * 16 + torch.tensor([15, 0])
    append(k, None, pool.k_pages, None, slots)
    assert torch.equal(pool.k_pages[pool.entries[2], 0, 15], k[0, 0])
    assert torch.equal(pool.k_pages[pool.entries[0], 0, 0], k[1, 0])
    assert pool.v_pages[pool.entries].isnan().all()


@pytest.mark.parametrize("append", APPENDS)
def test_no_tokens(append):
    pool = make_pool(
        "layer-major", 2, kv_heads=2, page_size=16, k_dim=64, v_dim=64, dtype=torch.float32
    )
    empty = torch.empty(0, 2, 64)
    append(empty, empty, pool.k_pages, pool.v_pages, torch.empty(0, dtype=torch.int64))
    assert pool.memory.isnan().all()


@settings(max_examples=15, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    kv_heads=st.integers(1, 5),
    page_size=st.sampled_from([16, 64]),
    k_dim=st.integers(1, 32).map(lambda n: 8 * n),
    v_dim=st.integers(1, 32).map(lambda n: 8 * n),
    tokens=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_gpu_equals_reference(layout, kv_heads, page_size, k_dim, v_dim, tokens, seed):
    pools = [
        make_pool(
            layout,
            2,
            kv_heads=kv_heads,
            page_size=page_size,
            k_dim=k_dim,
            v_dim=v_dim,
            dtype=torch.bfloat16,
        )
        for _ in range(2)
    ]
    k = random_bits(tokens, kv_heads, k_dim, dtype=torch.bfloat16, seed=seed)
    v = random_bits(tokens, kv_heads, v_dim, dtype=torch.bfloat16, seed=seed + 1)
    places = torch.randperm(2 * page_size, generator=torch.Generator().manual_seed(seed))[:tokens]
    slots = pools[0].entries[places // page_size] * page_size + places % page_size
    append_reference(k, v, pools[0].k_pages, pools[0].v_pages, slots)
    append_gpu(k, v, pools[1].k_pages, pools[1].v_pages, slots)
    assert torch.equal(bits(pools[0].memory), bits(pools[1].memory))


def test_strides_beyond_int32_reach_the_kernel_whole():
    pages = torch.empty_strided(
        (4, 2, 16, 128), (2**33 + 128, 2**32 + 128, 128, 1), dtype=torch.bfloat16, device="meta"
    )
    k = torch.empty(7, 2, 128, dtype=torch.bfloat16, device="meta")
    slots = torch.empty(7, dtype=torch.int64, device="meta")
    launch = append_launch(k, k, pages, pages, slots)
    assert launch.grid == (7, 1)
    assert launch.arguments["stride_kp_entry"] == 2**33 + 128
    assert launch.arguments["stride_vp_head"] == 2**32 + 128


@pytest.mark.parametrize("append", APPENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": torch.zeros(3, dtype=torch.int32)}, "slots must be one of torch.int64"),
        ({"slots": torch.zeros(2, dtype=torch.int64)}, "to fit its pages"),
        ({"v": None}, "both be None"),
        ({"k": torch.zeros(3, 2, 64, dtype=torch.float16)}, "one dtype"),
        ({"k": torch.zeros(3, 64, 2).transpose(1, 2)}, "last stride 1"),
        ({"k_pages": torch.zeros(2, 2, 24, 64)}, "power of two"),
        ({"k_pages": torch.zeros(2, 2, 16, 60)}, "multiple of 8"),
        ({"v_pages": torch.zeros(2, 3, 16, 64)}, "agree in kv_heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(append, change, message):
    arguments = {
        "k": torch.zeros(3, 2, 64),
        "v": torch.zeros(3, 2, 64),
        "k_pages": torch.zeros(2, 2, 16, 64),
        "v_pages": torch.zeros(2, 2, 16, 64),
        "slots": torch.arange(3),
    }
    with pytest.raises(ValueError, match=message):
        append(**{**arguments, **change})


@pytest.mark.parametrize("append", APPENDS)
def test_what_has_no_slot_goes_nowhere(append):
    pool = make_pool(
        "layer-major", 3, kv_heads=2, page_size=16, k_dim=64, v_dim=64, dtype=torch.bfloat16
    )
    before = bits(pool.memory).clone()
    k, v = (random_bits(4, 2, 64, dtype=pool.k_pages.dtype, seed=seed) for seed in (1, 2))
    append(k, v, pool.k_pages, pool.v_pages, torch.full((4,), -1))
    assert torch.equal(bits(pool.memory), before)
    append(k, v, pool.k_pages, pool.v_pages, torch.tensor([-1, 5, -1, -1]))
    assert torch.equal(bits(pool.k_pages[0, :, 5]), bits(k[1]))
    assert torch.equal(bits(pool.v_pages[0, :, 5]), bits(v[1]))
    assert int((bits(pool.memory) != before).sum()) <= 2 * 2 * 64
