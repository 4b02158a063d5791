"""Sines and cosines of positions, once a pass: a change to graphs that `torch.compile` makes.

Inductor takes elementwise operations into each kernel that uses their results, and so would compute
the angles of a rotary embedding anew in every layer, for every head: of SmolLM2's 32 rows decoding
a third of all that is not a product or attention.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_aten = torch.ops.aten
_ANGLES = (_aten.cos.default, _aten.sin.default)
_SAME = (
    _aten.unsqueeze.default,
    _aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
)

_library = torch.library.Library("kvpaged", "FRAGMENT")
_library.define("computed(Tensor x) -> Tensor")


def _computed(x: Tensor) -> Tensor:
    """A copy in row-major order: angles are often made transposed, and what layers make of them
    would lie so, too.
    """
    return x.clone(memory_format=torch.contiguous_format)


_library.impl("computed", _computed, "CompositeExplicitAutograd")
torch.library.register_fake("kvpaged::computed", _computed, lib=_library)

_operator = torch.ops.kvpaged.computed.default


class KeepAngles(CustomGraphPass):
    """For inductor's `post_grad_custom_pre_pass`: what several nodes make of a sine or a cosine
    goes through an operator that inductor does not look into.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph."""
        for target in _ANGLES:
            for node in graph.find_nodes(op="call_function", target=target):
                _keep(graph, _last(node))

    def uuid(self) -> bytes:
        """What a graph made with it depends on."""
        return bytes(get_hash_for_files((str(Path(__file__)),)))


def _last(node: fx.Node) -> fx.Node:
    """The last of those that only one node uses: a factor for all, a dtype, a dimension of 1."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target not in _SAME and not _scales(user, node):
            break
        node = user
    return node


def _scales(user: fx.Node, node: fx.Node) -> bool:
    """Whether it multiplies by one number."""
    if user.target is not _aten.mul.Tensor:
        return False
    others: list[Any] = [x for x in user.args if x is not node]
    return len(others) == 1 and _is_number(others[0])


def _is_number(x: Any) -> bool:
    """Whether an argument has one value: a constant, a size, a tensor without dimensions."""
    value = x.meta.get("val") if isinstance(x, fx.Node) else x
    return value.ndim == 0 if isinstance(value, Tensor) else value is not None


def _keep(graph: fx.Graph, node: fx.Node) -> None:
    users = list(node.users)
    if len(users) < 2:
        return
    with graph.inserting_after(node):
        kept = graph.call_function(_operator, (node,))
    value: Tensor = node.meta["val"]
    kept.meta["val"] = _computed(value)
    for user in users:
        user.replace_input_with(node, kept)
