"""Steps made from the one before, beside steps begun: the same tokens, the same outputs."""

import numpy as np
import pytest
import torch

from kvpaged import LayerGroup, OutOfPagesError, PagedKVCache, PageGeometry
from kvpaged.pages.mixed import MixedClass
from kvpaged.slot_batch import SlotBatch

DIM, HEADS, ROWS = 16, 2, 5


def make(windows, backend, layout, memory="2MiB", kv_format="auto"):
    groups = [
        LayerGroup(
            geometry=PageGeometry(
                layers=1, kv_heads=1, head_dim=DIM, page_size=16, dtype=torch.float32
            ),
            layers=(layer,),
            window=window,
        )
        for layer, window in enumerate(windows)
    ]
    return PagedKVCache(groups, memory, backend=backend, layout=layout, kv_format=kv_format)


def poison(cache):
    """Leave pages that somebody has held full of NaN."""
    batch = SlotBatch(cache, 1)
    count = 16 * (40 if cache.compressed else cache.stats().groups[0].pages // 2)
    tokens(batch, batch.begin(np.array([count])), torch.Generator().manual_seed(9), torch.nan)
    batch.commit()
    batch.close()


def tokens(batch, step, generator, factor=1.0):
    """Write random keys and values of a step's tokens; what they attend to."""
    outs = []
    for layer in range(len(step.groups)):
        k, v = (torch.randn(step.total, 1, DIM, generator=generator) * factor for _ in range(2))
        q = torch.randn(step.total, HEADS, DIM, generator=generator)
        batch.write(layer, k, v)
        outs.append(batch.attend(layer, q, scale=0.25))
    return outs


@pytest.mark.parametrize("lengths", [[3, 20, 16, 1, 31], [7] * ROWS, [16, 0, 5, 0, 32]])
@pytest.mark.parametrize("windows", [(None,), (24, None)])
@pytest.mark.parametrize(
    ("backend", "layout", "kv_format"),
    [
        ("cpu", "layer-major", "auto"),
        ("cpu", "page-major", "auto"),
        ("reference", "page-major", "auto"),
        ("cpu", "layer-major", "int4"),
        ("cpu", "page-major", "fp8"),
        ("cpu", "page-major", "k8v4"),
    ],
)
def test_a_step_made_from_the_one_before_is_the_step_begun(
    backend, layout, kv_format, windows, lengths
):
    caches = [make(windows, backend, layout, kv_format=kv_format) for _ in range(2)]
    batches = []
    for cache in caches:
        poison(cache)
        batches.append(SlotBatch(cache, ROWS))
    counts = np.array(lengths)
    order = np.flatnonzero(counts)
    generators = [torch.Generator().manual_seed(0) for _ in batches]
    for batch, generator in zip(batches, generators, strict=True):
        tokens(batch, batch.begin(counts), generator)
        batch.commit()
    one = (counts > 0).astype(np.int64)
    made = 0
    for number in range(35):
        steps = [batches[0].begin(one, order=order, more=order.astype(np.int32))]
        second = batches[1].again()
        made += second is not None
        more = order.astype(np.int32)
        steps.append(second or batches[1].begin(one, order=order, more=more))
        outs = [tokens(b, s, g) for b, s, g in zip(batches, steps, generators, strict=True)]
        for ours, theirs in zip(*outs, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(steps[0].positions, steps[1].positions)
        assert torch.equal(steps[0].more, steps[1].more)
        if number % 11 == 3:  # a step that does not count is begun again
            batches[1].drop_step()
            assert batches[1].again() is None
            state = generators[1].get_state()
            second = batches[1].begin(one, order=order, more=more)
            generators[1].manual_seed(number)
            generators[0].manual_seed(number)
            again = tokens(batches[1], second, generators[1])
            first = tokens(batches[0], steps[0], generators[0])
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
            for generator in generators:
                generator.set_state(state)
        for batch in batches:
            batch.commit()
            batch.leave_windows()
        for cache in caches:
            cache.check_integrity()
    assert made > 28
    for cache, batch in zip(caches, batches, strict=True):
        batch.close()
        assert cache.stats().used == 0


def test_none_where_something_else_has_happened():
    with make((None,), "cpu", "layer-major") as cache:
        batch = SlotBatch(cache, 3)
        generator = torch.Generator().manual_seed(0)

        def step(counts):
            tokens(batch, batch.begin(np.array(counts)), generator)
            batch.commit()

        assert batch.again() is None
        step([4, 4, 4])
        assert batch.again() is None  # more than a token each
        step([1, 1, 1])
        batch.rewind(1, 4)
        assert batch.again() is None
        step([1, 1, 1])
        batch.vacate(2)
        assert batch.again() is None
        step([1, 1, 0])
        batch.select([0, 1, 1])
        assert batch.again() is None
        step([1, 1, 1])
        batch.vacate(2)
        batch.known[0] = 7
        step([1, 1, 0])
        batch.fork(0, 2)
        assert batch.again() is None
        batch.close()


def test_out_of_pages_changes_nothing():
    with make((None,), "cpu", "layer-major", "24KiB") as cache:
        batch = SlotBatch(cache, 2)
        generator = torch.Generator().manual_seed(0)
        counts = np.array([15, 15])
        for each in (counts, np.array([1, 1])):
            tokens(batch, batch.begin(each), generator)
            batch.commit()
        other = SlotBatch(cache, 1)
        free = cache.stats().groups[0].pages - 2
        other.begin(np.array([16 * (free - 1)]))  # one page is left, two are needed
        used = cache.stats().used
        for _ in range(2):
            with pytest.raises(OutOfPagesError):
                batch.again()
            assert cache.stats().used == used
        other.close()
        step = batch.again()
        assert step is not None
        tokens(batch, step, generator)
        batch.commit()
        cache.check_integrity()
        batch.close()


def test_out_of_compressed_pages_changes_nothing():
    """A page that is to fill needs the one that follows it, compressed, before the step begins."""
    with make((None,), "cpu", "layer-major", "32KiB", kv_format="int4") as cache:
        pages, batch = cache.classes[0], SlotBatch(cache, 2)
        assert isinstance(pages, MixedClass)
        generator = torch.Generator().manual_seed(0)
        for counts in ([30, 30], [1, 1]):
            tokens(batch, batch.begin(np.array(counts)), generator)
            batch.commit()
        taken = []
        while True:
            try:
                taken.append(pages.allocator.alloc_sealed(1))
            except OutOfPagesError:
                break
        used = cache.stats().used
        for _ in range(2):
            with pytest.raises(OutOfPagesError, match="of compressed pages"):
                batch.again()
            assert cache.stats().used == used
            assert not batch._groups[0].table.successors
        for ids in taken:
            pages.allocator.release(ids)
        step = batch.again()
        assert step is not None
        assert len(batch._groups[0].table.successors) == 2
        tokens(batch, step, generator)
        batch.commit()
        cache.check_integrity()
        assert all(pages.allocator.is_sealed(ids).tolist() == [False, True] for ids in
                   batch.page_map())  # fmt: skip
        batch.close()
        assert cache.stats().used == 0
