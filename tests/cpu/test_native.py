"""Native code against the oracles in fp64: products, attention, and how it is made."""

import ctypes
import itertools
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
from kvpaged.ops import LayerPages
from kvpaged_kernels.cpu import native
from kvpaged_kernels.cpu.native_attend import NativeLayer
from kvpaged_kernels.cpu.native_linear import fits_together, pack, pack_together
from kvpaged_kernels.cpu.plan import plan_spans
from kvpaged_kernels.cpu.prefill import paged_prefill as stock_prefill
from kvpaged_kernels.reference.attention import paged_prefill
from tests.cpu.test_cpu_attention import make_pages

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Where there is a compiler, code that it refuses is a failure.
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")


def seen_in(flat, pages):
    """K and V of pages in another vector; page-major views have an entry every 256 bytes."""
    return [
        flat.as_strided(x.shape, x.stride(), x.storage_offset())
        for x in (pages.k_pages, pages.v_pages)
    ]


def family(rng, counts, lengths, pages: LayerPages, total: int) -> torch.Tensor:
    """Block tables of pages anywhere; some rows begin with pages of another, as far as all new
    tokens of both are behind them.
    """
    whole = [(n - new) // pages.page_size for n, new in zip(lengths, counts, strict=True)]
    width = max(-(-n // pages.page_size) for n in lengths)
    table = rng.permutation(total)[: len(lengths) * width].reshape(len(lengths), width)
    for row in range(1, len(lengths)):
        other = int(rng.integers(0, row))
        common = int(rng.integers(0, min(whole[row], whole[other]) + 1))
        table[row, :common] = table[other, :common]
    return torch.from_numpy((table * pages.step).astype(np.int32))


def attend(pages, counts, lengths, table, group, *, window, softcap, sinks):
    """The error of native code, and that of the stock path, against fp64; and the step."""
    total, heads = sum(counts), pages.k_pages.shape[1]
    dims = pages.k_pages.shape[3], pages.v_pages.shape[3]
    dtype, scale = pages.flat.dtype, dims[0] ** -0.5
    q = torch.randn(heads * group, total, dims[0]).to(dtype).transpose(0, 1)
    k, v = (torch.randn(total, heads, dim).to(dtype) for dim in dims)
    sink = torch.randn(heads * group).to(dtype) if sinks else None
    lens = torch.tensor(lengths, dtype=torch.int32)
    cu_q = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    expected_pages = pages.flat.clone()
    views: Any = seen_in(expected_pages, pages)
    # Entries, slots, heads; page-major entries between those of pages are bytes of others.
    entries = min(map(len, views))
    seen = torch.ones((entries, pages.page_size, heads), dtype=torch.bool)
    seen[:: pages.step] = False
    given = table.clone()
    for row, (length, new) in enumerate(zip(lengths, counts, strict=True)):
        first = max(0, length - new - window + 1) if window and new else 0
        for position in range(first, length if new else 0):
            seen[table[row, position // pages.page_size], position % pages.page_size] = True
        given[row, -(-length // pages.page_size) :] = 2**30
        given[row, : first // pages.page_size] = 2**30
    mine = [x[:entries].transpose(1, 2) for x in seen_in(pages.flat, pages)]
    for x in mine:
        x[~seen] = torch.nan
    positions = [n - new + i for n, new in zip(lengths, counts, strict=True) for i in range(new)]
    owners = np.repeat(np.arange(len(counts)), counts).tolist()
    for token, (row, position) in enumerate(zip(owners, positions, strict=True)):
        entry, slot = int(table[row, position // pages.page_size]), position % pages.page_size
        views[0][entry, :, slot], views[1][entry, :, slot] = k[token], v[token]
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    layer = NativeLayer(pages.k_pages, pages.v_pages, heads * group, **options)
    step = layer.plan(q, k, v, given, lens, cu_q)
    got = layer(step, q, k, v, sink)
    for x, y in zip(mine, views, strict=True):  # what it wrote is exact, and nothing else
        assert x[~seen].isnan().all()
        written = seen.clone()
        written[torch.arange(entries) % pages.step > 0] = False
        assert torch.equal(x[written], y[:entries].transpose(1, 2)[written])
    exact_pages: Any = seen_in(expected_pages.double(), pages)
    sizes = {"max_q": max(counts), "max_len": max(lengths)}
    exact = paged_prefill(
        q.double(), exact_pages[0], exact_pages[1], table, cu_q, lens, **sizes, **options,
        sinks=None if sink is None else sink.double(),
    )  # fmt: skip
    plan = plan_spans(
        table.numpy(), np.array(lengths), cu_q.numpy().astype(np.int64), joined=pages.joined,
        page_size=pages.page_size, step=pages.step, window=window,
    )  # fmt: skip
    other = stock_prefill(q, views[0], views[1], plan, **options, sinks=sink)
    errors = [float((x.double() - exact).abs().max() / exact.abs().max()) for x in (got, other)]
    return errors[0], errors[1], step


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("group", "dims", "page_size"),
    [(3, (64, 64), 16), (8, (128, 128), 128), (2, (40, 24), 16), (1, (8, 8), 32)],
)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_attention_is_as_exact_as_stock_torch(dtype, group, dims, page_size, data):
    def choose(*values):
        return data.draw(st.sampled_from(values))

    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    torch.manual_seed(int(rng.integers(2**31)))
    near = [0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size]
    several = choose(False, True)
    counts = [choose(1, 1, 2, 7, 33, 100, 0) if several else 1 for _ in range(choose(1, 1, 2, 5))]
    counts[0] = max(counts[0], 1)
    lengths = [new + choose(*near, int(rng.integers(0, 1500))) for new in counts]
    lengths = [max(n, 1) for n in lengths]
    total = len(lengths) * -(-max(lengths) // page_size) + 2
    pages = make_pages(
        total, choose("page-major", "layer-major"), dtype, page_size=page_size,
        kv_heads=choose(1, 2, 3), dims=dims,
    )  # fmt: skip
    table = family(rng, counts, lengths, pages, total)
    before = torch.get_num_threads()
    torch.set_num_threads(choose(1, 2, 3))
    try:
        error, stock, _ = attend(
            pages, counts, lengths, table, group, window=choose(None, 1, page_size, 100),
            softcap=choose(None, 5.0), sinks=choose(False, True),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    # A row of one token is one sum in fp32: of n roundings about n^0.5 add up (Higham 2002, 4.2).
    summing = max(lengths) ** 0.5 / 2 * torch.finfo(torch.float32).eps
    assert error <= 2 * stock + 2 * torch.finfo(dtype).eps + summing


@pytest.mark.parametrize(
    ("counts", "lengths", "common", "trunks"),
    [
        ([1, 1, 1], [300, 310, 290], {1: 10, 2: 10}, 1),
        ([1, 1, 1, 1], [300] * 4, {1: 8, 2: 14, 3: 14}, 2),  # all share 8, and three of them 6 more
        ([1, 1, 1], [300] * 3, {1: 14}, 1),
        ([1, 5, 40], [300, 300, 340], {1: 14, 2: 14}, 1),  # 40 tokens are a task by themselves
        ([1, 1], [300, 300], {1: 3}, 0),  # too short to be worth it
        ([9], [3000], {}, 1),  # alone with a long past
        ([90], [3000], {}, 0),
    ],
)
def test_pages_of_several_rows_are_read_once(counts, lengths, common, trunks):
    pages = make_pages(800, "layer-major", torch.float32, page_size=16, kv_heads=1, dims=(8, 8))
    width = -(-max(lengths) // 16)
    table = torch.arange(len(lengths) * width, dtype=torch.int32).view(len(lengths), width)
    for row, shared in common.items():
        table[row, :shared] = table[0, :shared]
    error, stock, step = attend(
        pages, counts, lengths, table, 3, window=None, softcap=None, sinks=True
    )
    assert step.trunks == trunks
    assert error <= 2 * stock + 1e-6
    *_, step = attend(pages, counts, lengths, table, 3, window=700, softcap=None, sinks=True)
    assert not step.trunks  # each row sees from elsewhere on


def test_a_tree_of_rows_has_a_trunk_for_each_branch():
    pages = make_pages(400, "layer-major", torch.float32, page_size=16, kv_heads=2, dims=(8, 8))
    table = torch.arange(5 * 40, dtype=torch.int32).view(5, 40)
    table[1:4, :6] = table[0, :6]
    table[1, :20] = table[0, :20]
    table[3, :30] = table[2, :30]
    error, stock, step = attend(
        pages, [1, 2, 1, 1, 1], [600] * 5, table, 3, window=None, softcap=None, sinks=False
    )
    assert step.trunks == 3  # of rows 0 to 3, of 0 and 1, of 2 and 3
    assert error <= 2 * stock + 1e-6


def test_attention_refuses_what_does_not_fit():
    pages = make_pages(4, "layer-major", torch.float32, page_size=16, kv_heads=2, dims=(8, 8))
    values = pages.v_pages
    assert values is not None
    layer = NativeLayer(pages.k_pages, values, 4, scale=1.0, window=None, softcap=None)
    table, lengths = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    q, k = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    cu_q = torch.arange(4, dtype=torch.int32)
    step = layer.plan(q, k, k, table, lengths, cu_q)
    with pytest.raises(ValueError, match="a layer of"):
        layer(step, q.bfloat16(), k, k)
    with pytest.raises(ValueError, match="a layer of"):
        layer(step, q[:, :2], k, k)
    with pytest.raises(ValueError, match="as the step says"):
        layer(step, q[:2], k[:2], k[:2])
    with pytest.raises(ValueError, match="new tokens of rows"):
        layer.plan(q[:2], k, k, table, lengths, cu_q)
    with pytest.raises(ValueError, match="new tokens of rows"):
        layer.plan(q, k, k, table.long(), lengths, cu_q)
    with pytest.raises(ValueError, match="cu_q ends with 6, for 3 new"):
        layer.plan(q, k, k, table, lengths, cu_q * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "inner"), [(64, 64), (70, 32), (1, 6), (200, 48), (16, 2)])
def test_products_are_as_exact_as_torchs(dtype, columns, inner):
    torch.manual_seed(0)
    weight, bias = torch.randn(columns, inner).to(dtype), torch.randn(columns).to(dtype)
    layer = pack(weight, bias)
    for rows in (*range(8), 13, 129, 140):
        x = torch.randn(1, rows, inner + 1).to(dtype)[..., 1:]
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
        native.load("native_attend", torch.float32)
    with pytest.raises(native.NativeError, match="float64"):
        native.load("native_linear", torch.float64)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_sources_have_100_columns():
    sources = [x for x in Path(native.__file__).parent.iterdir() if x.suffix in (".h", ".cpp")]
    lines = [(x.name, line) for x in sources for line in x.read_text().splitlines()]
    assert lines
    assert not [line for line in lines if len(line[1]) > 100]


def test_one_thread_holds_what_names_no_number_and_native_code_goes_on(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with native.one_thread():
            assert (torch.get_num_threads(), native.native_threads()) == (1, 3)
            found = []
            other = threading.Thread(target=lambda: found.append(native.native_threads()))
            other.start()
            other.join()
            assert found == [3]  # of this thread alone
            with native.one_thread():
                assert (torch.get_num_threads(), native.native_threads()) == (1, 3)
            with native.all_threads():
                assert (torch.get_num_threads(), native.native_threads()) == (3, 3)
            assert torch.get_num_threads() == 1
        with pytest.raises(ZeroDivisionError), native.one_thread():
            raise ZeroDivisionError
        with native.all_threads():
            assert torch.get_num_threads() == 3
        assert (torch.get_num_threads(), native.native_threads()) == (3, 3)
    finally:
        torch.set_num_threads(before)


def test_one_thread_finds_openmp_though_a_library_without_it_was_loaded_first(monkeypatch):
    """A cache with tiers loads the one that copies pages, maybe before any other."""
    monkeypatch.setattr(native, "_loaded", [native.load("native_copy", torch.float32)])
    with native.one_thread():
        assert torch.get_num_threads() == 1


def test_packed_layers_know_whether_they_are_all_there_is():
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50))
    packed = PackedLinears(model, native=True)
    try:
        assert packed.cover(model)
        assert not packed.cover(nn.Sequential(model, nn.Conv1d(64, 64, 1)))
    finally:
        packed.release()
