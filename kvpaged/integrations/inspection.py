"""A look at a model: what its forward pass reads and runs, and the bytes of that."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvpaged.errors import UnsupportedModelError
from kvpaged.integrations.lengths import changes_with_length

CHUNK_BYTES = 16 << 20
"""Bytes one thread digests at a time: hashing releases the interpreter's lock."""

SAMPLE = 64
"""Values of each tensor that are looked at, spread over it."""

OURS = "kvpaged.integrations"


class Place(NamedTuple):
    """A tensor of a model: its name, and the table of its module that has it under `key`."""

    name: str
    table: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor


class Look(NamedTuple):
    """What was seen.

    Attributes:
        places: the tensors a forward pass reads.
        modules: all modules.
        adapters: what of the adapters in use is not a tensor.
        adapted: adapter layers are in the model, in use or not.
        why: what makes its pages nobody else's (a foreign hook, a module in training mode), or
            `None`.
    """

    places: list[Place]
    modules: list[nn.Module]
    adapters: tuple[Any, ...]
    adapted: bool
    why: str | None


def look(model: nn.Module) -> Look:
    """Look at a model: some hundred microseconds."""
    places: list[Place] = []
    modules: list[nn.Module] = []
    adapters: list[Any] = []
    adapted, why = False, None
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        why = "a forward hook is on every module"
    for name, module in _modules("", model):
        modules.append(module)
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None and not _moves(module, key):
                    # A layer that was wrapped to take adapters is still the layer it was.
                    known = (name + key).replace(".base_layer.", ".")
                    places.append(Place(known, table, key, tensor))
        if module._forward_hooks or module._forward_pre_hooks:
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            if any(not getattr(hook, "__module__", "").startswith(OURS) for hook in hooks):
                why = f"a forward hook is on {name.rstrip('.') or 'the model'}"
        if module.training:
            why = f"{name.rstrip('.') or 'the model'} is in training mode"
        if _is_adapter(module):
            adapted = True
            if (state := _adapter_state(module)) is not None:
                adapters.append((name, *state))
    return Look(places, modules, tuple(adapters), adapted, why)


def _modules(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and those inside it, but for adapters that are not in use."""
    stack = [(name, module)]
    while stack:
        name, module = stack.pop()
        yield name, module
        idle: dict[str, set[str]] = {}
        if _is_adapter(module):
            active = _active(module)
            for kind in ("adapter_layer_names", "other_param_names"):
                idle.update((key, active) for key in getattr(type(module), kind, ()))
        for key, child in module._modules.items():
            if child is None:
                continue
            if key in idle:
                stack += [
                    (f"{name}{key}.{adapter}.", layer)
                    for adapter, layer in child._modules.items()
                    if layer is not None and adapter in idle[key]
                ]
                if child._parameters or child._buffers:  # adapters that are parameters, not layers
                    stack.append((f"{name}{key}.", child))
            else:
                stack.append((f"{name}{key}.", child))


def _is_adapter(module: nn.Module) -> bool:
    """Whether a module has adapters to switch: PEFT's layers, and its wrappers of whole modules."""
    return hasattr(type(module), "adapter_layer_names") or "_active_adapter" in vars(module)


def _active(module: nn.Module) -> set[str]:
    """The adapters of a layer that its output depends on."""
    if getattr(module, "disable_adapters", False):
        return set()
    active = getattr(module, "active_adapters", ())
    return {active} if isinstance(active, str) else set(active)


def _adapter_state(module: nn.Module) -> tuple[Any, ...] | None:
    """What of the adapters in use on a layer is not a tensor; `None`: it has none of them."""
    active = _active(module)
    kinds = getattr(type(module), "adapter_layer_names", ())
    if kinds:
        holders = [module._modules.get(kind) for kind in kinds]
        here = [holder for holder in holders if holder is not None]
        active &= {name for h in here for name in (*h._modules, *h._parameters, *h._buffers)}
    merged = tuple(getattr(module, "merged_adapters", ()))
    if not active and not merged:
        return None
    scaling = getattr(module, "scaling", {})
    scales = scaling if isinstance(scaling, dict) else {}
    return tuple(sorted((name, scales.get(name)) for name in active)), merged


def _moves(module: nn.Module, buffer: str) -> bool:
    """Whether a buffer is rewritten by the forward pass itself: angles that follow the length."""
    return "inv_freq" in buffer and changes_with_length(module)


# -- values and bytes -----------------------------------------------------------------------------


def sample(tensor: Tensor) -> Tensor:
    """Some values of a tensor, spread over it, as a view: integers of their width, for a NaN is not
    equal to itself.
    """
    values = tensor.detach()
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds.get(values.element_size())
    plain = values.layout is torch.strided and not values.is_quantized
    if kind is None or not plain or not values.numel() or values.device.type == "meta":
        return torch.empty(0, dtype=torch.int8)
    if not _is_dense(values):
        return values[(0,) * (values.ndim - 1)].view(kind)[:SAMPLE]
    count = values.numel()
    step = max(1, count // SAMPLE)
    while any(math.gcd(step, size) > 1 for size in values.shape):
        step -= 1  # else it would look at a few rows or columns only
    places = min(SAMPLE, -(-count // step))
    return values.as_strided((places,), (step,), values.storage_offset()).view(kind)


def joined(samples: Sequence[Tensor]) -> list[Tensor]:
    """Samples by device and width, on the host."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for values in samples:
        alike.setdefault((values.device, values.dtype), []).append(values)
    with torch.no_grad():
        return [torch.cat(some).cpu() for some in alike.values()]


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its part of the storage, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def loose(modules: Sequence[nn.Module]) -> tuple[list[Tensor], list[Any]]:
    """What modules keep elsewhere than in parameters and buffers: tensors of quantised weights and
    the like, and their numbers.

    Raises:
        UnsupportedModelError: something that can't be digested.
    """
    tensors: list[Tensor] = []
    facts: list[Any] = []
    for module in modules:
        if not changes_with_length(module):
            numbers = [(k, v) for k, v in vars(module).items() if isinstance(v, int | float)]
            facts.append((type(module).__name__, sorted(n for n in numbers if n[0] != "training")))
        if type(module)._save_to_state_dict is not nn.Module._save_to_state_dict:
            saved: dict[str, Any] = {}
            module._save_to_state_dict(saved, "", True)
            facts += [(key, _take_apart(value, tensors)) for key, value in sorted(saved.items())]
    return tensors, facts


def _take_apart(value: Any, tensors: list[Tensor]) -> Any:
    """Put the tensors inside a value into `tensors`; returns what else it is."""
    if isinstance(value, Tensor):
        if value.is_quantized:
            tensors.append(value.int_repr())
            return repr(value.qscheme()), repr(torch.dequantize(value.flatten()[:1]))
        tensors.append(value)
        return str(value.dtype)
    if isinstance(value, list | tuple):
        return [_take_apart(each, tensors) for each in value]
    if isinstance(value, dict):
        return [(str(k), _take_apart(each, tensors)) for k, each in value.items()]
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return repr(value)
    raise UnsupportedModelError(f"a module keeps a {type(value).__name__} that can't be digested")


def digest_tensors(tensors: Sequence[Tensor]) -> list[bytes]:
    """The SHA-256 of the SHA-256 of each 16 MiB of each tensor's bytes, computed by threads.

    SHA-256 because processors have instructions for it: 1.5 GB/s a core where BLAKE2b makes 0.8.

    Raises:
        UnsupportedModelError: a tensor has no bytes to read.
    """
    flats = [_flat_bytes(tensor) for tensor in tensors]
    pieces = [
        (number, flat[start : start + CHUNK_BYTES])
        for number, flat in enumerate(flats)
        for start in range(0, max(flat.numel(), 1), CHUNK_BYTES)
    ]
    totals = [hashlib.sha256() for _ in tensors]
    if not pieces:
        return []
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 16)) as pool:
        digests = pool.map(lambda piece: hashlib.sha256(piece.cpu().numpy()).digest(),
                           [piece for _, piece in pieces])  # fmt: skip
        for (number, _), digest in zip(pieces, digests, strict=True):
            totals[number].update(digest)
    return [total.digest() for total in totals]


def _flat_bytes(tensor: Tensor) -> Tensor:
    try:
        if tensor.device.type == "meta":
            raise RuntimeError("it is on the meta device")
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"the bytes of a weight of {tuple(tensor.shape)} {tensor.dtype} can't be read, so "
            f"nothing is shared by prefix ({error})"
        ) from error
