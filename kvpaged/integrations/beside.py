"""Linear layers of one input whose weights lie side by side, for one product in compiled passes.

What costs a GPU time where few tokens are multiplied is to begin and end a product, and half of an
attention layer's are too small to fill it. The weights of such layers become parts of one tensor:
the model's parameters are views of it, so that this takes no memory. In a graph that
`torch.compile` makes every layer multiplies by all of it and takes its part; `Repeated` leaves one
of these products. Eager passes multiply as before.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn.functional import linear

from kvpaged.integrations.linears import siblings

_aten = torch.ops.aten
_PURE = {
    _aten.mm.default, _aten.addmm.default, _aten.permute.default, _aten.t.default,
    _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
    _aten.sym_size.int,
}  # fmt: skip
"""What a linear layer is made of in a graph: equal arguments, equal results."""


class Repeated(CustomGraphPass):
    """For inductor's `post_grad_custom_pre_pass`: a product that is there already is not computed
    again.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Change a graph."""
        seen: dict[Any, fx.Node] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in _PURE or node.kwargs:
                continue
            key = node.target, _hashable(node.args)
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)

    def uuid(self) -> bytes:
        """What a graph made with it depends on."""
        return bytes(get_hash_for_files((str(Path(__file__)),)))


def _hashable(args: Any) -> Any:
    return tuple(map(_hashable, args)) if isinstance(args, list | tuple) else args


class _Forward:
    """What stands in for the `forward` of a layer: rows `start` to `stop` of `weight` are its own.

    `weight` is a parameter, though none of the model's, because `torch.compile` takes the sizes of
    other tensors for variables.
    """

    __slots__ = ("bias", "module", "start", "stop", "weight")

    def __init__(
        self, module: nn.Linear, weight: nn.Parameter, bias: nn.Parameter | None, start: int
    ) -> None:
        self.module, self.weight, self.bias = module, weight, bias
        self.start, self.stop = start, start + module.out_features

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return linear(x, self.weight, self.bias)[..., self.start : self.stop]
        return linear(x, self.module.weight, self.module.bias)


class _Bunch(NamedTuple):
    """Layers of one input.

    Attributes:
        modules: those.
        weight, bias: of all, one after another.
    """

    modules: list[nn.Linear]
    weight: nn.Parameter
    bias: nn.Parameter | None


class LinearsBeside:
    """The linear layers of a model that have a common input, their weights side by side.

    It may be used while the model is; what is written to a parameter in place is written to the
    common tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: some of its layers get another `forward`, and their parameters other memory.
        """
        self._bunches: list[_Bunch] = []
        uses: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        try:
            for modules in siblings(model):
                if all(_can_join(m, uses) for m in modules) and _are_alike(modules):
                    self._join(modules)
        except BaseException:
            self.release()
            raise

    def __len__(self) -> int:
        return sum(len(bunch.modules) for bunch in self._bunches)

    def _join(self, modules: list[nn.Linear]) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            weight = _one([module.weight for module in modules])
            biases = [module.bias for module in modules if module.bias is not None]
            bias = _one(biases) if biases else None
        bunch = _Bunch(modules, weight, bias)
        start = 0
        for module in modules:
            module.forward = _Forward(module, weight, bias, start)  # type: ignore[method-assign,assignment]
            start += module.out_features
        for parts in _parts(bunch):
            for mine, part in parts:
                mine.data = part
        self._bunches.append(bunch)

    def refresh(self) -> int:
        """Lay side by side again what has other memory since; returns how many layers that were.

        A layer that has become another kind of layer is given up, with those beside it.
        """
        changed = 0
        for bunch in list(self._bunches):
            if not all(map(_is_as_it_was, bunch.modules)) or not _fits(bunch):
                self._bunches.remove(bunch)
                _give_up(bunch)
                changed += len(bunch.modules)
                continue
            moved = [
                [(mine, part) for mine, part in parts if mine.data_ptr() != part.data_ptr()]
                for parts in _parts(bunch)
            ]
            changed += sum(map(bool, moved))
            pairs = [pair for some in moved for pair in some]
            values = [mine.detach().clone() for mine, _ in pairs]  # it may lie in another's place
            for (mine, part), value in zip(pairs, values, strict=True):
                with torch.no_grad():
                    part.copy_(value)
                mine.data = part
        return changed

    def release(self) -> None:
        """Give the layers back their own `forward`, and memory of their own."""
        while self._bunches:  # one by one: each common tensor can go before the next is copied
            _give_up(self._bunches.pop())


def _one(tensors: list[Any]) -> nn.Parameter:
    return nn.Parameter(torch.cat([x.detach() for x in tensors]), requires_grad=False)


def _parts(bunch: _Bunch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each layer its parameters, with their places in the common tensors."""
    start = 0
    for module in bunch.modules:
        stop = start + module.out_features
        parts: list[tuple[Tensor, Tensor]] = [(module.weight, bunch.weight.data[start:stop])]
        if bunch.bias is not None:
            parts.append((module.bias, bunch.bias.data[start:stop]))
        yield parts
        start = stop


def _give_up(bunch: _Bunch) -> None:
    for module in bunch.modules:
        if isinstance(vars(module).get("forward"), _Forward):
            del module.forward
        for mine in (module.weight, module.bias):
            if mine is not None and _is_part(mine, bunch):
                mine.data = mine.data.clone()


def _is_part(tensor: Tensor, bunch: _Bunch) -> bool:
    wholes = [whole for whole in (bunch.weight, bunch.bias) if whole is not None]
    return any(
        tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        for whole in wholes
    )


def _is_as_it_was(module: nn.Linear) -> bool:
    return type(module) is nn.Linear and isinstance(vars(module).get("forward"), _Forward)


def _fits(bunch: _Bunch) -> bool:
    """Whether the layers' tensors can still be parts of the common ones."""
    first = bunch.modules[0]
    return (
        _are_alike(bunch.modules)
        and (first.bias is None) == (bunch.bias is None)
        and first.weight.dtype == bunch.weight.dtype
        and first.weight.device == bunch.weight.device
        and first.weight.shape[1] == bunch.weight.shape[1]
        and sum(module.weight.shape[0] for module in bunch.modules) == bunch.weight.shape[0]
        and all(module.weight.shape[0] == module.out_features for module in bunch.modules)
    )


def _are_alike(modules: list[nn.Linear]) -> bool:
    """Whether tensors of these layers can be parts of one."""
    facts = {
        (type(m.weight), m.weight.dtype, m.weight.device, m.weight.shape[1], m.bias is None)
        for m in modules
    }
    return len(facts) == 1


def _can_join(module: nn.Linear, uses: dict[int, int]) -> bool:
    """Whether a layer's tensors may get other memory: plain ones that no other layer has."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    tensors = [x for x in (module.weight, module.bias) if x is not None]
    return all(
        type(x) is nn.Parameter
        and uses[id(x)] == 1
        and x.is_contiguous()
        and not x.is_inference()
        and x.untyped_storage().nbytes() == x.nbytes
        for x in tensors
    )
