"""What makes the bytes of a model's pages valid: its weights as they are, adapters, config.

Three questions, the dear one rarely asked:

    namespace     a digest of every tensor's bytes, of the config and of the adapters in use: the
                  same in every process; a second a gigabyte on one core
    changed?      whether any tensor is another one or was written to, an adapter was switched, or a
                  hook came: some hundred microseconds, when a session begins and before pages are
                  published
    glance        whether the modules have the same tensors and no hooks: some ten microseconds, in
                  each pass, for what is put in for one pass only leaves no trace later

A tensor's digest is kept as long as the tensor is the same and was not written to, so switching
adapters digests nothing anew. torch counts most writes to a tensor. It does not count those of
fused optimizers, which are seen as the steps they are; nor those through `tensor.data` and to
tensors made in inference mode, which show in a sample of each tensor's values unless they are to a
few: after such, and after changes that are neither in tensors nor in adapters, `refresh()`.
"""

import hashlib
import json
import logging
import operator
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from kvpaged.errors import UnsupportedModelError
from kvpaged.geometry import LayerGroup
from kvpaged.integrations.inspection import Look, Place, digest_tensors, joined, look, loose, sample

NOT_BYTES = {
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures",
    "attn_implementation", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "eos_token_id", "id2label", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "transformers_version", "use_cache",
}  # fmt: skip
"""Entries of a config that no key or value depends on."""

_training = operator.attrgetter("training")
_log = logging.getLogger("kvpaged")


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


class Standing(NamedTuple):
    """What a model's pages are valid for now.

    Attributes:
        epoch: grows with each change that is seen: what was computed in one epoch belongs to its
            namespace, and to no later one.
        namespace: the digest.
        private: why its pages must not serve others, or `None`.
    """

    epoch: int
    namespace: bytes
    private: str | None


class ModelIdentity:
    """The namespace of a model, and whether it is still right. May be used from any thread."""

    def __init__(self, model: nn.Module, groups: Sequence[LayerGroup], extra: bytes) -> None:
        """
        Args:
            model: the causal language model, adapters inside.
            groups: how its pages look; part of the namespace.
            extra: of the user's own: what else the bytes depend on.
        """
        self._model = model
        self._groups = tuple(groups)
        self._extra = extra
        self._lock = threading.RLock()
        self._digests: dict[str, tuple[_Seen, bytes]] = {}
        self._look = Look([], [], (), False, None)
        self._seen: list[_Seen] = []
        self._samples: list[Tensor] = []  # views of some values of each tensor
        self._values: list[Tensor] = []  # what they were when the digests were made
        self._stepped: set[int] = set()  # ids of tensors an optimizer has written to since
        self._hooks: list[dict[int, Any]] = []
        self._hook_counts: list[int] = []
        self._standing = Standing(0, b"", None)
        self._renew(look(model))
        _watch_optimizers(self)

    @property
    def standing(self) -> Standing:
        """As it was when last looked at."""
        return self._standing

    def check(self) -> Standing:
        """As it is now."""
        with self._lock:
            now = look(self._model)
            before = self._look
            same = (now.adapters, now.why, len(now.places)) == (
                before.adapters, before.why, len(before.places)
            )  # fmt: skip
            if self._stepped:
                written = {p.name for p in now.places if id(p.tensor) in self._stepped}
                self._digests = {k: v for k, v in self._digests.items() if k not in written}
                same = same and not written
                self._stepped.clear()
            if not same or not all(
                seen.is_now(place.tensor)
                for seen, place in zip(self._seen, now.places, strict=True)
            ):
                self._renew(now)
            elif not all(map(torch.equal, self._values, joined(self._samples))):
                self._digests.clear()
                self._renew(now)
            return self._standing

    def is_epoch(self, epoch: object) -> bool:
        """Whether nothing has changed since `epoch`, by a glance: see the module's docstring."""
        if self._stepped or self._look.adapted:
            return self.check().epoch == epoch
        same = all(table.get(key) is tensor for _, table, key, tensor in self._look.places)
        if not same or list(map(len, self._hooks)) != self._hook_counts:
            return self.check().epoch == epoch
        if any(map(_training, self._look.modules)) != (self._look.why is not None):
            return self.check().epoch == epoch
        return self._standing.epoch == epoch

    def refresh(self) -> None:
        """Digest everything anew; the epoch stays if nothing has changed."""
        with self._lock:
            before, known = self._standing, self._seen
            now = look(self._model)
            untouched = len(known) == len(now.places) and all(
                seen.is_now(place.tensor) for seen, place in zip(known, now.places, strict=True)
            )
            self._digests.clear()
            self._renew(now)
            if untouched and before[1:] == self._standing[1:]:
                self._standing = before

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has written to its parameters."""
        for group in optimizer.param_groups:
            self._stepped.update(map(id, group["params"]))

    def _renew(self, now: Look) -> None:
        epoch = self._standing.epoch + 1
        self._look = now
        self._hooks = [
            table for m in now.modules for table in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self._hook_counts = list(map(len, self._hooks))
        self._seen = [_Seen.of(place.tensor) for place in now.places]
        self._samples = [sample(place.tensor) for place in now.places]
        self._values = joined(self._samples)
        self._standing = Standing(epoch, b"", "its weights are being digested")
        try:
            self._standing = Standing(epoch, self._digest(now), now.why)
        except UnsupportedModelError as error:
            self._standing = Standing(epoch, b"", str(error))
            _log.warning("prefixes are not shared: %s", error)

    def _digest(self, now: Look) -> bytes:
        due: list[Place] = []
        for place in now.places:
            known = self._digests.get(place.name)
            if known is None or not known[0].is_now(place.tensor):
                due.append(place)
        for place, digest in zip(due, digest_tensors([p.tensor for p in due]), strict=True):
            self._digests[place.name] = _Seen.of(place.tensor), digest
        self._digests = {place.name: self._digests[place.name] for place in now.places}
        tensors, numbers = loose(now.modules)
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        facts = {
            "model": type(self._model).__name__,
            "config": _config_facts(self._model.config),
            "tensors": sorted(
                (p.name, list(p.tensor.shape), str(p.tensor.dtype), self._digests[p.name][1].hex())
                for p in now.places
            ),
            "loose": [digest.hex() for digest in digest_tensors(tensors)] if tensors else [],
            "numbers": repr(numbers),
            "adapters": repr(now.adapters),
            "groups": [
                (repr(replace(group.geometry, layout="page-major")), group.layers, group.window)
                for group in self._groups  # a record has the same bytes from either layout
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


# -- steps of optimizers: fused ones write without torch counting it ------------------------------

_identities: "weakref.WeakSet[ModelIdentity]" = weakref.WeakSet()


def _watch_optimizers(identity: ModelIdentity) -> None:
    if not _identities:
        global _handle  # noqa: PLW0603 (one hook for the process, for as long as it lives)
        _handle = _handle or register_optimizer_step_post_hook(_after_step)
    _identities.add(identity)


_handle: Any = None


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for identity in tuple(_identities):
        identity.note_step(optimizer)
