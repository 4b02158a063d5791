"""The custom operators: schemas, fakes, and loops held whole by torch.compile."""

from typing import Any

import pytest
import torch

from kvpaged import PagedKVCache, PageGeometry, ops
from kvpaged.errors import ConfigError

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 64


def prepared(backend: Any, layout: Any, counts: list[int]) -> tuple[PagedKVCache, Any]:
    shape = PageGeometry(
        layers=LAYERS, kv_heads=KV_HEADS, head_dim=DIM, page_size=16, dtype=torch.float32
    )
    cache = PagedKVCache(shape, "2MiB", backend=backend, layout=layout)
    torch.manual_seed(0)
    return cache, cache.batch([range(n) for n in counts])


def new(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (torch.randn(tokens, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_operators_keep_their_word(backend, layout):
    """Schema (what is mutated), fake outputs and dispatch, by torch's own checker."""
    cache, batch = prepared(backend, layout, [20, 3])
    pages, group = cache.classes[0].layers[1], batch.step.groups[0]
    q, k, v = new(23)
    checks = ("test_schema", "test_faketensor")
    views = (pages.k_view, pages.v_view)
    kvpaged = torch.ops.kvpaged
    torch.library.opcheck(
        kvpaged.append.default, (pages.flat, k, v, group.slots, *views, backend), test_utils=checks
    )
    options = (DIM**-0.5, None, None, None, None, backend)
    torch.library.opcheck(
        kvpaged.prefill.default,
        (pages.flat, q, group.table, group.cu_q, group.lengths, *views, 20, 20, *options),
        test_utils=checks,
    )
    torch.library.opcheck(
        kvpaged.decode.default,
        (pages.flat, q[:2], group.table, group.lengths, None, None, *views, 1, *options),
        test_utils=checks,
    )


@pytest.mark.parametrize("layout", ["page-major", "layer-major"])
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_a_compiled_layer_is_the_eager_one(backend, layout):
    """Append and attention in one graph (fullgraph), for a prefill and for a decode step."""
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        cache, batch = prepared(backend, layout, [20, 3])
        pages = cache.classes[0].layers[1]

        def layer(q, k, v, group, step, pages=pages):
            ops.append(pages, k, v, group.slots, backend=backend)
            options = ops.Options(DIM**-0.5)
            if step.decode:
                return ops.decode(pages, q, group.table, group.lengths, options, backend=backend)
            return ops.prefill(
                pages, q, group.table, group.cu_q, group.lengths, options,
                max_q=32, max_len=32, backend=backend,
            )  # fmt: skip

        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        outs = []
        for tokens in (23, 2):
            step = batch.step
            _ = step.groups[0].slots  # worked out outside the graph, once a step
            outs.append(run(*new(tokens), step.groups[0], step))
            batch.commit()
            batch.extend([1, 1])
        results.append((*outs, pages.flat.clone()))
    for eager, compiled_out in zip(*results, strict=True):
        torch.testing.assert_close(compiled_out, eager)


def test_no_kernels_of_that_name():
    cache, batch = prepared("cpu", None, [3])
    pages = cache.classes[0].layers[0]
    backend: Any = "cuda"
    with pytest.raises(ConfigError, match="no kernels are called 'cuda'"):
        ops.append(pages, *new(3)[1:], batch.step.groups[0].slots, backend=backend)
