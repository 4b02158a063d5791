"""Codes of keys that are moved so that their errors cancel for most queries.

What coding does to attention is the error of scores, `q . e` for a query `q` and the error `e` of a
key. Queries of a head are much alike: about half of their square is one direction, the same for any
text. With their second moment taken as `u u' + diag(w)`, the expected squared error of a score is

    cost(e) = (u . e)**2 + sum(w * e**2)

Rounding to nearest minimises the second term only. So channels are gone through in blocks, in each
up to `MOVES` times that code is moved by one step which lowers the cost of all channels so far the
most. (The second moment in full, and codes one after another as of Frantar et al. 2022,
arXiv:2210.17323, do little better: docs/log.md.)
"""

import torch
from torch import Tensor

from kvpaged_kernels.sealed import MOVE_BLOCK, MOVES


def move_codes(
    codes: Tensor, scale: Tensor, error: Tensor, queries: Tensor, *, top: int
) -> tuple[Tensor, Tensor]:
    """Codes moved, and their errors.

    Args:
        codes: fp32 `[..., k_dim]`, 0 to `top`.
        scale: what a step of a code is; broadcasts to it, as `error` does.
        error: what the codes stand for, less the keys.
        queries: `[..., 2, k_dim]`, which broadcasts to that with `u` and `w` of the module before
            the last dimension. Where `u` is 0, codes stay.
        top: the largest code.
    """
    u, weight = queries.unbind(-2)
    shape = torch.broadcast_shapes(codes.shape, scale.shape, error.shape, u.shape)
    codes, error = codes.expand(shape).clone(), error.expand(shape).clone()
    scale, u, weight = (x.expand(shape) for x in (scale, u, weight))
    along = torch.zeros((*shape[:-1], 1), device=codes.device)
    for block in blocks(shape[-1]):
        along = along + (error[..., block] * u[..., block]).sum(-1, keepdim=True)
        for _ in range(MOVES):
            one = torch.where(along * u[..., block] > 0, -1.0, 1.0)
            step = one * scale[..., block]
            across = step * u[..., block]
            alone = weight[..., block] * step * (2 * error[..., block] + step)
            change = across * (2 * along + across) + alone
            moved = codes[..., block] + one
            impossible = (moved < 0) | (moved > top) | (u[..., block] == 0)
            least, at = change.masked_fill(impossible, torch.inf).min(-1, keepdim=True)
            taken = torch.zeros_like(change).scatter_(-1, at, (least < 0).float())
            codes[..., block] += taken * one
            error[..., block] += taken * step
            along = along + (taken * across).sum(-1, keepdim=True)
    return codes, error


def blocks(dim: int) -> list[slice]:
    """Channels that are gone through together: up to `MOVE_BLOCK` of a quarter of the width, the
    same of each quarter in turn.
    """
    quarter = dim // 4
    return [
        slice(part * quarter + start, part * quarter + min(start + MOVE_BLOCK, quarter))
        for start in range(0, quarter, MOVE_BLOCK)
        for part in range(4)
    ]
