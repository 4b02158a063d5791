"""Native code against the oracles in fp64: products, decode, and how it is made."""

import ctypes
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from kvpaged.integrations.linears import PackedLinears
from kvpaged.integrations.products import JoinProducts
from kvpaged_kernels.cpu import native
from kvpaged_kernels.cpu.decode import paged_decode as stock_decode
from kvpaged_kernels.cpu.native_decode import NativeDecode, NativeStep
from kvpaged_kernels.cpu.native_linear import fits_together, pack, pack_together
from kvpaged_kernels.cpu.plan import plan_decode
from kvpaged_kernels.reference.attention import paged_decode
from tests.cpu.test_cpu_attention import make_pages, make_table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Where there is a compiler, code that it refuses is a failure.
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")


def seen_in(flat, pages):
    """K and V of pages in another vector; page-major views have an entry every 256 bytes."""
    return [
        flat.as_strided(x.shape, x.stride(), x.storage_offset())
        for x in (pages.k_pages, pages.v_pages)
    ]


def decode(rng, pages, lengths, table, group, *, window, softcap, sinks):
    """The error of native code, and that of the stock path, against fp64."""
    rows, heads = len(lengths), pages.k_pages.shape[1]
    dims = pages.k_pages.shape[3], pages.v_pages.shape[3]
    dtype, scale = pages.flat.dtype, dims[0] ** -0.5
    q = torch.randn(heads * group, rows, dims[0]).to(dtype).transpose(0, 1)
    k, v = (torch.randn(rows, heads, dim).to(dtype) for dim in dims)
    sink = torch.randn(heads * group).to(dtype) if sinks else None
    lens = torch.tensor(lengths, dtype=torch.int32)
    expected_pages = pages.flat.clone()
    views: Any = seen_in(expected_pages, pages)
    for row, length in enumerate(lengths):
        entry, slot = (
            int(table[row, (length - 1) // pages.page_size]),
            (length - 1) % pages.page_size,
        )
        views[0][entry, :, slot], views[1][entry, :, slot] = k[row], v[row]
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    layer = NativeDecode(pages.k_pages, pages.v_pages, heads * group, **options)
    got = layer(NativeStep(q, k, v, table, lens), q, k, v, sink)
    assert torch.equal(pages.flat, expected_pages)  # what it wrote is exact, and nothing else
    exact_pages: Any = seen_in(expected_pages.double(), pages)
    exact = paged_decode(
        q.double(), exact_pages[0], exact_pages[1], table, lens, **options,
        sinks=None if sink is None else sink.double(),
    )  # fmt: skip
    plan = plan_decode(
        table.numpy(), np.array(lengths), page_size=pages.page_size, step=pages.step,
        joined=pages.joined, dtype=dtype, window=window,
    )  # fmt: skip
    other = stock_decode(q, views[0], views[1], plan, scale=scale, softcap=softcap, sinks=sink)
    largest = exact.abs().max()
    return [float((x.double() - exact).abs().max() / largest) for x in (got, other)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "dims", "page_size"), [(3, (64, 64), 16), (8, (128, 128), 128), (2, (40, 24), 16)]
)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_decode_is_as_exact_as_stock_torch(dtype, group, dims, page_size, data):
    def choose(*values):
        return data.draw(st.sampled_from(values))

    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    torch.manual_seed(int(rng.integers(2**31)))
    near = [1, 2, page_size - 1, page_size, page_size + 1, 3 * page_size]
    lengths = [choose(*near, int(rng.integers(1, 500))) for _ in range(choose(1, 1, 2, 5))]
    style = choose("runs", "pairs", "any")
    total = 2 * len(lengths) * -(-max(lengths) // page_size) + 2
    pages = make_pages(
        total, choose("page-major", "layer-major"), dtype, page_size=page_size,
        kv_heads=choose(1, 2, 3), dims=dims,
    )  # fmt: skip
    pages.flat[torch.isnan(pages.flat)] = 0
    table = make_table(rng, lengths, pages, total, style)
    before = torch.get_num_threads()
    torch.set_num_threads(choose(1, 2, 3))
    try:
        error, stock = decode(
            rng, pages, lengths, table, group, window=choose(None, 1, page_size, 100),
            softcap=choose(None, 5.0), sinks=choose(False, True),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    assert error <= 2 * stock + 2 * torch.finfo(dtype).eps


def test_decode_refuses_what_does_not_fit():
    pages = make_pages(4, "layer-major", torch.float32, page_size=16, kv_heads=2, dims=(8, 8))
    values = pages.v_pages
    assert values is not None
    layer = NativeDecode(pages.k_pages, values, 4, scale=1.0, window=None, softcap=None)
    table, lengths = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    step = NativeStep(q, k, k, table, lengths)
    with pytest.raises(ValueError, match="a layer of"):
        layer(step, q.bfloat16(), k, k)
    with pytest.raises(ValueError, match="a layer of"):
        layer(step, q[:, :2], k, k)
    with pytest.raises(ValueError, match="one new token of each row"):
        NativeStep(q[:2], k, k, table, lengths)
    with pytest.raises(ValueError, match="one new token of each row"):
        NativeStep(q, k, k, table.long(), lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "inner"), [(64, 64), (70, 32), (1, 6), (200, 48), (16, 2)])
def test_products_are_as_exact_as_torchs(dtype, columns, inner):
    torch.manual_seed(0)
    weight, bias = torch.randn(columns, inner).to(dtype), torch.randn(columns).to(dtype)
    layer = pack(weight, bias)
    for rows in (0, 1, 3, 6, 7, 13, 140):
        x = torch.randn(2, rows, inner + 1).to(dtype)[..., 1:]
        exact = x.double() @ weight.double().T + bias.double()
        got, other = layer(x), torch.nn.functional.linear(x, weight, bias)
        assert got.shape == other.shape
        if rows:
            errors = [(y.double() - exact).abs().max() for y in (got, other)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * exact.abs().max()
    with pytest.raises(ValueError, match="inputs"):
        layer(torch.randn(2, inner + 2).to(dtype))


def test_products_of_one_input_share_their_weights():
    layers = [(torch.randn(n, 32), torch.randn(n)) for n in (64, 128)]
    assert fits_together(layers)
    assert not fits_together([*layers, (torch.randn(63, 32), torch.randn(63))])
    first, second, both = pack_together(layers)
    x = torch.randn(5, 32)
    assert torch.equal(both(x), torch.cat([first(x), second(x)], -1))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 64) for _ in range(3))

    def forward(self, x, other):
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(other)


def test_products_are_joined_where_their_input_is_the_same():
    model = _Attention().requires_grad_(False)
    x, other = torch.randn(3, 32), torch.randn(3, 32)
    packed = PackedLinears(model, native=True)
    for second, calls in ((x, 1), (other, 3)):
        expected = model(x, second)
        run = (lambda a, b: model(a, a)) if second is x else model
        graph = make_fx(run, tracing_mode="fake")(x, second)
        JoinProducts()(graph.graph)
        graph.recompile()
        found = graph.graph.find_nodes(
            op="call_function", target=torch.ops.kvpaged.packed_linear.default
        )
        assert len(found) == calls
        assert torch.equal(graph(x, second), expected)
    packed.release()
    assert torch.allclose(model(x, x), model.q_proj(x) * model.k_proj(x) + model.v_proj(x))


def test_weights_that_changed_are_packed_anew():
    model = _Attention().requires_grad_(False)
    x = torch.randn(3, 32)
    packed = PackedLinears(model, native=True)
    assert packed.refresh() == 0
    model.k_proj.weight.mul_(2)
    assert packed.refresh() == 3
    model.v_proj.weight.data.mul_(2)  # torch doesn't count it
    assert packed.refresh() == 3
    got = model(x, x)
    packed.release()
    assert torch.allclose(got, model(x, x), atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists a process's libraries so")
def test_there_is_one_openmp():
    native.load("native_linear", torch.float32)
    maps = Path("/proc/self/maps")
    names = {line.split()[-1] for line in maps.read_text().splitlines() if "gomp" in line}
    assert len(names) == 1, names


def test_libraries_are_made_once_and_by_several_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    native.load.cache_clear()
    made: list[ctypes.CDLL] = []
    threads = [
        threading.Thread(target=lambda: made.append(native.load("native_linear", torch.float32)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    native.load.cache_clear()
    assert len(made) == 2
    assert [file.suffix for file in tmp_path.rglob("*") if file.is_file()] == [".so"]


def test_what_the_compiler_says_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with pytest.raises(native.NativeError, match="GROUP"):
        native.load("native_decode", torch.float32)
    with pytest.raises(native.NativeError, match="float64"):
        native.load("native_linear", torch.float64)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
