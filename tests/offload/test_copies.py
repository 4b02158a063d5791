"""Copies between pages and records: byte for byte, run by run, and wrong sums are found.

Those of a GPU run on a lane that copies host memory as the engines would copy the device's: what
it is told is really done.
"""

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.config import Backend
from kvpaged.offload import cpu_copies
from kvpaged.offload.copies import Copies
from kvpaged.offload.cpu_copies import CpuCopies
from kvpaged.offload.cuda_copies import CudaCopies
from kvpaged.offload.means import SIZES, Timing, choose
from kvpaged.offload.runs import Run, blocks_of, runs_of
from kvpaged.pages import classops
from kvpaged.pages.pool import PageClass
from kvpaged.testing.host_lane import HostLane
from kvpaged_kernels.cpu.native_copy import copy_block, prepare
from tests.offload.pooled import LAYOUTS, SHAPES, make, records_of, sums_of

CPU = torch.device("cpu")


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, np.int32)


def with_lanes(page_class: PageClass, backend: Backend = "reference") -> Any:
    return CudaCopies(page_class, backend, CPU, lanes=HostLane)


def engines(page_class: PageClass) -> Copies:
    return with_lanes(page_class)  # type: ignore[no-any-return]


def kernel(page_class: PageClass) -> Copies:
    copies = with_lanes(page_class)
    copies.table = (Timing(4096, dma=1.0, kernel=0.5),)
    return copies  # type: ignore[no-any-return]


def triton_kernel(page_class: PageClass) -> Copies:
    copies = with_lanes(page_class, "triton")
    copies.table = (Timing(4096, dma=1.0, kernel=0.5),)
    return copies  # type: ignore[no-any-return]


def cpu(page_class: PageClass) -> Copies:
    return CpuCopies(page_class, "cpu", native=False)


def native(page_class: PageClass) -> Copies:
    if not shutil.which("g++"):
        pytest.skip("native code needs g++")
    assert prepare(60)
    return CpuCopies(page_class, "cpu")


IMPLEMENTATIONS = [cpu, native, engines, kernel, triton_kernel]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_go_out_and_come_back_layer_by_layer(shape, layout, implementation):
    page_class = make(shape, layout)
    pages = ids(3, 4, 5, 0, 9, 8, 1)
    classops.keep_checksums(page_class, pages, backend="reference")
    expected = records_of(page_class, pages)
    records = torch.zeros_like(expected)
    out = implementation(page_class).out(pages, records)
    assert out.wait()
    assert torch.equal(records, expected)
    sums = sums_of(page_class, expected)
    assert np.array_equal(out.sums(), sums)

    other = make(shape, layout)
    other.flat.zero_()
    copies = implementation(other)
    back = pages[::-1].copy()
    for layer in range(other.geometry.layers):
        ticket = copies.into(back, records, sums, slice(layer, layer + 1))
        ticket.order()
        assert ticket.wait(1)
        assert not ticket.wrong().any()
    assert torch.equal(records_of(other, back), expected)
    rest = ids(*sorted(set(range(12)) - set(pages.tolist())))
    assert not records_of(other, rest).any()
    assert other.checksums is not None
    assert np.array_equal(other.checksums.numpy()[back], sums)
    assert not other.checksums.numpy()[rest].any()


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(12)),
    count=st.integers(0, 12),
    shape=st.sampled_from(list(SHAPES)),
    layout=st.sampled_from(LAYOUTS),
    gap=st.integers(0, 5),
    first=st.integers(0, 1),
    stop=st.integers(2, 4),
)
def test_every_implementation_agrees(order, count, shape, layout, gap, first, stop):
    """Any pages in any order, some layers, records with room between them."""
    source = make(shape, layout)
    pages = ids(*order[:count])
    size = records_of(source, pages).shape[1]
    room = torch.full((count, size + 64 * gap), 0xAA, dtype=torch.uint8)
    records = room[:, :size]
    records.copy_(records_of(source, pages))
    sums = sums_of(source, records)
    results = []
    for implementation in (cpu, engines, kernel):
        target = make(shape, layout)
        target.flat.view(torch.uint8).fill_(0x55)
        ticket = implementation(target).into(pages[::-1].copy(), records, sums, slice(first, stop))
        assert ticket.wait()
        assert ticket.wrong().tolist() == [False] * count
        results.append(target.flat.view(torch.uint8).clone())
        back = room.clone()[:, :size]
        implementation(source).out(pages, back)
        assert torch.equal(back, records)
    assert all(torch.equal(result, results[0]) for result in results)
    assert bool((room[:, size:] == 0xAA).all())
    layer_bytes = size // target.geometry.layers
    into = records_of(target, pages[::-1])
    assert torch.equal(
        into[:, first * layer_bytes : stop * layer_bytes],
        records[:, first * layer_bytes : stop * layer_bytes],
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_sums_are_found_in_their_layers_only(layout, implementation):
    page_class = make("plain", layout)
    pages = ids(2, 3, 7, 5)
    records = records_of(page_class, pages)
    sums = sums_of(page_class, records)
    copies = implementation(page_class)
    records[1, page_class.geometry.slice_bytes + 3] ^= 4  # layer 1
    sums[3, 2] += 1
    found = [
        copies.into(pages, records, sums, layers).wrong().tolist()
        for layers in (slice(0, 1), slice(1, 2), slice(1, 3), slice(0, 3))
    ]
    assert found == [
        [False] * 4, [False, True, False, False], [False, True, False, True],
        [False, True, False, True],
    ]  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_pool_without_checksums_has_them_computed(implementation):
    page_class = make(checksums=False)
    pages = ids(8, 2)
    records = records_of(page_class, pages)
    sums = implementation(page_class).out(pages, torch.empty_like(records)).sums()
    assert np.array_equal(sums, sums_of(page_class, records))
    assert not implementation(page_class).into(pages, records, sums, slice(0, 3)).wrong().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_one_copy_of_each_kind(layout, monkeypatch):
    calls: list[int] = []
    copyto = np.copyto

    def counting(to, source):
        calls.append(to.nbytes)
        copyto(to, source)

    monkeypatch.setattr(np, "copyto", counting)
    page_class = make("unlike widths", layout)
    pages = ids(3, 4, 5, 9, 10, 1)
    records = torch.empty_like(records_of(page_class, pages))
    cpu(page_class).out(pages, records)
    assert len(calls) == 3 * (1 if layout == "page-major" else 2)
    assert sum(calls) == records.nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_one_piece_of_native_code(layout, monkeypatch):
    shapes: list[tuple[int, ...]] = []

    def counting(shape, *ends, **options):
        shapes.append(shape)
        return copy_block(shape, *ends, **options)

    monkeypatch.setattr(cpu_copies, "copy_block", counting)
    page_class = make("unlike widths", layout)
    pages = ids(3, 4, 5, 9, 10, 1)
    records = torch.empty_like(records_of(page_class, pages))
    copies = native(page_class)
    copies.out(pages, records)
    assert len(shapes) == 3 * (1 if layout == "page-major" else 2)
    assert sum(map(math.prod, shapes)) == records.nbytes
    monkeypatch.setattr(np, "copyto", None)
    monkeypatch.setattr(copies, "_sums", None)
    sums = sums_of(page_class, records)
    assert not copies.into(pages, records, sums, slice(0, 2)).wrong().any(), "in one pass"


def test_a_run_of_pages_is_one_copy_of_the_engines():
    page_class = make("no V")
    geometry = page_class.geometry
    pages = ids(3, 4, 5, 9, 10, 1)
    records = torch.empty_like(records_of(page_class, pages))
    copies = with_lanes(page_class)
    copies.out(pages, records)
    # 5,120 bytes are whole units, so pages lie back to back, as records do.
    body = geometry.layers * geometry.slice_bytes
    assert copies._out.copies == [(3 * body, 1), (2 * body, 1), (body, 1)]
    sums = sums_of(page_class, records)
    copies.into(pages, records, sums, slice(1, 3))
    assert copies._in.copies == [(body // 2, 3), (body // 2, 2), (body // 2, 1)]
    assert (copies._out.followed, copies._in.followed) == (1, 1)
    assert (copies.engine_copies, copies.kernel_copies) == (6, 0)


def test_later_layers_of_a_load_come_after_what_the_first_came_after():
    page_class = make("no V")
    copies = with_lanes(page_class)

    def follows(pages: np.ndarray, first: int, stop: int) -> bool:
        before = copies._in.followed
        records = records_of(page_class, pages)
        copies.into(pages, records, sums_of(page_class, records), slice(first, stop))
        return bool(copies._in.followed > before)

    one, other = ids(1, 2), ids(2, 1)
    assert follows(one, 0, 1)
    assert follows(other, 0, 2)
    assert not follows(one, 1, 3)
    assert not follows(other, 2, 4)
    assert not follows(one, 3, 4)
    assert follows(one, 3, 4)  # the load was whole: this is another one
    assert follows(other, 1, 2)
    assert follows(other, 0, 4)
    assert follows(other, 2, 4)


def test_the_longest_axis_makes_the_rows():
    geometry = make("plain", "layer-major").geometry
    (k, _) = blocks_of(geometry, slice(0, 3), pages=12, storage_bytes=10**6, record_stride=9216)
    piece = 16 * 16 * 2
    one, five = k.of(Run(4, 0, 1)), k.of(Run(4, 0, 5))
    assert [(r.width, r.height) for r in one.rectangles()] == [(piece, 3)] * 2  # a head each
    assert [(r.width, r.height) for r in five.rectangles()] == [(piece, 5)] * 6
    assert {r.pool_pitch for r in one.rectangles()} == {2 * 12 * piece}


def test_pitches_stay_within_what_the_engines_take():
    """4,000,000 layer-major pages: heads lie 4 GiB apart, so they cannot be rows."""
    geometry = make("no V", "layer-major").geometry
    pages = 4_000_000
    (k,) = blocks_of(geometry, slice(0, 4), pages=pages, storage_bytes=1, record_stride=5120)
    parts = list(k.of(Run(3_999_999, 7, 1)).rectangles())
    assert [part.height for part in parts] == [1] * 4
    assert parts[3].pool == 1280 * (3 * pages + 3_999_999) > 2**33
    assert parts[3].record == 7 * 5120 + 3 * 1280


def test_memory_that_is_not_pinned_goes_by_the_engines():
    page_class = make()
    copies = with_lanes(page_class)
    copies.table = (Timing(4096, dma=1.0, kernel=0.5),)
    copies._in.pinned = False
    pages = ids(1, 2)
    records = records_of(page_class, pages)
    sums = sums_of(page_class, records)
    assert not copies.into(pages, records, sums, slice(0, 3)).wrong().any()
    assert (copies.engine_copies, copies.kernel_copies) == (1, 0)


def test_a_device_that_failed_is_heard_of_when_asked():
    page_class = make()
    copies = with_lanes(page_class)
    pages = ids(1)
    records = records_of(page_class, pages)
    out = copies.out(pages, records)
    into = copies.into(pages, records, sums_of(page_class, records), slice(0, 3))
    copies._out.broken = copies._in.broken = True
    assert out.wait(0)
    assert into.wait()
    with pytest.raises(RuntimeError, match="illegal memory"):
        out.sums()
    with pytest.raises(RuntimeError, match="illegal memory"):
        into.wrong()


def test_the_means_are_chosen_by_the_nearest_size():
    table = (Timing(4096, 3.0, 1.0), Timing(16384, 1.0, 1.0), Timing(65536, 1.0, 2.0))
    assert choose(table, 100) == choose(table, 8000) == "kernel"
    assert choose(table, 8300) == choose(table, 2**30) == "dma"
    assert choose((), 4096) == "dma"


def test_calibration_times_both_at_each_size():
    page_class = make()
    copies = with_lanes(page_class)
    copies._in.times = iter([3.0, 1.0, 2.0, 0.5, 0.7, 0.6] * len(SIZES))
    copies.calibrate()
    assert copies.table == tuple(Timing(size, dma=2.0, kernel=0.6) for size in SIZES)
    assert {width for width, _ in copies._in.copies} == set(SIZES)


@pytest.mark.parametrize(
    "records",
    [
        torch.empty(2, 3072 + 64, dtype=torch.uint8),
        torch.empty(3, 3072, dtype=torch.uint8),
        torch.empty(2, 3072, dtype=torch.int8),
        torch.empty(2, 2 * 3072, dtype=torch.uint8)[:, ::2],
        torch.empty(1, 3072, dtype=torch.uint8).expand(2, 3072),
    ],
    ids=["size", "count", "dtype", "stride", "overlapping"],
)
@pytest.mark.parametrize("implementation", [cpu, engines])
def test_records_of_another_form_are_refused(records, implementation):
    page_class = make("float32")
    with pytest.raises(ValueError, match="records of 2 pages are uint8"):
        implementation(page_class).out(ids(1, 2), records)


def test_runs():
    assert runs_of(ids()) == []
    assert runs_of(ids(4)) == [Run(4, 0, 1)]
    assert runs_of(ids(4, 5, 6, 2, 1, 7, 8)) == [
        Run(4, 0, 3), Run(2, 3, 1), Run(1, 4, 1), Run(7, 5, 2)
    ]  # fmt: skip
    assert runs_of(ids(12, 18, 24, 30, 42), 6) == [Run(12, 0, 4), Run(42, 4, 1)]
