"""Sines and cosines of a graph are computed once, whoever uses them."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kvpaged.integrations.angles import KeepAngles
from kvpaged.integrations.beside import Repeated
from kvpaged.integrations.compiling import _Passes
from kvpaged.integrations.linears import together
from kvpaged.integrations.products import JoinProducts

COMPUTED = torch.ops.kvpaged.computed.default


def traced(function, *given):
    graph = make_fx(function, tracing_mode="fake")(*given)
    KeepAngles()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def count(graph):
    return sum(node.target is COMPUTED for node in graph.graph.nodes)


def rotary(positions, frequencies, layers):
    """As models write it: angles once, used by every layer."""
    angles = positions[:, None].float() * frequencies
    cos, sin = (x.to(torch.bfloat16).unsqueeze(0) for x in (angles.cos() * 0.5, angles.sin() * 0.5))
    return [x * cos + x.flip(-1) * sin for x in layers]


def test_what_several_layers_use_goes_through_the_operator_once():
    positions, frequencies = torch.arange(5), torch.rand(8)
    layers = [torch.randn(3, 5, 8).bfloat16() for _ in range(4)]
    graph = traced(rotary, positions, frequencies, layers)
    assert count(graph) == 2
    for node in graph.graph.nodes:
        if node.target is COMPUTED:
            assert len(node.users) == 4
            source = node.args[0]
            assert (
                source.meta["val"].dtype == torch.bfloat16
            )  # after the scaling, in the last dtype
            assert list(source.users) == [node]
            assert node.meta["val"].shape == source.meta["val"].shape
    expected = rotary(positions, frequencies, layers)
    got = graph(positions, frequencies, layers)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_what_one_node_uses_stays_where_it_is():
    def function(x, y):
        return x.cos() * y + x.sin()

    assert count(traced(function, torch.randn(4), torch.randn(4))) == 0


def test_a_product_with_a_tensor_is_not_taken_for_a_factor():
    def function(x, y):
        z = x.cos() * y
        return z + 1, z - 1

    assert count(traced(function, torch.randn(4), torch.randn(4))) == 0


def test_a_factor_may_be_a_size_of_the_graph():
    def function(x, y):
        z = x.cos() * x.shape[0]
        w = x.sin() * (1.0 / x.shape[0])
        return z + y, z - y, w + y, w - y

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    graph = make_fx(function, tracing_mode="symbolic")(x, y)
    KeepAngles()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    assert count(graph) == 2
    for got, expected in zip(graph(x, y), function(x, y), strict=True):
        torch.testing.assert_close(got, expected)


def test_transposed_angles_are_kept_in_row_major_order():
    def function(frequencies, positions, x):
        cos = (frequencies[:, None] * positions[None, :]).transpose(0, 1).cos()
        return [x * cos, x + cos]

    given = torch.rand(8), torch.arange(5.0), torch.randn(5, 8)
    graph = traced(function, *given)
    (kept,) = (node for node in graph.graph.nodes if node.target is COMPUTED)
    assert kept.args[0].meta["val"].stride() == (1, 5)
    assert kept.meta["val"].is_contiguous()
    assert COMPUTED(torch.rand(8, 5).t()).is_contiguous()
    for got, expected in zip(graph(*given), function(*given), strict=True):
        torch.testing.assert_close(got, expected)


def test_graphs_on_disk_depend_on_every_pass(monkeypatch):
    before = _Passes().uuid()
    assert before == _Passes().uuid()
    for each in (Repeated, JoinProducts, KeepAngles):
        with monkeypatch.context() as change:
            change.setattr(each, "uuid", lambda self: b"another")
            assert _Passes().uuid() != before
    with monkeypatch.context() as change:
        change.setitem(together, (1, 2), (3, 4))  # which products are joined is in the graph
        assert _Passes().uuid() != before
