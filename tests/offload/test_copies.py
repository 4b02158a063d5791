"""Copies between pages and records: byte for byte, run by run, and wrong sums are found."""

import numpy as np
import pytest
import torch

from kvpaged.offload import cpu_copies
from kvpaged.offload.cpu_copies import CpuCopies
from kvpaged.offload.runs import Run, runs_of
from tests.offload.pooled import LAYOUTS, SHAPES, make, records_of, sums_of


def ids(*pages: int) -> np.ndarray:
    return np.array(pages, np.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_go_out_and_come_back_layer_by_layer(shape, layout):
    page_class = make(shape, layout)
    pages = ids(3, 4, 5, 0, 9, 8, 1)
    expected = records_of(page_class, pages)
    records = torch.zeros_like(expected)
    CpuCopies(page_class, "cpu").out(pages, records)
    assert torch.equal(records, expected)

    other = make(shape, layout)
    other.flat.zero_()
    copies = CpuCopies(other, "cpu")
    sums = sums_of(page_class, expected)
    for layer in range(other.geometry.layers):
        assert not copies.into(pages[::-1], records, sums, slice(layer, layer + 1)).wrong().any()
    assert torch.equal(records_of(other, pages[::-1]), expected)
    assert other.checksums is not None
    assert np.array_equal(other.checksums.numpy()[pages[::-1]], sums)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_one_copy_of_each_kind(layout, monkeypatch):
    calls = []

    class Counting:
        ndarray, uint8 = np.ndarray, np.uint8

        @staticmethod
        def copyto(to, source):
            calls.append(to.nbytes)
            np.copyto(to, source)

    monkeypatch.setattr(cpu_copies, "np", Counting)
    page_class = make("unlike widths", layout)
    pages = ids(3, 4, 5, 9, 10, 1)
    records = torch.empty_like(records_of(page_class, pages))
    CpuCopies(page_class, "cpu").out(pages, records)
    assert len(calls) == 3 * (1 if layout == "page-major" else 2)
    assert sum(calls) == records.nbytes


def test_runs():
    assert runs_of(ids()) == []
    assert runs_of(ids(4)) == [Run(4, 0, 1)]
    assert runs_of(ids(4, 5, 6, 2, 1, 7, 8)) == [
        Run(4, 0, 3), Run(2, 3, 1), Run(1, 4, 1), Run(7, 5, 2)
    ]  # fmt: skip
    assert runs_of(ids(12, 18, 24, 30, 42), 6) == [Run(12, 0, 4), Run(42, 4, 1)]
