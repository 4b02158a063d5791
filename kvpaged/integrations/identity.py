"""What makes the bytes of a model's pages valid: its weights as they are, adapters, config.

Two questions, one dear and one cheap:

    namespace     a digest of every tensor's bytes, of the config and of the adapters in use: the
                  same in every process; a second a gigabyte on one core
    changed?      whether any tensor is another one or was written to, an adapter was switched, or a
                  hook came: some hundred microseconds, asked when a session begins, before a page
                  is published, and in each pass of a model with adapters

A tensor's digest is kept as long as the tensor is the same and was not written to, so switching
adapters digests nothing anew. torch counts most writes; those it does not (fused optimizers, writes
through `tensor.data`, tensors made in inference mode) show in a sample of the values of each
tensor, unless they are to a few elements: after such, call `PagedKVCache.refresh()`.
"""

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvpaged.errors import UnsupportedModelError
from kvpaged.geometry import LayerGroup
from kvpaged.integrations.lengths import changes_with_length

CHUNK_BYTES = 16 << 20
"""Bytes one thread digests at a time: hashing releases the interpreter's lock."""

NOT_BYTES = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures",
    "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "eos_token_id", "id2label", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
"""Entries of a config that no key or value depends on."""

OURS = "kvpaged.integrations"

SAMPLE = 8
"""Values of each tensor that are looked at, spread over it."""


class _Seen(NamedTuple):
    """A tensor as it was: itself, where its bytes were, how often it had been written to."""

    tensor: "weakref.ref[Tensor]"
    address: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> "_Seen":
        return cls(weakref.ref(tensor), tensor.data_ptr(), _version(tensor))

    def is_now(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and self.address == tensor.data_ptr()
            and self.version == _version(tensor)
        )


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode: not counted
        return -1


class ModelIdentity:
    """The namespace of a model, and whether it is still right.

    May be used from any thread. `epoch` grows each time a change is seen: what was computed in one
    epoch belongs to its namespace, and to no later one.
    """

    def __init__(self, model: nn.Module, groups: Sequence[LayerGroup], extra: bytes) -> None:
        """
        Args:
            model: the causal language model, adapters inside.
            groups: how its pages look; part of the namespace.
            extra: of the user's own: what else the bytes depend on.

        Raises:
            UnsupportedModelError: a tensor whose bytes can't be read.
        """
        self._model = model
        self._groups = tuple(groups)
        self._extra = extra
        self._lock = threading.Lock()
        self._digests: dict[str, tuple[_Seen, bytes]] = {}
        self._seen: list[_Seen] = []
        self._samples: list[Tensor] = []
        """Views of some values of each tensor."""
        self._values: list[Tensor] = []
        """What they were when the digests were made."""
        self._others: tuple[Any, ...] = ()
        self._adapted = False
        self.epoch = 0
        self.private: str | None = None
        """Why its pages must not serve others, or `None`."""
        self.namespace = b""
        self.refresh()

    @property
    def has_adapters(self) -> bool:
        """Whether adapter layers are in the model: they may be switched between any two passes."""
        return self._adapted

    def check(self) -> int:
        """The present epoch, after a look at the model."""
        with self._lock:
            tensors, others = _look(self._model)
            same = len(tensors) == len(self._seen) and others == self._others
            if not same or not all(
                seen.is_now(tensor) for seen, (_, tensor) in zip(self._seen, tensors, strict=True)
            ):
                self._renew(tensors, others)
            elif not all(map(torch.equal, self._values, _joined(self._samples))):
                self._digests.clear()
                self._renew(tensors, others)
            return self.epoch

    def refresh(self) -> None:
        """Digest everything anew."""
        with self._lock:
            self._digests.clear()
            self._renew(*_look(self._model))

    def _renew(self, tensors: list[tuple[str, Tensor]], others: tuple[Any, ...]) -> None:
        self.epoch += 1
        self.namespace = b""  # until it is known again: should a digest fail, nothing is shared
        hooked = others[1]
        self.private = f"a forward hook is on {hooked[0][0]}" if hooked else None
        due = []
        for name, tensor in tensors:
            known = self._digests.get(name)
            if known is None or not known[0].is_now(tensor):
                due.append((name, tensor))
        for (name, tensor), digest in zip(due, digest_tensors([t for _, t in due]), strict=True):
            self._digests[name] = _Seen.of(tensor), digest
        self._digests = {name: self._digests[name] for name, _ in tensors}
        self._seen = [self._digests[name][0] for name, _ in tensors]
        self._others = others
        self._adapted = any(_is_adapter(module) for _, module in _modules("", self._model))
        self._samples = [_sample(tensor) for _, tensor in tensors]
        self._values = _joined(self._samples)
        self.namespace = self._digest(tensors, others)

    def _digest(self, tensors: list[tuple[str, Tensor]], others: tuple[Any, ...]) -> bytes:
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        facts = {
            "model": type(self._model).__name__,
            "config": _config_facts(self._model.config),
            "tensors": sorted(
                (name, list(t.shape), str(t.dtype), self._digests[name][1].hex())
                for name, t in tensors
            ),
            "adapters": repr(others[0]),
            "groups": [
                (repr(group.geometry), group.layers, group.window) for group in self._groups
            ],
            "rank": torch.distributed.get_rank() if parallel else 0,
            "extra": self._extra.hex(),
        }
        text = json.dumps(facts, sort_keys=True, default=repr)
        return hashlib.blake2b(text.encode(), digest_size=32).digest()


def _config_facts(config: Any) -> Any:
    """A config without what says nothing about keys and values, inner configs too."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items() if k not in NOT_BYTES}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(config.to_dict())


# -- a look at a model ----------------------------------------------------------------------------


def _look(model: nn.Module) -> tuple[list[tuple[str, Tensor]], tuple[Any, ...]]:
    """The tensors a forward pass reads, by name, and what else it depends on: the adapters in use,
    and hooks that are not ours.
    """
    tensors: list[tuple[str, Tensor]] = []
    adapters: list[Any] = []
    hooks: list[tuple[str, int]] = [
        ("every module", number)
        for table in (nn.modules.module._global_forward_hooks,
                      nn.modules.module._global_forward_pre_hooks)
        for number in table
    ]  # fmt: skip
    for name, module in _modules("", model):
        for kept in (module._parameters, module._buffers):
            for key, tensor in kept.items():
                if tensor is not None and not _moves(module, key):
                    # A layer that was wrapped to take adapters is still the layer it was.
                    tensors.append(((name + key).replace(".base_layer.", "."), tensor))
        if module._forward_hooks or module._forward_pre_hooks:
            for table in (module._forward_hooks, module._forward_pre_hooks):
                hooks += [
                    (name.rstrip(".") or "the model", number)
                    for number, hook in table.items()
                    if not getattr(hook, "__module__", "").startswith(OURS)
                ]
        if _is_adapter(module) and (state := _adapter_state(module)) is not None:
            adapters.append((name, *state))
    return tensors, (tuple(adapters), tuple(hooks))


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


def _sample(tensor: Tensor) -> Tensor:
    """Some values of a tensor, as a view of it as far as it has one: integers of their width."""
    values = tensor.detach()
    flat = values.view(-1) if values.is_contiguous() else values.reshape(-1)[:0]
    if flat.dtype.is_complex or not flat.numel():
        flat = flat[:0].to(torch.uint8)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = flat.view(kinds[flat.element_size()])  # a NaN is not equal to itself
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]


def _joined(samples: list[Tensor]) -> list[Tensor]:
    """Samples by device and width, on the host."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for sample in samples:
        alike.setdefault((sample.device, sample.dtype), []).append(sample)
    with torch.no_grad():
        return [torch.cat(some).cpu() for some in alike.values()]


# -- bytes ----------------------------------------------------------------------------------------


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
            f"nothing can be shared by prefix ({error}); prefix_sharing=False does without"
        ) from error
