"""Dense attention in fp64 as the oracle of a loop over pages."""

import itertools
from typing import Any

import torch

from kvpaged import PagedKVCache, PageGeometry

LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 6, 2, 64


def geometry(page_size: int = 16) -> PageGeometry:
    return PageGeometry(
        layers=LAYERS, kv_heads=KV_HEADS, head_dim=DIM, page_size=page_size, dtype=torch.float32
    )


def make(backend: Any = "cpu", layout: Any = None, **options: Any) -> PagedKVCache:
    memory = options.pop("memory", "8MiB")
    return PagedKVCache(geometry(), memory, backend=backend, layout=layout, **options)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> Any:
    """Causal attention of the last `len(q)` positions, in fp64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    token = torch.arange(k.shape[1])
    position = token[-q.shape[0] :, None]
    hidden = token > position
    if window is not None:
        hidden |= token <= position - window
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


class Oracle:
    """What a batch's rows should hold, as dense tensors, fed the same keys and values."""

    def __init__(self, cache: PagedKVCache, batch, seed: int = 0) -> None:
        self.cache, self.batch = cache, batch
        self.random = torch.Generator().manual_seed(seed)
        self.rows = [self._empty() for _ in range(batch.rows)]
        self.windows = [cache.groups[cache.place_of(layer)[0]].window for layer in range(LAYERS)]

    @staticmethod
    def _empty():
        nothing = torch.empty(0, KV_HEADS, DIM)
        return [(nothing, nothing) for _ in range(LAYERS)]

    def compute(self) -> None:
        """Run all layers over the waiting tokens and compare each row's output."""
        bounds = self.batch.cu_seqlens.tolist()
        for layer in range(LAYERS):
            q, k, v = (
                torch.randn(bounds[-1], heads, DIM, generator=self.random)
                for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
            )
            out = self.cache.attend(layer, q, k, v, self.batch)
            for row, (a, b) in enumerate(itertools.pairwise(bounds)):
                held = self.rows[row][layer]
                now = torch.cat((held[0], k[a:b])), torch.cat((held[1], v[a:b]))
                self.rows[row][layer] = now
                if b > a:
                    expected = dense(q[a:b], *now, self.windows[layer])
                    torch.testing.assert_close(out[a:b].double(), expected, rtol=0, atol=2e-5)

    def fork(self, row: int) -> None:
        self.batch.fork(row)
        self.rows.append(list(self.rows[row]))

    def rewind(self, row: int, to: int) -> None:
        self.batch.rewind(row, to=to)
        self.rows[row] = [(k[:to], v[:to]) for k, v in self.rows[row]]
