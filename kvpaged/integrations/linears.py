"""Linear layers whose weights are kept packed for the CPU, beside the model's own.

oneDNN multiplies by weights it has laid out for the processor's caches 1.1 to 2 times as fast as by
those a model has, and does so for any number of tokens. The model's parameters stay as they are;
the packed copies are dropped with `release`, and made anew when a weight has changed.
"""

from typing import Any

import torch
from torch import Tensor, nn

_library = torch.library.Library("kvpaged", "FRAGMENT")
_library.define("packed_linear(Tensor x, int number, int width) -> Tensor")

_weights: dict[int, tuple[Tensor, Tensor | None]] = {}
"""By number: a packed weight and its bias. Such tensors can't be arguments of a compiled graph."""
_next = 0


def _packed_linear(x: Tensor, number: int, width: int) -> Tensor:
    weight, bias = _weights[number]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


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


class PackedLinears:
    """The linear layers of a model, packed.

    While it lasts, every pass of the model uses the packed weights, ours or not; results are those
    of the model but for the order of sums. It takes the bytes of the weights once more.
    """

    def __init__(self, model: nn.Module) -> None:
        self._packed: list[tuple[nn.Linear, int, tuple[int, int]]] = []
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module) and _packs(module):
                self._pack(module)

    def __len__(self) -> int:
        return len(self._packed)

    def _pack(self, module: nn.Linear) -> None:
        global _next
        number, _next = _next, _next + 1
        _weights[number] = _reorder(module)
        self._packed.append((module, number, _version(module)))
        module.forward = _Forward(number, module.weight.shape[0])  # type: ignore[method-assign,assignment]

    def refresh(self) -> int:
        """Pack anew what has changed since; returns how many layers that were."""
        changed = 0
        for i, (module, number, version) in enumerate(self._packed):
            if _version(module) != version:
                _weights[number] = _reorder(module)
                self._packed[i] = (module, number, _version(module))
                changed += 1
        return changed

    def release(self) -> None:
        """Give the layers back their own `forward`."""
        for module, number, _ in self._packed:
            vars(module).pop("forward", None)
            _weights.pop(number, None)
        self._packed.clear()


def _packs(module: nn.Linear) -> bool:
    """Whether oneDNN has a fast kernel for a layer here."""
    weight: Any = module.weight
    if type(weight) is not nn.Parameter or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(weight.dtype == torch.float32)


def _reorder(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad(), torch.inference_mode(False):
        weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)
        return weight, None if module.bias is None else module.bias.detach()


def _version(module: nn.Linear) -> tuple[int, int]:
    return module.weight.data_ptr(), module.weight._version
