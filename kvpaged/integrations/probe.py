"""What a model's layers cache, found by running one token through it rather than by reading
configs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvpaged.errors import ConfigError, UnsupportedModelError
from kvpaged.geometry import LayerGroup, PageGeometry


class Onlooker(ABC):
    """What a cache that only looks leaves on the keys of a layer; the model's own implementation
    computes attention.
    """

    __slots__ = ()

    @abstractmethod
    def note_attention(self, query: Tensor, kwargs: dict[str, Any]) -> None:
        """Told what attention gets: queries `[rows, q_heads, columns, k_width]`, and the rest."""


@dataclass(slots=True)
class LayerFacts(Onlooker):
    """What one layer handed to the cache and to attention.

    Attributes:
        layer: its number.
        kv_heads, k_width, v_width, dtype, device: of the keys and values it cached.
        window: tokens a query sees, itself included; `None`: all.
        attended: its tagged keys reached our attention function.
    """

    layer: int
    kv_heads: int
    k_width: int
    v_width: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None
    attended: bool = False

    def note_attention(self, query: Tensor, kwargs: dict[str, Any]) -> None:
        """Note what attention is asked for.

        Raises:
            UnsupportedModelError: something that attention over pages does not compute.
        """
        if kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
            raise UnsupportedModelError(
                f"layer {self.layer} attends with a position bias or without a causal mask"
            )
        if query.shape[1] % self.kv_heads or query.shape[3] != self.k_width:
            raise UnsupportedModelError(
                f"layer {self.layer} has queries {tuple(query.shape)} for {self.kv_heads} kv heads "
                f"of width {self.k_width}"
            )
        self.window = kwargs.get("sliding_window")
        self.attended = True


class ProbeCache(Cache):
    """A cache for one token of one row: hands keys back tagged with the facts of their layer."""

    def __init__(self, tag: str) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.facts: dict[int, LayerFacts] = {}
        self._tag = tag

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note what layer `layer_idx` caches."""
        facts = LayerFacts(
            layer=layer_idx,
            kv_heads=key_states.shape[1],
            k_width=key_states.shape[3],
            v_width=value_states.shape[3],
            dtype=key_states.dtype,
            device=key_states.device,
        )
        self.facts[layer_idx] = facts
        setattr(key_states, self._tag, facts)
        return key_states, value_states


def group_layers(facts: list[LayerFacts], page_size: int, model: str) -> list[LayerGroup]:
    """Layers that share a geometry, a window and a device, as groups, in order of their first
    layer.

    Raises:
        UnsupportedModelError: nothing is cached, a layer's keys do not feed attention directly, or
            they do not fit a page.
    """
    if not facts:
        raise UnsupportedModelError(f"{model} cached no keys and values: nothing to serve")
    apart = [f.layer for f in facts if not f.attended]
    if apart:
        raise UnsupportedModelError(
            f"{model}: what layers {apart[:8]} cache does not feed attention directly "
            "(latents that are expanded after the cache, for one): not served"
        )
    groups: dict[tuple[Any, ...], list[LayerFacts]] = {}
    for f in facts:
        key = (f.kv_heads, f.k_width, f.v_width, f.dtype, f.device, f.window)
        groups.setdefault(key, []).append(f)
    made = []
    for alike in groups.values():
        first = alike[0]
        try:
            geometry = PageGeometry(
                layers=len(alike),
                kv_heads=first.kv_heads,
                head_dim=first.k_width,
                v_dim=first.v_width,
                page_size=page_size,
                dtype=first.dtype,
            )
        except ConfigError as error:
            raise UnsupportedModelError(f"{model}, layer {first.layer}: {error}") from error
        layers = tuple(f.layer for f in alike)
        made.append(
            LayerGroup(geometry=geometry, layers=layers, window=first.window, device=first.device)
        )
    return made
