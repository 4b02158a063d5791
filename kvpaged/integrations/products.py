"""Products of one input as one: a pass over graphs that `torch.compile` makes.

In a graph "the same input" is the same node, so nothing has to be guessed: where all layers that
are packed together (`linears.together`) multiply one node, one call takes their place, and each
output is a part of its.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from kvpaged.integrations.linears import together

_operator = torch.ops.kvpaged.packed_linear.default


class JoinProducts(CustomGraphPass):
    """For inductor's `post_grad_custom_pre_pass`: functions only, no tensor is written to."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph."""
        by_input: dict[fx.Node, dict[int, fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=_operator):
            by_input.setdefault(node.args[0], {}).setdefault(node.args[1], node)
        for x, nodes in by_input.items():
            for numbers, (number, width) in tuple(together.items()):
                if all(each in nodes for each in numbers):
                    _join(graph, x, [nodes[each] for each in numbers], number, width)

    def uuid(self) -> bytes:
        """What a graph made with it depends on: inductor keeps graphs on disk."""
        known = repr(sorted(together.items())).encode()
        return bytes(get_hash_for_files((str(Path(__file__)),), repr(known)))


def _join(graph: fx.Graph, x: fx.Node, nodes: Sequence[fx.Node], number: int, width: int) -> None:
    place = {node: i for i, node in enumerate(graph.nodes)}
    first = min(nodes, key=place.__getitem__)
    with graph.inserting_before(first):
        whole = graph.call_function(_operator, (x, number, width))
        whole.meta["val"] = _operator(x.meta["val"], number, width)
        start = 0
        for node in nodes:
            columns: Any = node.args[2]
            stop = start + columns
            args = whole, -1, start, stop
            part = graph.call_function(torch.ops.aten.slice.Tensor, args)
            part.meta["val"] = torch.ops.aten.slice.Tensor(whole.meta["val"], *args[1:])
            node.replace_all_uses_with(part)
            start = stop
    for node in nodes:
        graph.erase_node(node)
