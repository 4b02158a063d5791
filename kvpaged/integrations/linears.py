"""Linear layers whose weights are kept packed for the CPU, beside the model's own.

Packed means laid out for the processor's caches: by oneDNN, or for our native code, which for few
tokens is as fast as memory gives weights. The model's parameters stay as they are; the packed
copies are dropped with `release`, and made anew when a weight has changed.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kvpaged.integrations.inspection import joined, sample
from kvpaged_kernels.cpu.large_pages import LargePages
from kvpaged_kernels.cpu.native_linear import NativeLinear, fits_together, pack_together, packs

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers beside each other that models call with one input."""

MOST_ROWS = 128
"""Tokens up to which native products in half precision are faster than torch's, where those are by
tiles (AMX) or ours have no instruction for them (fp16). Elsewhere ours take as long or less for any
number.
"""

_library = torch.library.Library("kvpaged", "FRAGMENT")
_library.define(
    "packed_linear(Tensor x, int number, int width) -> Tensor", tags=(torch.Tag.flexible_layout,)
)

_products: dict[int, Callable[[Tensor], Tensor]] = {}
"""By number: packed weights can't be arguments of a compiled graph."""
_numbers = itertools.count()

together: dict[tuple[int, ...], tuple[int, int]] = {}
"""By the numbers of layers of one input: the number and the width of all their outputs at once."""


def _packed_linear(x: Tensor, number: int, width: int) -> Tensor:
    return _products[number](x).contiguous()  # as the operator's fake says


_library.impl("packed_linear", _packed_linear, "CPU")
torch.library.register_fake(
    "kvpaged::packed_linear",
    lambda x, number, width: x.new_empty((*x.shape[:-1], width)),
    lib=_library,
)


class _Forward:
    """What stands in for the `forward` of a linear layer."""

    __slots__ = ("number", "width")

    def __init__(self, number: int, width: int) -> None:
        self.number, self.width = number, width

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.kvpaged.packed_linear(x, self.number, self.width)
        return out


class _Bunch(NamedTuple):
    """Layers packed together.

    Attributes:
        modules: those.
        numbers: of each; one more if there is a product of all.
        facts: which tensors they had, as `_facts` tells.
        samples: views of some of their weights' values, and `values` what those were.
    """

    modules: list[nn.Linear]
    numbers: tuple[int, ...]
    facts: list[tuple[int, ...]]
    samples: list[Tensor]
    values: list[Tensor]


class PackedLinears:
    """The linear layers of a model, packed; `native`: for native code.

    While it lasts, every pass of the model uses the packed weights, ours or not; results are those
    of the model but for the order of sums. It takes the bytes of the weights once more.
    """

    def __init__(self, model: nn.Module, *, native: bool = False) -> None:
        """
        Args:
            model: its layers get another `forward`.
            native: by native code; where torch has found no kernel for a dtype, too.

        Raises:
            NativeError: there can be no native code here.
        """
        self.native = native
        self._bunches: list[_Bunch] = []
        self._pages = LargePages()
        try:
            for modules in _bunches(model, native):
                self._pack(modules)
        except BaseException:
            self.release()
            raise

    def cover(self, model: nn.Module) -> bool:
        """Whether they are nearly all that a model multiplies by: nine in ten of its matrices'
        elements, those that are looked up in (embeddings) apart.
        """
        packed = {id(m.weight): m.weight.numel() for bunch in self._bunches for m in bunch.modules}
        found = dict(packed)
        for module in model.modules():
            if not isinstance(module, nn.Embedding):
                matrices = (x for x in module.parameters(recurse=False) if x.ndim > 1)
                found |= {id(x): x.numel() for x in matrices}
        return sum(packed.values()) >= 0.9 * sum(found.values())

    def __len__(self) -> int:
        return sum(len(bunch.modules) for bunch in self._bunches)

    def _pack(self, modules: list[nn.Linear]) -> None:
        products = self._products(modules)
        numbers = tuple(itertools.islice(_numbers, len(products)))
        _products.update(zip(numbers, products, strict=True))
        if len(modules) > 1:
            width = sum(module.out_features for module in modules)
            together[numbers[:-1]] = numbers[-1], width
        self._bunches.append(_noted(modules, numbers))
        for module, number in zip(modules, numbers, strict=False):
            module.forward = _Forward(number, module.weight.shape[0])  # type: ignore[method-assign,assignment]

    def _products(self, modules: list[nn.Linear]) -> list[Callable[[Tensor], Tensor]]:
        if not self.native:
            return [_one_dnn(module) for module in modules]
        pairs = [_tensors(module) for module in modules]
        packed = pack_together(pairs, self._pages)
        of = [[pair] for pair in pairs] + ([pairs] if len(pairs) > 1 else [])
        return [_Native(product, layers) for product, layers in zip(packed, of, strict=True)]

    def refresh(self) -> int:
        """Pack anew if anything has changed since; returns how many layers have.

        Fused optimizers write without torch counting it, so some values are compared too. All are
        packed anew, since one that stays would hold on to the memory of those beside it.
        """
        changed = sum(len(bunch.modules) for bunch in self._bunches if _has_changed(bunch))
        if not all(_is_packable(m, self.native) for b in self._bunches for m in b.modules):
            self.release()  # a layer has become another kind: the model's own weights serve
        elif changed:
            self._pages = LargePages()
            for i, bunch in enumerate(self._bunches):
                _products.update(zip(bunch.numbers, self._products(bunch.modules), strict=True))
                self._bunches[i] = _noted(bunch.modules, bunch.numbers)
        return changed

    def release(self) -> None:
        """Give the layers back their own `forward`."""
        for bunch in self._bunches:
            for module in bunch.modules:
                vars(module).pop("forward", None)
            for number in bunch.numbers:
                _products.pop(number, None)
            together.pop(bunch.numbers[:-1], None)
        self._bunches.clear()


class _Native:
    """A native product; of many rows, the model's own."""

    __slots__ = ("layers", "most", "product")

    def __init__(self, product: NativeLinear, layers: list[tuple[Tensor, Tensor | None]]) -> None:
        self.product, self.layers = product, layers
        dtype = layers[0][0].dtype
        theirs = dtype == torch.float16 or torch.cpu._is_amx_tile_supported()
        self.most = MOST_ROWS if dtype != torch.float32 and theirs and _has_kernel(dtype) else 2**62

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() <= self.most * self.product.inner:
            return self.product(x)
        outs = [linear(x, weight, bias) for weight, bias in self.layers]
        return outs[0] if len(outs) == 1 else torch.cat(outs, -1)


def _one_dnn(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = _tensors(module)
    with torch.no_grad(), torch.inference_mode(False):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


def _bunches(model: nn.Module, native: bool) -> Iterator[list[nn.Linear]]:
    """The layers that can be packed, those of one input together where that is native."""
    done: set[nn.Module] = set()
    for modules in siblings(model) if native else ():
        if all(_can_pack(m, native) for m in modules) and fits_together(
            list(map(_tensors, modules))
        ):
            done.update(modules)
            yield modules
    for module in model.modules():
        if module not in done and _can_pack(module, native):
            assert isinstance(module, nn.Linear)
            yield [module]


def siblings(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Linear layers with a common input, by what models call them."""
    for parent in model.modules():
        for names in SIBLINGS:
            modules = [getattr(parent, name, None) for name in names]
            if all(isinstance(module, nn.Linear) for module in modules):
                yield modules  # type: ignore[misc]


def _can_pack(module: Any, native: bool) -> bool:
    """Whether a layer is as torch has it, and there is a fast kernel for it here."""
    return "forward" not in vars(module) and _is_packable(module, native)


def _is_packable(module: Any, native: bool) -> bool:
    if type(module) is not nn.Linear:
        return False
    weight: Any = module.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return False
    if not native:
        return _has_kernel(weight.dtype)
    halves = (torch.float32, torch.bfloat16, torch.float16)
    return weight.dtype in halves and packs(weight)


def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether oneDNN is fast for a dtype here."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(dtype == torch.float32)


def _tensors(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


def _has_changed(bunch: _Bunch) -> bool:
    same = [_facts(module) for module in bunch.modules] == bunch.facts
    return not same or not all(map(torch.equal, bunch.values, joined(bunch.samples)))


def _noted(modules: list[nn.Linear], numbers: tuple[int, ...]) -> _Bunch:
    samples = [sample(tensor) for m in modules for tensor in _tensors(m) if tensor is not None]
    return _Bunch(modules, numbers, [_facts(m) for m in modules], samples, joined(samples))


def _facts(module: nn.Linear) -> tuple[int, ...]:
    """Where a layer's tensors are and how often they were written to, as far as torch counts."""
    return tuple(
        number
        for tensor in (module.weight, module.bias)
        if tensor is not None
        for number in (tensor.data_ptr(), tensor._version)
    )
