"""Random pools of both layouts for kernel tests, the exact result, and a measure of error.

Slots that own no token hold NaN, and table entries that nothing may follow hold addresses far
outside the pool: reading one shows in the result, or ends the process.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("page-major", "layer-major")
UNIT_BYTES = 256
LAYERS = 2
GARBAGE = (-(2**31), 2**31 - 1, 2**29)


class Pool(NamedTuple):
    """One layer's pages of a pool, with the memory all of it lies in.

    `entries[p]` is what a block table holds for page p.
    """

    memory: Tensor
    k_pages: Tensor
    v_pages: Tensor
    entries: Tensor


def make_pool(
    layout: str,
    pages: int,
    *,
    kv_heads: int,
    page_size: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
) -> Pool:
    """A pool full of NaN; the views are those of its second layer."""
    k_size, v_size = page_size * k_dim, page_size * v_dim
    layer = kv_heads * (k_size + v_size)
    memory = torch.full((pages * LAYERS * layer,), torch.nan, dtype=dtype)
    if layout == "page-major":
        unit = UNIT_BYTES // dtype.itemsize
        assert layer % unit == 0
        step = LAYERS * layer // unit
        strides = (unit, unit)
        k_start, v_start = layer, layer + kv_heads * k_size
        k_head, v_head = k_size, v_size
        count = (pages - 1) * step + 1
    else:
        step = 1
        strides = (k_size, v_size)
        k_start = pages * layer
        v_start = k_start + pages * kv_heads * k_size
        k_head, v_head = pages * k_size, pages * v_size
        count = pages
    k_shape, v_shape = ((count, kv_heads, page_size, dim) for dim in (k_dim, v_dim))
    return Pool(
        memory,
        memory.as_strided(k_shape, (strides[0], k_head, k_dim, 1), k_start),
        memory.as_strided(v_shape, (strides[1], v_head, v_dim, 1), v_start),
        torch.arange(pages) * step,
    )


class Case(NamedTuple):
    """Sequences in a pool: `k[i]`, `v[i]` `[length, kv_heads, dim]` are what its pages hold."""

    pool: Pool
    k: list[Tensor]
    v: list[Tensor]
    block_table: Tensor
    seq_lens: Tensor

    def arguments(self) -> dict[str, Any]:
        """The arguments that decode and prefill share."""
        return {
            "k_pages": self.pool.k_pages,
            "v_pages": self.pool.v_pages,
            "block_table": self.block_table,
            "seq_lens": self.seq_lens,
        }


def make_case(
    lengths: Sequence[int],
    *,
    layout: str,
    kv_heads: int = 2,
    page_size: int = 16,
    k_dim: int = 64,
    v_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    needed_from: Sequence[int] | None = None,
    seed: int = 0,
) -> Case:
    """Sequences of these lengths in random physical order.

    `needed_from`: the first token that may be read of each row; pages wholly before it have
    garbage in the table, and their tokens nowhere.
    """
    generator = torch.Generator().manual_seed(seed)
    v_dim = k_dim if v_dim is None else v_dim
    needed_from = [0] * len(lengths) if needed_from is None else needed_from
    width = max(1, -(-max(lengths, default=0) // page_size)) + 1
    needed = sum(-(-length // page_size) for length in lengths)
    pool = make_pool(
        layout,
        needed + 3,
        kv_heads=kv_heads,
        page_size=page_size,
        k_dim=k_dim,
        v_dim=v_dim,
        dtype=dtype,
    )
    free = pool.entries[torch.randperm(needed + 3, generator=generator)].tolist()
    # A stride between rows that is not the width: tables are slices of a larger one.
    table = torch.tensor(GARBAGE, dtype=torch.int32)
    table = table[torch.randint(3, (len(lengths), width + 2), generator=generator)][:, 1:-1]
    keys, values = [], []
    for row, (length, first) in enumerate(zip(lengths, needed_from, strict=True)):
        k = torch.randn(length, kv_heads, k_dim, generator=generator).to(dtype)
        v = torch.randn(length, kv_heads, v_dim, generator=generator).to(dtype)
        for page in range(first // page_size, -(-length // page_size)):
            entry = free.pop()
            table[row, page] = entry
            tokens = slice(page * page_size, min(length, (page + 1) * page_size))
            used = tokens.stop - tokens.start
            pool.k_pages[entry, :, :used] = k[tokens].transpose(0, 1)
            pool.v_pages[entry, :, :used] = v[tokens].transpose(0, 1)
        keys.append(k)
        values.append(v)
    return Case(pool, keys, values, table, torch.tensor(lengths, dtype=torch.int32))


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention as people write it, every step rounded to `q`'s dtype: `[n, q_heads, v_dim]`.

    `q` `[n, q_heads, dim]` are the last n of the tokens `k`, `v` `[length, kv_heads, dim]`. In
    fp64 it is the exact result, in a lower precision the measure of an acceptable error.
    """
    n, q_heads, _ = q.shape
    length, kv_heads, _ = k.shape
    k = k.transpose(0, 1).repeat_interleave(q_heads // kv_heads, 0)
    v = v.transpose(0, 1).repeat_interleave(q_heads // kv_heads, 0)
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(length - n, length)[:, None] - torch.arange(length)[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(q.dtype)[:, None, None].expand(-1, n, 1)), -1)
    weights = scores.softmax(-1)[..., :length]
    return (weights @ v).transpose(0, 1)


class Expected(NamedTuple):
    """The exact result in fp64, and what an eager run in the tensors' own dtype gives."""

    exact: Tensor
    eager: Tensor


def expect(case: Case, queries: Sequence[Tensor], **options: Any) -> Expected:
    """Both results for the last `len(queries[i])` tokens of each row i, one after another."""
    exact, eager = [], []
    for q, k, v in zip(queries, case.k, case.v, strict=True):
        if k.shape[0] == 0:
            q = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
            exact.append(q.double())
            eager.append(q)
            continue
        exact.append(dense(q.double(), k.double(), v.double(), **options))
        eager.append(dense(q, k, v, **options))
    return Expected(torch.cat(exact), torch.cat(eager))


def assert_close(got: Tensor, expected: Expected, *, factor: float = 1.0) -> None:
    """The error against fp64 is at most twice that of the eager run and one rounding.

    Twice, since the worst of few elements is a matter of luck; in the mean it is 1.25 times and
    half a rounding. `eps * max` is the rounding of a sum whose terms are as large as the results;
    in fp32 four of them, for there the eager run itself is within one (measured: up to 4.3).
    `factor` widens both, for a function that a kernel computes less exactly than torch does.
    """
    assert got.shape == expected.exact.shape
    assert got.dtype == expected.eager.dtype
    assert torch.isfinite(got).all()
    if got.numel() == 0:
        return
    error = (got.double() - expected.exact).abs()
    eager_error = (expected.eager.double() - expected.exact).abs()
    rounding = torch.finfo(got.dtype).eps * expected.exact.abs().max()
    roundings = 4 if got.dtype == torch.float32 else 1
    assert error.max() <= factor * (2 * eager_error.max() + roundings * rounding)
    assert error.mean() <= factor * (1.25 * eager_error.mean() + rounding / 2)


def cap_factor(dtype: torch.dtype, softcap: float | None) -> float:
    """In fp32 the kernels' tanh is a few units in the last place off, torch's one."""
    return 3.0 if softcap is not None and dtype == torch.float32 else 1.0
