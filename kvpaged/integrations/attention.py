"""How a transformers model's attention comes to us: its config, two registered functions, two
hooks.

The way of one forward pass:

    forward pre-hook     a step begins: pages for the new tokens, their ids kept
    layer: update(k, v)  k and v go into pages; k comes back with a tag that names the session
    layer: attention     our function finds the tag on k and attends over the pages; without a tag
                         the model's own implementation runs, as before
    forward hook         the step's tokens count

While a model is prepared its text config names our attention, for all forward passes; masks go the
same way: a pass with one of our sessions needs none, any other gets the original
implementation's.
"""

import inspect
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpaged.errors import UnsupportedModelError, UsageError
from kvpaged.geometry import LayerGroup
from kvpaged.integrations.lengths import LengthRule
from kvpaged.integrations.probe import LayerFacts, Onlooker, ProbeCache, group_layers
from kvpaged_kernels.cpu.lane import Lane, attend_lane

NAME = "kvpaged"
TAG = "_kvpaged_session"


class ServedCache(ABC):
    """What a `past_key_values` of ours offers the hooks and the attention function."""

    @abstractmethod
    def enter(self, module: torch.nn.Module, given: dict[str, Any]) -> None:
        """Begin a step for a forward pass of `module` with these arguments, by name."""

    @abstractmethod
    def leave(self) -> None:
        """End the step: the pass returned."""

    @property
    @abstractmethod
    def preparation(self) -> "Preparation":
        """Of the model it is of."""

    @abstractmethod
    def note_attended(self, layer: int) -> None:
        """A layer's attention over its pages was computed by who had its views."""

    @abstractmethod
    def has_written(self, layer: int) -> bool:
        """Whether the running step put this layer's keys into pages."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, scale: float | None, window: int | None,
        softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention over pages: `[rows, q_heads, columns, width]` in, columns before heads out."""


class Tag(NamedTuple):
    """What `update` leaves on the keys it returns.

    `lane`, `window`: where the step has the layer's views ready (`Batch.lanes`), and the window
    they are for: then attention is one call, and the session only told of it.
    """

    session: ServedCache
    layer: int
    lane: Lane | None = None
    window: int | None = None


class PackedCache(ServedCache):
    """The same for passes over packed tokens (`kvpaged.integrations.packed`)."""

    @abstractmethod
    def attend_packed(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None,
        window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Keys and values `[1, kv_heads, tokens, width]` into pages, and attention over them."""


class PackedTag:
    """What a packed pass leaves on the keys of a layer."""

    __slots__ = ("layer", "of")

    def __init__(self, of: PackedCache, layer: int) -> None:
        self.of = of
        self.layer = layer


class Pass(NamedTuple):
    """A forward pass this thread is in: of which module, with which session of ours, if any.

    `owner`: it began the session's step; a pass of the inner model within it did not.
    """

    module: torch.nn.Module
    session: ServedCache | None
    owner: bool


class _Running(threading.local):
    """What this thread is in the middle of."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.masks: set[int | None] | None = None
        """Windows of the masks a probe saw being made; `None` outside a probe."""


_running = _Running()


class _Compiling:
    """What `torch.compile` is at, as far as we asked for it."""

    packed = False


_compiling = _Compiling()


@contextmanager
def compiling_packed() -> Iterator[None]:
    """While this lasts, what is compiled is a packed pass: it makes no masks."""
    before, _compiling.packed = _compiling.packed, True
    try:
        yield
    finally:
        _compiling.packed = before


def _session_running() -> ServedCache | None:
    return _running.passes[-1].session if _running.passes else None


# -- preparing a model ----------------------------------------------------------------------------


class Preparation:
    """A model whose attention goes through us, as long as caches of it are open.

    Invariant: while `_holders` or `_passes` is above 0 the hooks are on and the text config names
    our attention; at 0 the model is as it was found. A cache that is closed while another thread is
    in a pass lets that pass end first: half of one would attend to something else.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.original: str = self.config._attn_implementation
        self.lengths = LengthRule.of(model)
        self._holders = 0
        self._passes = 0
        self._lock = threading.RLock()
        self._handles: list[Any] = []

    @property
    def held(self) -> bool:
        """Whether a cache of the model is open."""
        return self._holders > 0

    def check_ready(self, module: torch.nn.Module) -> None:
        """Raise `UsageError` unless a pass of `module` goes through us, and computes what replies
        are made of.
        """
        if self.config._attn_implementation != NAME:
            raise UsageError(
                f"the model's attention was set to {self.config._attn_implementation!r} since "
                "for_model"
            )
        if module.training:
            raise UsageError("the model is in training mode: call model.eval() first")

    def hold(self) -> "Preparation":
        """Prepare the model, or count one more cache of it."""
        with self._lock:
            self._holders += 1
            if not self._handles:
                self._prepare()
        return self

    def _prepare(self) -> None:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        _originals[id(self.config)] = _of_type[type(self.config)] = self.original
        self.config._attn_implementation = NAME
        modules = (self.model, self.model.base_model, self.model.get_decoder())
        for module in dict.fromkeys(modules):
            self._handles += [
                module.register_forward_pre_hook(_before_forward, with_kwargs=True),
                module.register_forward_hook(_after_forward),
                module.register_forward_hook(_end_pass, always_call=True),
            ]

    def release(self) -> None:
        """One cache less; the last one restores the model."""
        with self._lock:
            self._holders -= 1
            self._restore()

    def begin_pass(self) -> None:
        """A forward pass with a session begins."""
        with self._lock:
            self._passes += 1

    def end_pass(self) -> None:
        """It is over."""
        with self._lock:
            self._passes -= 1
            self._restore()

    def _restore(self) -> None:
        """Leave the model as it was found, if nobody needs it otherwise."""
        if self._holders or self._passes or not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.config._attn_implementation == NAME:
            self.config._attn_implementation = self.original
        _originals.pop(id(self.config), None)
        _preparations.pop(id(self.model), None)


_preparations: "weakref.WeakValueDictionary[int, Preparation]" = weakref.WeakValueDictionary()
"""By the id of a model: alive as long as a cache holds it, and it the model."""

_originals: dict[int, str] = {}
"""By the id of a prepared text config: the attention implementation it had."""
_of_type: dict[type, str] = {}
"""By the type of a config that was ever prepared: the same, for copies of prepared models."""


def prepare(model: Any, page_size: int) -> tuple[Preparation, list[LayerGroup]]:
    """Route a model's attention through us and find what its layers cache.

    Returns:
        The preparation, held once (release it when done), and the layer groups.

    Raises:
        UnsupportedModelError: not a causal language model of transformers, or a layer we cannot
            serve.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(f"for_model takes a transformers model, got {type(model)}")
    if inner.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(inner).__name__} is an encoder-decoder: not served")
    if inner.training:
        raise UsageError("the model is in training mode: call model.eval() first")
    preparation = _preparations.get(id(inner)) or Preparation(inner)
    if preparation.held and preparation.config._attn_implementation != NAME:
        raise UsageError(
            f"the model's attention was set to {preparation.config._attn_implementation!r} while a "
            "cache of it is open: close that cache first"
        )
    _preparations[id(inner)] = preparation
    preparation.hold()
    try:
        groups = group_layers(_probe(inner, preparation), page_size, type(inner).__name__)
    except BaseException:
        preparation.release()
        raise
    return preparation, groups


def _probe(model: PreTrainedModel, preparation: Preparation) -> list[LayerFacts]:
    """Run one token through the model and note what each layer caches and asks of attention."""
    types = getattr(preparation.config, "layer_types", None) or ()
    if "chunked_attention" in types:
        raise UnsupportedModelError(f"{type(model).__name__} has chunked attention: not served")
    probe = ProbeCache(TAG)
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    _running.masks = set()
    try:
        with torch.no_grad():
            model(input_ids=token, past_key_values=probe, use_cache=True)
        masks = {window for window in _running.masks if window is not None}
    finally:
        _running.masks = None
    unseen = masks - {facts.window for facts in probe.facts.values()}
    if unseen:
        raise UnsupportedModelError(
            f"{type(model).__name__} masks with a window of {sorted(unseen)} that its layers do "
            "not pass on"
        )
    return list(probe.facts.values())


# -- what transformers calls ----------------------------------------------------------------------


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over pages where `key` carries our tag; the model's own implementation
    elsewhere.
    """
    tag = getattr(key, TAG, None)
    if isinstance(tag, PackedTag):
        return tag.of.attend_packed(
            tag.layer, query, key, value, scale=scaling, window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"),
        ), None  # fmt: skip
    if isinstance(tag, Tag):
        if kwargs.get("output_attentions"):
            raise UsageError("attention over pages gives no attention weights (output_attentions)")
        window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
        sinks, lane = kwargs.get("s_aux"), tag.lane
        if lane is not None and softcap is None and sinks is None and window == tag.window:
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            tag.session.note_attended(tag.layer)
            return attend_lane(query, lane, scale).transpose(1, 2), None
        return tag.session.attend(tag.layer, query, scaling, window, softcap, sinks), None
    if isinstance(tag, Onlooker):
        tag.note_attention(query, kwargs)
    session = _session_running()
    layer = getattr(module, "layer_idx", None)
    if session is not None and layer is not None and session.has_written(layer):
        raise UnsupportedModelError(
            f"{type(module).__name__} (layer {layer}) changed its keys after caching them: "
            "attention over pages would not see that"
        )
    original = _original_of(module.config)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(original, _eager_of(module))
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def _original_of(config: Any) -> str:
    """The attention implementation a config had before it was prepared."""
    original = _originals.get(id(config)) or _of_type.get(type(config))
    if original is None:
        raise UnsupportedModelError(
            f"a {type(config).__name__} names our attention and is not the text config of a "
            "prepared model"
        )
    return original


def _eager_of(module: torch.nn.Module) -> Callable[..., Any]:
    """The eager attention of the file that defines a model's attention module."""
    for base in type(module).__mro__:
        function = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if function is not None:
            eager: Callable[..., Any] = function
            return eager
    raise UnsupportedModelError(f"{type(module).__name__} has no eager attention to fall back to")


def mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """No mask for a pass with one of our sessions; the original implementation's for any other."""
    if torch.compiler.is_compiling() and _compiling.packed:
        return None
    session = _session_running()
    if session is None:
        if _running.masks is not None:
            _running.masks.add(kwargs.get("local_size"))
        return ALL_MASK_ATTENTION_FUNCTIONS[_original_of(config)](*args, config=config, **kwargs)
    if kwargs.get("use_vmap") or not kwargs.get("allow_is_causal_skip", True):
        raise UnsupportedModelError(
            f"{type(config).__name__} asks for a mask beyond causal, window and left padding: "
            "keys computed under it can't be served from pages"
        )
    return None


def _before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A pass begins, of the model given to `for_model` or of a model inside it."""
    if torch.compiler.is_compiling() and _compiling.packed:
        return
    passes = _running.passes
    if isinstance(module, PreTrainedModel) and id(module) in _preparations:
        while passes:  # what an interrupt left: nothing is around the outermost model
            _end(passes.pop())
    given = kwargs
    if args:
        given = _by_name(inspect.signature(module.forward), args, kwargs)
    past = given.get("past_key_values")
    session = past if isinstance(past, ServedCache) else None
    nested = bool(passes) and session is not None and passes[-1].session is session
    if session is not None and not nested:
        session.preparation.begin_pass()
        try:
            session.enter(module, given)
        except BaseException:
            session.preparation.end_pass()
            raise
    passes.append(Pass(module, session, owner=session is not None and not nested))


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, those the function takes by `**` too."""
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given


def _after_forward(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The pass returned: its tokens count."""
    if torch.compiler.is_compiling() and _compiling.packed:
        return
    last = _running.passes[-1] if _running.passes else None
    if last is not None and last.module is module and last.owner and last.session is not None:
        last.session.leave()


def _end_pass(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The pass is over, by return or by exception."""
    if torch.compiler.is_compiling() and _compiling.packed:
        return
    if _running.passes and _running.passes[-1].module is module:
        _end(_running.passes.pop())


def _end(ended: Pass) -> None:
    if ended.owner and ended.session is not None:
        ended.session.preparation.end_pass()
