"""Attention over one part of a history, and the exact merge of parts by log-sum-exp."""

from functools import lru_cache

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@lru_cache(maxsize=1)
def groups_are_native() -> bool:
    """Whether this torch's flash kernel serves several query heads a KV head by itself."""
    q, kv = torch.arange(8.0).view(1, 2, 1, 4), torch.arange(12.0).view(1, 1, 3, 4)
    shared = kv.expand(1, 2, 3, 4)
    expected = _flash(q, shared, shared)[0]
    try:
        found = _flash(q, kv, kv)[0]
    except RuntimeError:
        return False
    return found.shape == expected.shape and torch.allclose(found, expected)


@lru_cache(maxsize=1)
def _has_wide_halves() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def packs_group(dtype: torch.dtype) -> bool:
    """Whether one query a row is faster with its group packed into the query length.

    It is in fp32, and in half precision but where matrix tiles (AMX) make up for single rows: there
    the flash kernel's own sharing of a KV head is up to a fifth faster, elsewhere it was eight
    times slower (docs/log.md).
    """
    return dtype == torch.float32 or not _has_wide_halves()


def attend_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of `q` over the tokens of one part alone.

    - `q`: `[batch, heads, queries, k_dim]`; `k`, `v`: `[batch, kv_heads, tokens, dim]`, any strides
      with last stride 1; `heads` is a multiple of `kv_heads`, a group shares its KV head.
    - `bias`: additive mask of `q`'s dtype, `[batch or 1, 1, queries or 1, tokens]`.
    - `causal`: query `i` sees tokens `0..i` (aligned at the top left).

    Returns the output `[batch, heads, queries, v_dim]` (`q`'s dtype; fp32 where the general path
    ran) and the log-sum-exp fp32 `[batch, heads, queries]`. Where a row sees nothing, both are
    meaningless and the caller discards them.
    """
    if softcap is not None or k.shape[-1] != v.shape[-1]:
        return attend_general(q, k, v, scale, softcap, bias, causal)
    if q.shape[1] != k.shape[1] and not groups_are_native():
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if bias is not None:
        bias = bias.expand(q.shape[0], 1, q.shape[2], -1)
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return out, lse


def attend_general(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The same in plain fp32 matrix products: soft caps, and V narrower than K.

    A KV head at a time: over all at once the strides of pages would make the products copy K and V.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, tokens = k.shape[1:3]
    grouped = (q.float() * scale).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    lines = grouped.shape[2]
    scores = torch.empty(batch, kv_heads, lines, tokens)
    for head in range(kv_heads):
        torch.bmm(grouped[:, head], k[:, head].float().transpose(1, 2), out=scores[:, head])
    scores = scores.view(batch, heads, queries, tokens)
    if softcap is not None:
        scores = torch.tanh_(scores.div_(softcap)).mul_(softcap)
    if bias is not None:
        scores += bias
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        scores.masked_fill_(hidden, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp_(scores.sub_(lse.unsqueeze(-1))).view(batch, kv_heads, lines, tokens)
    out = torch.empty(batch, kv_heads, lines, v.shape[3])
    for head in range(kv_heads):
        torch.bmm(weights[:, head], v[:, head].float(), out=out[:, head])
    return out.view(batch, heads, queries, -1), lse


def merge_rows(
    rows: int, outs: list[Tensor], lses: list[Tensor], owners: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Merge parts into rows: part `p` belongs to row `owner[p]`.

    - `outs`: each `[parts, heads, queries, dim]`; `lses`: each `[parts, heads, queries]`;
      `owners`: each int64 `[parts]`.

    Returns fp32 `[rows, heads, queries, dim]` (zeros for a row without parts) and the log-sum-exp
    of each row over all its parts (-inf without). With `m` the greatest `lse` of a row:
    `out = sum exp(lse_p - m) out_p / sum exp(lse_p - m)`.
    """
    out, lse, owner = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses, owners))
    shape = (rows, *lse.shape[1:])
    place = owner.view(-1, 1, 1).expand_as(lse)
    most = torch.full(shape, -torch.inf).scatter_reduce_(0, place, lse, "amax")
    weight = torch.exp(lse - most[owner])
    total = torch.zeros(shape).index_add_(0, owner, weight)
    merged = torch.zeros(rows, *out.shape[1:])
    merged.index_add_(0, owner, out.float().mul_(weight.unsqueeze(-1)))
    merged.div_(total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1))
    return merged, most + total.log()


def merge_pair(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two parts of the same queries (same shapes): fp32 output and log-sum-exp."""
    lse = torch.logaddexp(a[1], b[1])
    left, right = (torch.exp(x[1] - lse).unsqueeze(-1) for x in (a, b))
    return a[0].float() * left + b[0].float() * right, lse


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Scale an output by the share its tokens have beside the sinks in the softmax denominator.

    - `out`: `[..., dim]`, `lse` and `sinks` broadcastable to its leading dimensions.

    `exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink)`.
    """
    return out * torch.sigmoid(lse - sinks.float()).unsqueeze(-1)
