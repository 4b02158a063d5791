"""What queries of a model's layers are like: a direction, and what channels have beside it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvpaged.errors import UsageError
from kvpaged.integrations.attention import TAG, prepare
from kvpaged.integrations.probe import Onlooker


class _Moment(Onlooker):
    """The sum of `q q'` over the queries of a layer, for each KV head: fp32, `[kv_heads, k_width,
    k_width]`.
    """

    def __init__(self, kv_heads: int) -> None:
        self._kv_heads = kv_heads
        self.total: Tensor | None = None

    def note_attention(self, query: Tensor, kwargs: dict[str, Any]) -> None:
        """Add a pass's."""
        of = query.transpose(0, 1).unflatten(0, (self._kv_heads, -1)).flatten(1, 3).float()
        each = of.transpose(1, 2) @ of
        self.total = each if self.total is None else self.total + each


class _OnlookingCache(Cache):
    """A cache for a row in one pass: hands its keys back, with the layer's moment on them."""

    def __init__(self, moments: dict[int, _Moment]) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._moments = moments

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Leave the moment of layer `layer_idx`."""
        moment = self._moments.setdefault(layer_idx, _Moment(key_states.shape[1]))
        setattr(key_states, TAG, moment)
        return key_states, value_states


@torch.inference_mode()
def observe_queries(model: Any, rows: Tensor) -> dict[int, Tensor]:
    """Of a model that `for_model` serves, by layer number: fp32 `[kv_heads, 2, k_width]`, what
    `KVFormat.with_queries` takes.

    Per KV head, the second moment `M` of its query heads' queries is taken as `u u' + diag(w)`: `u`
    is the first principal component of `M` with its diagonal scaled to 1, scaled back, with its
    largest number positive, `w` what it leaves of the diagonal. So a channel may be of any unit.
    Both are divided so that the mean of `w` is 1.

    Args:
        model: a `transformers` causal LM, in eval mode.
        rows: int64 `[rows, tokens]`; a pass is made for each.

    Raises:
        UnsupportedModelError: see `for_model`.
        UsageError: that, too; or queries of a layer are not finite numbers.
    """
    preparation, _ = prepare(model, 64)
    moments: dict[int, _Moment] = {}
    try:
        for row in rows.to(model.device).split(1):
            model(row, past_key_values=_OnlookingCache(moments), logits_to_keep=1)
    finally:
        preparation.release()
    found = {}
    for layer, moment in moments.items():
        if moment.total is None or not moment.total.isfinite().all():
            raise UsageError(f"queries of layer {layer} are not finite numbers on these texts")
        found[layer] = _factor(moment.total)
    return found


def _factor(moment: Tensor) -> Tensor:
    """`u` and `w` of moments `[kv_heads, k_width, k_width]`."""
    moment = moment.double().cpu()
    diagonal = moment.diagonal(dim1=1, dim2=2)
    unit = diagonal.clamp(min=1e-300).sqrt()
    values, vectors = torch.linalg.eigh(moment / unit[:, :, None] / unit[:, None, :])
    u = vectors[:, :, -1] * values[:, -1:].clamp(min=0).sqrt() * unit
    u = u * u.gather(1, u.abs().argmax(1, keepdim=True)).sign()
    w = (diagonal - u.square()).clamp(min=0)
    mean = w.mean(1, keepdim=True).clamp(min=1e-300)
    return torch.stack((u / mean.sqrt(), w / mean), 1).float()
