"""What others offer for the same attention: SDPA, FlexAttention, FlashInfer, and the Triton kernels
of vLLM and SGLang.

Each maker returns a call without arguments, `[rows, q_heads, dim]` or `[tokens, q_heads, dim]` as
ours, over a copy of the same K and V in the layout that suits it best; or raises `Skipped`.
"""

import functools
import importlib.util
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import triton_peers

Call = Callable[[], Tensor]


class Skipped(Exception):
    """This peer can't run here; the message says why."""


class Work(NamedTuple):
    """One attention over sequences of equal length, all of whose tokens are queries in a prefill.

    Attributes:
        q: `[rows, queries, q_heads, dim]`; queries is 1 (decode) or the length (prefill).
        k, v: `[rows, kv_heads, length, dim]`, contiguous.
        page_size: of a paged peer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    page_size: int

    @property
    def decode(self) -> bool:
        """Whether each row has one query, its last token."""
        return self.q.shape[1] == 1


def sdpa(work: Work) -> Call:
    """torch's own attention, which chooses its backend."""
    q = work.q.transpose(1, 2).contiguous()
    causal = not work.decode

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(q, work.k, work.v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def flex(work: Work) -> Call:
    """FlexAttention, compiled for exactly these shapes."""
    if work.q.device.type != "cuda":
        raise Skipped("FlexAttention is compiled for CUDA devices only here")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(row: Tensor, head: Tensor, query: Tensor, token: Tensor) -> Tensor:
        return query >= token

    torch._dynamo.reset()  # past eight shapes a function would silently run uncompiled
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    q = work.q.transpose(1, 2).contiguous()
    length = work.k.shape[2]
    mask = None
    if not work.decode:
        mask = create_block_mask(causal, None, None, length, length, device=str(q.device))
    run = functools.partial(compiled, q, work.k, work.v, block_mask=mask, enable_gqa=True)
    return lambda: run().transpose(1, 2).flatten(0, 1)


def _scattered(work: Work) -> tuple[int, Tensor]:
    """Pages of a row, and a random order of all rows' pages; `Skipped` if they are not whole."""
    rows, _, length, _ = work.k.shape
    if length % work.page_size:
        raise Skipped(f"{length} tokens are no whole number of pages of {work.page_size}")
    width = length // work.page_size
    return width, torch.randperm(rows * width, device=work.q.device)


def flashinfer(work: Work) -> Call:
    """FlashInfer's paged kernels, over pages in random order; its plan is not in the time."""
    if importlib.util.find_spec("flashinfer") is None:
        raise Skipped("flashinfer is not installed")
    import flashinfer as library

    rows, heads, length, dim = work.k.shape
    size, device = work.page_size, work.q.device
    width, order = _scattered(work)
    pages = torch.empty(rows * width, 2, heads, size, dim, dtype=work.k.dtype, device=device)
    for place, x in enumerate((work.k, work.v)):
        pages[order, place] = x.unflatten(2, (width, size)).transpose(1, 2).flatten(0, 1)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    last = torch.full((rows,), size, dtype=torch.int32, device=device)
    space = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    q = work.q.flatten(0, 1).contiguous()
    common = (starts * width, order.int(), last, q.shape[1], heads, dim, size)
    if work.decode:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
        wrapper.plan(*common, q_data_type=q.dtype, kv_data_type=q.dtype)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(space, "HND")
        wrapper.plan(starts * length, *common, causal=True, q_data_type=q.dtype)
    run: Call = functools.partial(wrapper.run, q, pages)
    return run


def _triton(name: str, folder: Path | None, work: Work) -> Call:
    """A peer's Triton decode over pages in random order, from a folder outside the repository."""
    if not work.decode:
        raise Skipped("only its decode is measured")
    if folder is None:
        raise Skipped(f"no folder with its kernels was given (--{name})")
    rows, heads, length, dim = work.k.shape
    size, device = work.page_size, work.q.device
    width, order = _scattered(work)
    k, v = (torch.empty(rows * width, size, heads, dim, dtype=x.dtype, device=device)
            for x in (work.k, work.v))  # fmt: skip
    for pages, x in ((k, work.k), (v, work.v)):
        pages[order] = x.unflatten(2, (width, size)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    table = order.int().view(rows, width)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=device)
    step = triton_peers.Decode(work.q.squeeze(1).contiguous(), k, v, table, lengths, "model")
    try:
        return triton_peers.PEERS[name](folder, step)
    except triton_peers.NotThere as reason:
        raise Skipped(str(reason)) from reason


PEERS: dict[str, Callable[[Work], Call]] = {"sdpa": sdpa, "flex": flex, "flashinfer": flashinfer}


def peers_of(
    work: Work, folders: Mapping[str, Path | None], without: Collection[str] = ()
) -> tuple[dict[str, Call], dict[str, str]]:
    """The peers that run this work, and why the others don't; `folders`: of `triton_peers`.

    A peer that raises is left out with what it raised: it is theirs, and the figure is missing.
    """
    ready: dict[str, Call] = {}
    skipped: dict[str, str] = {}
    theirs = {
        name: functools.partial(_triton, name, folders.get(name)) for name in triton_peers.PEERS
    }
    for name, make in (PEERS | theirs).items():
        if name in without:
            skipped[name] = "not asked for"
            continue
        try:
            call = make(work)
            call()
            if work.q.device.type == "cuda":
                torch.cuda.synchronize(work.q.device)
            ready[name] = call
        except Skipped as reason:
            skipped[name] = str(reason)
        except Exception as fault:  # of a peer: the others can still be measured
            skipped[name] = f"{type(fault).__name__}: {fault}"[:300]
    return ready, skipped
