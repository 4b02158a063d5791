"""Moving codes for known queries, against its definition."""

import itertools

import pytest
import torch
from torch import Tensor

from kvpaged_kernels.reference.moves import blocks, move_codes
from kvpaged_kernels.sealed import MOVES

TOP = 15


def some(keys: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes to nearest, their steps and errors, and what queries are like."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(dim, generator=generator) + 0.5
    x = 15 * torch.rand(keys, dim, generator=generator)
    codes = x.round().clamp(0, TOP)
    weight = torch.rand(dim, generator=generator) + 0.5
    queries = torch.stack((2 * torch.randn(dim, generator=generator), weight))
    return codes, scale, (codes - x) * scale, queries


def cost(error: Tensor, query: Tensor) -> Tensor:
    found: Tensor = (error @ query[0]).square() + error.square() @ query[1]
    return found


def test_the_best_of_all_moves_is_taken():
    """Each block beside a search through everything that could be moved, one after another."""
    codes, scale, error, query = some(20, 8)
    moved, off = move_codes(codes, scale, error, query, top=TOP)
    for key in range(len(codes)):
        mine, wrong = codes[key].clone(), error[key].clone()
        for at, (block, _) in enumerate(itertools.product(blocks(8), range(MOVES))):
            so_far = torch.zeros(8)
            for earlier in blocks(8)[: at // MOVES + 1]:
                so_far[earlier] = 1
            best, choice = cost(wrong * so_far, query), None
            for channel, by in itertools.product(range(8)[block], (-1, 1)):
                if not 0 <= mine[channel] + by <= TOP:
                    continue
                tried = wrong.clone()
                tried[channel] += by * scale[channel]
                if cost(tried * so_far, query) < best - 1e-6:
                    best, choice = cost(tried * so_far, query), (channel, by)
            if choice is not None:
                mine[choice[0]] += choice[1]
                wrong[choice[0]] += choice[1] * scale[choice[0]]
        assert torch.equal(mine, moved[key]), key
        torch.testing.assert_close(wrong, off[key])


@pytest.mark.parametrize("dim", [64, 80, 256])
def test_errors_cancel_for_queries_like_these(dim):
    codes, scale, error, query = some(500, dim, seed=1)
    moved, off = move_codes(codes, scale, error, query, top=TOP)
    torch.testing.assert_close(off, error + (moved - codes) * scale)
    assert 0 <= moved.min() <= moved.max() <= TOP
    assert ((moved - codes).abs().sum(-1) <= MOVES * len(blocks(dim))).all()
    before, after = cost(error, query).mean(), cost(off, query).mean()
    assert after < 0.35 * before
    assert (off @ query[0]).square().mean() < 0.1 * (error @ query[0]).square().mean()
    assert off.square().mean() < 2 * error.square().mean()


def test_channels_without_a_query_stay():
    codes, scale, error, query = some(50, 64, seed=2)
    query[0, ::2] = 0
    moved, _ = move_codes(codes, scale, error, query, top=TOP)
    assert torch.equal(moved[:, ::2], codes[:, ::2])
    still, _ = move_codes(codes, scale, error, torch.zeros(2, 64), top=TOP)
    assert torch.equal(still, codes)


def test_all_channels_are_gone_through_once():
    for dim in (4, 64, 80, 128, 256, 320):
        seen = [channel for block in blocks(dim) for channel in range(dim)[block]]
        assert sorted(seen) == list(range(dim))
