"""A small transformer written here, generating over pages: PyTorch only.

python examples/plain_loop.py

The same tokens come from a loop that keeps no cache and computes everything anew.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvpaged import PagedKVCache, PageGeometry, TokenBatch

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, VOCABULARY = 4, 6, 2, 32, 192, 256


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of `[tokens, heads, dim]`."""
    frequency = 10_000 ** (-torch.arange(0, DIM, 2) / DIM)
    angle = positions[:, None, None] * frequency
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Layer(nn.Module):
    """Attention and a gated feed-forward, on flat ragged tokens `[tokens, WIDTH]`."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cache: PagedKVCache, batch: TokenBatch) -> Tensor:
        """Add this layer's part to `x`."""
        heads = self.qkv(F.rms_norm(x, (WIDTH,))).view(len(x), -1, DIM)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        q, k = rotate(q, batch.positions), rotate(k, batch.positions)
        y = cache.attend(self.number, q, k, v, batch)
        x = x + self.out(y.flatten(1))
        gate, value = self.up(F.rms_norm(x, (WIDTH,))).chunk(2, dim=-1)
        out: Tensor = x + self.down(F.silu(gate) * value)
        return out


class Model(nn.Module):
    """A language model of random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(Layer(i) for i in range(LAYERS))

    def forward(self, cache: PagedKVCache, batch: TokenBatch) -> Tensor:
        """The next token of each row, int64 `[rows]`."""
        x = self.embed(batch.tokens)
        for layer in self.layers:
            x = layer(x, cache, batch)
        last = F.rms_norm(x[batch.cu_seqlens[1:].long() - 1], (WIDTH,))
        best: Tensor = self.head(last).argmax(-1)
        return best


@torch.no_grad()
def main() -> None:
    """Generate for three prompts over pages, and again without a cache."""
    torch.manual_seed(0)
    model = Model()
    prompts = [[1, 2, 3], list(range(40)), [7]]
    geometry = PageGeometry(
        layers=LAYERS, kv_heads=KV_HEADS, head_dim=DIM, page_size=16, dtype=torch.float32
    )
    rows = [list(prompt) for prompt in prompts]
    with PagedKVCache(geometry, memory="16MiB") as cache:
        batch = cache.batch(prompts)
        for _ in range(24):
            tokens = model(cache, batch)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            batch.extend(tokens)
        print(f"{batch.pages()} pages, {batch.memory_bytes():,} bytes of K and V")
        batch.close()

        anew = [list(prompt) for prompt in prompts]
        for _ in range(24):
            whole = cache.batch(anew)
            for row, token in zip(anew, model(cache, whole).tolist(), strict=True):
                row.append(token)
            whole.close()
    for row in rows:
        print(" ".join(map(str, row[-24:])))
    print("the same tokens without a cache:", rows == anew)


if __name__ == "__main__":
    main()
