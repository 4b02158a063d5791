"""The arithmetic of the 4-bit design study: what its codes and scales stand for, in fp64."""

import torch

from benchmarks.int4_loop import GROUP, int4_launch, pack


def test_codes_keep_their_places():
    codes = torch.arange(64).remainder(16).to(torch.uint8).view(1, 64)
    packed = pack(codes)
    assert packed.dtype == torch.int16
    assert packed.shape == (1, 16)
    bits = packed.to(torch.int32)
    parts = [(bits >> shift) & 15 for shift in (0, 4, 8, 12)]
    assert torch.equal(torch.cat(parts, -1).to(torch.uint8), codes)


def test_attention_over_codes_is_attention_over_what_they_stand_for():
    dim, rows, pages = 64, 2, 5
    random = torch.Generator().manual_seed(0)
    k, v = (
        torch.randint(0, 16, (pages, GROUP, dim), generator=random).to(torch.uint8)
        for _ in range(2)
    )
    k_scales = (torch.rand(pages, dim, generator=random) / 4 + 0.05).half()
    v_scales = (torch.rand(pages, GROUP, generator=random) / 4 + 0.05).half()
    q = torch.randn(rows, 16, dim, generator=random).bfloat16()
    table = torch.tensor([[3, 1, 4], [0, 2, 0]], dtype=torch.int32)
    seq_lens = torch.tensor([3 * GROUP, 2 * GROUP, 3], dtype=torch.int32)
    out = torch.empty(rows, 16, dim)
    int4_launch(q, pack(k), pack(v), k_scales, v_scales, table, seq_lens, out).run(
        torch.device("cpu")
    )
    for row, count in ((0, 3), (1, 2)):
        mine = table[row, :count].long()
        keys = ((k[mine].double() - 8) * k_scales[mine].double()[:, None, :]).flatten(0, 1)
        values = ((v[mine].double() - 8) * v_scales[mine].double()[:, :, None]).flatten(0, 1)
        weights = (q[row].double() @ keys.T * dim**-0.5).softmax(-1)
        # Queries times scales, and weights, are rounded to bf16.
        assert (out[row] - weights @ values).abs().max() < 2**-6
