"""Choosing tokens for all rows of a step at once, on the device, by numbers of each row's own."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CANDIDATES = 1024
"""On a CPU a row's most probable tokens are looked at first; all only where they don't reach
`top_p`.
"""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def uniforms(seeds: npt.NDArray[np.uint64], places: npt.NDArray[np.int64]) -> npt.NDArray:
    """The number in [0, 1) that each row's token is drawn by, float32 `[rows]`: of its seed and of
    the token's place in the reply alone (SplitMix64; Steele, Lea and Flood, OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        x = _scramble(seeds) + (places.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        x = _scramble(x)
    return ((x >> np.uint64(40)) * 2.0**-24).astype(np.float32)


def _scramble(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    scrambled: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return scrambled


def greedy(scores: Tensor) -> Tensor:
    """The token of the highest score of each row (`[rows, vocabulary]`), the first of equal ones:
    int64 `[rows]`. On a CPU `argmax` takes six times as long in half precision.
    """
    if scores.device.type == "cpu":
        return scores.max(-1).indices
    return scores.argmax(-1)


def draw(
    scores: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    uniform: Tensor, filters: bool, most: int,
) -> Tensor:  # fmt: skip
    """A token for each row: the highest score where the temperature is 0, else drawn.

    The order is transformers': temperature, `top_k`, `top_p`, `min_p`.

    Args:
        scores: float32 `[rows, vocabulary]`.
        temperature, top_p, min_p, uniform: float32 `[rows]`; see `SamplingParams`, `uniforms`.
        top_k: int32 `[rows]`, 0: all.
        filters: some row has `top_k`, `top_p` or `min_p`.
        most: the greatest `top_k` if every row that filters has one, else 0: known on the host.

    Returns:
        int64 `[rows]`.
    """
    cold = temperature == 0
    scaled = scores / torch.where(cold, 1.0, temperature)[:, None]
    drawn = _by_order(scaled, uniform)
    if filters:
        chosen = _filtered(scaled, top_k, top_p, min_p, uniform, most)
        plain = (top_k == 0) & (top_p >= 1) & (min_p == 0)
        drawn = torch.where(plain, drawn, chosen)
    return torch.where(cold, greedy(scores), drawn)


def _by_order(scaled: Tensor, uniform: Tensor) -> Tensor:
    """The token whose interval of the cumulative distribution, in the order of ids, has
    `uniform`.
    """
    sums = scaled.softmax(-1, dtype=torch.float64).cumsum(-1)
    return _pick(sums, uniform)


def _pick(sums: Tensor, uniform: Tensor) -> Tensor:
    """The first place where the running sum exceeds `uniform` of the whole."""
    aim = (uniform.double() * sums[:, -1])[:, None]
    place = torch.searchsorted(sums, aim, right=True).squeeze(1)
    last = (sums < sums[:, -1:]).sum(-1)  # the last place with any probability
    return torch.minimum(place, last)


def _filtered(
    scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor, most: int
) -> Tensor:
    width = scaled.shape[1]
    count = min(most or (CANDIDATES if scaled.device.type == "cpu" else width), width)
    values, ids = scaled.topk(count)
    if not most and count < width:
        total = scaled.double().logsumexp(-1, keepdim=True)
        reached = (values.double() - total).exp().sum(-1)
        short = (top_k == 0) & ((top_p > reached) | (min_p > 0))
        if bool((short | (top_k > count)).any()):
            values, ids = scaled.sort(descending=True)
    place = torch.arange(values.shape[1], device=values.device)
    limit = torch.where(top_k == 0, width, top_k)[:, None]
    values = values.masked_fill(place >= limit, -torch.inf)
    # Of rows without top_k the mass beyond the candidates counts too.
    whole = scaled.double().logsumexp(-1, keepdim=True)
    among = values.double().logsumexp(-1, keepdim=True)
    probabilities = (values.double() - torch.where(limit < width, among, whole)).exp()
    before = probabilities.cumsum(-1) - probabilities
    keep = (before < top_p[:, None]) & (values >= values[:, :1] + min_p[:, None].log())
    keep[:, 0] = True
    sums = probabilities.masked_fill(~keep, 0).cumsum(-1)
    return ids.gather(1, _pick(sums, uniform)[:, None]).squeeze(1)


def penalise(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores with those of seen tokens moved down.

    Args:
        scores: float32 `[rows, vocabulary]`.
        seen: bool, the same shape.
        penalty: float32 `[rows]`, 1: none.
    """
    by = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * by, scores / by), scores)


def log_probabilities(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the log-probability of its token, and ids and log-probabilities of the `top`
    most probable ones.
    """
    logs = logits.float().log_softmax(-1)
    best = logs.topk(max(top, 1))
    return logs.gather(1, chosen[:, None]).squeeze(1), best.indices, best.values
