"""Lanes: steps whose rows are alike, where a layer is two copies and one attention call.

A step has a lane where all rows are of one length and lie at equal distances, one new token each
or nothing but new tokens: then where new K and V go, and what is attended to, are plain views in
the shape models have. They are cut for all layers at once, at the start of a step: between two
layers of a model its weights have passed through the caches, and Python is several times slower.
"""

from typing import NamedTuple

from torch import Tensor

from kvpaged_kernels.cpu.parts import attend_part, packs_group
from kvpaged_kernels.cpu.plan import DecodePlan, Uniform, cell_tokens, uniform_tokens


class Lane(NamedTuple):
    """One layer of such a step.

    - `k_in`, `v_in`: where new K and V go, `[rows, kv_heads, new, dim]`.
    - `k`, `v`: all tokens, the new ones included, `[rows, kv_heads, tokens, dim]`.
    - `causal`: all tokens are new, and see those before them.
    """

    k_in: Tensor
    v_in: Tensor
    k: Tensor
    v: Tensor
    causal: bool


def decode_lane(k_pages: Tensor, v_pages: Tensor, plan: DecodePlan) -> Lane:
    """The lane of a layer for a plan that has one (`DecodePlan.has_lane`)."""
    k, v = (cell_tokens(pages, plan.grids[0]) for pages in (k_pages, v_pages))
    return Lane(k[:, :, -1:], v[:, :, -1:], k, v, causal=False)


def prefill_lane(k_pages: Tensor, v_pages: Tensor, uniform: Uniform) -> Lane:
    """The lane of a layer for rows that are nothing but new tokens."""
    k, v = (uniform_tokens(pages, uniform) for pages in (k_pages, v_pages))
    return Lane(k, v, k, v, causal=True)


def fits_lane(lane: Lane, k: Tensor, v: Tensor) -> bool:
    """Whether new K and V, `[rows, kv_heads, new, dim]`, plainly have the lane's shape and
    dtype.
    """
    return (
        k.shape == lane.k_in.shape
        and v.shape == lane.v_in.shape
        and k.dtype == v.dtype == lane.k_in.dtype
    )


def write_lane(lane: Lane, k: Tensor, v: Tensor) -> None:
    """Put new K and V where they go."""
    lane.k_in.copy_(k)
    lane.v_in.copy_(v)


def attend_lane(q: Tensor, lane: Lane, scale: float) -> Tensor:
    """Attention of the new tokens over all, without soft cap and sinks.

    - `q`: `[rows, q_heads, new, k_dim]`. Returns `[rows, q_heads, new, v_dim]`.

    In prefill the flash kernel shares a KV head among its group by itself; a single query a row has
    its group packed into the query length where that is faster (`parts.packs_group`).
    """
    if lane.causal or not packs_group(q.dtype):
        return attend_part(q, lane.k, lane.v, scale=scale, causal=lane.causal)[0]
    packed = q.squeeze(2).unflatten(1, (lane.k.shape[1], -1))
    return attend_part(packed, lane.k, lane.v, scale=scale)[0].flatten(1, 2).unsqueeze(2)
