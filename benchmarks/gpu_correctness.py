"""Every kernel on the device against the eager references, over a grid of shapes and options.

The attention kernels: the error against fp64 is at most twice that of attention as people write it
in the tensors' own dtype, or of one rounding of the exact result (in fp32 of two: there the sums
are rounded as coarsely as the result). Everything else: exact.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_common import (
    Record,
    Sequences,
    Setting,
    finite,
    geometry,
    random_sequences,
)
from kvpaged.config import Layout
from kvpaged.geometry import PageGeometry, View
from kvpaged.offload.runs import blocks_of
from kvpaged_kernels.gpu.append import append
from kvpaged_kernels.gpu.checksum import checksum
from kvpaged_kernels.gpu.copy import copy_pages
from kvpaged_kernels.gpu.decode import paged_decode
from kvpaged_kernels.gpu.prefill import paged_prefill
from kvpaged_kernels.gpu.transfer import fill_pages
from kvpaged_kernels.reference import append as append_oracle
from kvpaged_kernels.reference import attention as attention_oracle
from kvpaged_kernels.reference import checksum as checksum_oracle
from kvpaged_kernels.reference import copy as copy_oracle
from kvpaged_kernels.reference import transfer as transfer_oracle

KERNELS: dict[str, Any] = {
    "append": append,
    "copy_pages": copy_pages,
    "checksum": checksum,
    "fill_pages": fill_pages,
    "paged_decode": paged_decode,
    "paged_prefill": paged_prefill,
}
ATTENTION = ("paged_decode", "paged_prefill")
OPTIONS = ("plain", "window", "softcap", "sinks", "alibi", "all")
DECODE_OPTIONS = ("queries", "fp8", "fp8 queries")
"""Of decode alone: several queries a row (also in `all`), e4m3 pages under half-precision q."""
LAYOUTS: tuple[Layout, ...] = ("page-major", "layer-major")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEADS = ((2, 4), (3, 3), (2, 1), (1, 16))
"""KV heads and queries a KV head; the grid takes them in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One comparison."""

    kernel: str
    dtype: torch.dtype
    dim: int
    page_size: int
    layout: Layout
    options: str = "plain"
    kv_heads: int = 2
    group: int = 4
    lengths: tuple[int, ...] = (0, 1, 33, 257, 1900)

    def fields(self) -> dict[str, Any]:
        """As they stand in a row."""
        return {
            "kernel": self.kernel,
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": self.dim,
            "page_size": self.page_size,
            "layout": self.layout,
            "options": self.options,
            "kv_heads": self.kv_heads,
            "q_heads": self.kv_heads * self.group,
            "lengths": list(self.lengths),
        }


class Verdict(NamedTuple):
    """An error and what it may be; None where the result is not a number."""

    error: float | None
    bound: float | None
    passed: bool


def judge(got: Tensor, exact: Tensor, eager: Tensor) -> Verdict:
    """The greatest error of `got` against `exact` (fp64), bounded by that of `eager`."""
    assert got.shape == exact.shape == eager.shape
    error = (got.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    roundings = 2 if got.dtype == torch.float32 else 1
    rounding = roundings * torch.finfo(got.dtype).eps * exact.abs().max().item()
    bound = 2 * max(eager_error, rounding)
    return Verdict(finite(error), finite(bound), passed=error <= bound < math.inf)


def judge_exact(got: Tensor, expected: Tensor) -> Verdict:
    """The number of elements that differ, which must be none; NaNs are compared as bits."""
    if got.is_floating_point():
        bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
        got, expected = got.view(bits), expected.view(bits)
    different = int((got != expected).sum().item())
    return Verdict(float(different), 0.0, passed=different == 0)


def cases(*, quick: bool) -> Iterator[Case]:
    """The grid: bytes first, then attention without options everywhere, then each option."""
    if quick:
        yield from _quick_cases()
        return
    # Both layouts of a shape have the same heads: one compilation serves both.
    shapes = list(itertools.product(DTYPES, (64, 80, 96, 128, 256), (16, 64, 256)))
    for kernel in KERNELS:
        numbered = itertools.product(enumerate(shapes), LAYOUTS)
        for (number, (dtype, dim, page_size)), layout in numbered:
            kv_heads, group = HEADS[number % len(HEADS)]
            yield Case(
                kernel=kernel, dtype=dtype, dim=dim, page_size=page_size, layout=layout,
                kv_heads=kv_heads, group=group,
            )  # fmt: skip
    some = ((torch.bfloat16, 128, 64), (torch.float16, 64, 16), (torch.float32, 80, 256))
    chosen = itertools.product(ATTENTION, some, LAYOUTS, (*OPTIONS[1:], *DECODE_OPTIONS))
    for kernel, (dtype, dim, page_size), layout, options in chosen:
        if options in DECODE_OPTIONS and kernel != "paged_decode":
            continue
        if "fp8" in options and dtype == torch.float32:
            continue
        yield Case(
            kernel=kernel, dtype=dtype, dim=dim, page_size=page_size, layout=layout,
            options=options,
        )  # fmt: skip


def _quick_cases() -> Iterator[Case]:
    for kernel, layout in itertools.product(KERNELS, LAYOUTS):
        attention = kernel in ATTENTION
        yield Case(
            kernel=kernel,
            dtype=torch.float16 if layout == "page-major" else torch.float32,
            dim=80 if attention else 64,
            page_size=16,
            layout=layout,
            options="all" if attention and layout == "page-major" else "plain",
            kv_heads=1,
            group=3,
            lengths=(0, 1, 19),
        )


def options_of(case: Case, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the attention kernels."""
    chosen = {case.options} if case.options != "all" else set(OPTIONS)
    heads = case.kv_heads * case.group
    return {
        "scale": case.dim**-0.5,
        "window": 20 if "window" in chosen else None,
        "softcap": 5.0 if "softcap" in chosen else None,
        "sinks": torch.randn(heads, device=device) if "sinks" in chosen else None,
        "alibi_slopes": torch.rand(heads, device=device) if "alibi" in chosen else None,
    }


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None,
    softcap: float | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention as people write it, every step rounded to `q`'s dtype: `[n, q_heads, dim]`.

    `q` `[n, q_heads, dim]` are the last n of the tokens `k`, `v` `[length, kv_heads, dim]`.
    """
    n, length = q.shape[0], k.shape[0]
    if length == 0:
        return torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    k, v = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    token = torch.arange(length, device=q.device)
    distance = token[length - n :, None] - token[None, :]
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(q.dtype)[:, None, None].expand(-1, n, 1)
        scores = torch.cat((scores, column), -1)
    return (scores.softmax(-1)[..., :length] @ v).transpose(0, 1)


def views(flat: Tensor, found: Sequences) -> tuple[Tensor, Tensor]:
    """The views of K and V over a storage of any dtype: a page-major view overlaps itself and must
    not be cast.
    """
    k, v = (flat.as_strided(x[:4], x[4:8], x[8]) for x in (found.pages.k_view, found.pages.v_view))
    return k, v


def gather(pages: Tensor, found: Sequences, row: int) -> Tensor:
    """The tokens of a row, `[length, kv_heads, dim]`."""
    length = int(found.seq_lens[row])
    entries = found.block_table[row, : -(-length // pages.shape[2])].long()
    return pages[entries].transpose(1, 2).flatten(0, 1)[:length]


def shape_of(case: Case) -> PageGeometry:
    """Two layers, so that a layer is not a page."""
    return geometry(
        layers=2, kv_heads=case.kv_heads, dim=case.dim, page_size=case.page_size,
        dtype=case.dtype, layout=case.layout,
    )  # fmt: skip


def check_attention(case: Case, device: torch.device, kernel: Any) -> Verdict:
    """Decode of one or a few queries a row, or prefill of up to 40; some rows have none."""
    found = random_sequences(case.lengths, shape_of(case), device)
    options = options_of(case, device)
    decode = case.kernel == "paged_decode"
    several = not decode or "queries" in case.options or case.options == "all"
    most = 7 if decode else 40
    counts = [1] * len(case.lengths)
    cu_q, limits = None, {}
    if several:
        counts = [min(n, most) if row != 1 else 0 for row, n in enumerate(case.lengths)]
        ends = list(itertools.accumulate(counts, initial=0))
        cu_q = torch.tensor(ends, dtype=torch.int32, device=device)
        limits = {"max_q": max(counts)} | ({} if decode else {"max_len": max(case.lengths)})
    q = torch.randn(sum(counts), case.kv_heads * case.group, case.dim, device=device)
    q = q.to(case.dtype)
    flat = found.pages.flat
    if "fp8" in case.options:  # the same numbers for everyone: rounded to e4m3
        flat = flat.to(torch.float8_e4m3fn)
        rounded = found.pages._replace(flat=flat.to(case.dtype))
        found = found._replace(pages=rounded)
    k_pages, v_pages = views(flat, found)
    arguments = {"block_table": found.block_table, "seq_lens": found.seq_lens, "cu_q": cu_q}
    got = kernel(q, k_pages, v_pages, **arguments, **limits, **options)
    oracle: Any = attention_oracle.paged_decode if decode else attention_oracle.paged_prefill
    wide = views(found.pages.flat.double(), found)
    exact = oracle(q.double(), *wide, **arguments, **limits, **options)
    k, v = views(found.pages.flat, found)
    eager = [
        eager_attention(each, gather(k, found, row), gather(v, found, row), **options)
        for row, each in enumerate(q.split(counts))
    ]
    return judge(got, exact, torch.cat(eager))


def check_append(case: Case, device: torch.device, kernel: Any) -> Verdict:
    """All tokens of all rows at once; every byte of the pool is compared."""
    found = random_sequences(case.lengths, shape_of(case), device)
    slots = torch.cat(
        [
            found.block_table[row].long().repeat_interleave(case.page_size)[:n] * case.page_size
            + torch.arange(n, device=device) % case.page_size
            for row, n in enumerate(case.lengths)
        ]
    )
    k, v = torch.randn(2, len(slots), case.kv_heads, case.dim, device=device).to(case.dtype)
    results = []
    writers: tuple[Any, ...] = (kernel, append_oracle.append)
    for write in writers:
        flat = found.pages.flat.clone()
        views = (
            flat.as_strided(x[:4], x[4:8], x[8]) for x in (found.pages.k_view, found.pages.v_view)
        )
        write(k, v, *views, slots)
        results.append(flat)
    return judge_exact(*results)


def _strided(flat: Tensor, view: View) -> Tensor:
    return flat.as_strided(view.size, view.stride, view.offset)


def check_copy(case: Case, device: torch.device, kernel: Any) -> Verdict:
    """Half of the pages over the other half, K and V; every byte of the pool is compared.

    No page is copied to twice, nor from and to: which came first would be chance.
    """
    shape, found = shape_of(case), random_sequences(case.lengths, shape_of(case), device)
    entries = found.block_table.flatten().unique()
    half = len(entries) // 2
    size = found.pages.flat.nbytes
    count = size // shape.page_bytes
    kinds = ("k",) if case.layout == "page-major" else ("k", "v")
    results = []
    for copy in (kernel, copy_oracle.copy_pages):
        flat = found.pages.flat.clone()
        for kind in kinds:
            view = shape.pieces(kind, pages=count, storage_bytes=size)  # type: ignore[arg-type]
            copy(_strided(flat, view)[:, 0], entries[:half], entries[half : 2 * half])
        results.append(flat)
    return judge_exact(*results)


def check_checksum(case: Case, device: torch.device, kernel: Any) -> Verdict:
    """Sums of K and V of every page, V counted from where it stands in a slice."""
    shape, found = shape_of(case), random_sequences(case.lengths, shape_of(case), device)
    entries = found.block_table.flatten()
    size = found.pages.flat.nbytes
    count = size // shape.page_bytes
    words = found.pages.flat.view(torch.int32)
    k, v = (
        _strided(words, shape.words(kind, pages=count, storage_bytes=size)) for kind in ("k", "v")
    )
    results = [
        digest(k, entries) + digest(v, entries, first_word=shape.v_first_word)
        for digest in (kernel, checksum_oracle.checksum)
    ]
    return judge_exact(*results)


def check_fill(case: Case, device: torch.device, kernel: Any) -> Verdict:
    """The last layer of every page in use, from records in pinned memory; every byte of the pool
    is compared.
    """
    shape, found = shape_of(case), random_sequences(case.lengths, shape_of(case), device)
    pages = found.block_table.flatten().unique()
    size = found.pages.flat.nbytes
    body = shape.layers * shape.slice_bytes
    records = torch.randint(256, (len(pages), body), dtype=torch.uint8)
    blocks = blocks_of(
        shape, slice(shape.layers - 1, shape.layers), pages=size // shape.page_bytes,
        storage_bytes=size, record_stride=body,
    )  # fmt: skip
    results = []
    for fill in (kernel, transfer_oracle.fill_pages):
        storage = found.pages.flat.clone().view(torch.uint8)
        on_gpu = device.type == "cuda"
        # The oracle reads the same bytes on the device.
        source = records.pin_memory() if on_gpu and fill is kernel else records.to(device)
        for block in blocks:
            fill(block.in_records(source), block.in_pool(storage), pages)
        results.append(storage)
    return judge_exact(*results)


def check(case: Case, device: torch.device, kernels: Mapping[str, Any]) -> Verdict:
    """Run one case with the kernel of that name in `kernels`."""
    checks = {
        "append": check_append, "copy_pages": check_copy, "checksum": check_checksum,
        "fill_pages": check_fill,
    }  # fmt: skip
    return checks.get(case.kernel, check_attention)(case, device, kernels[case.kernel])


def row_of(case: Case, device: torch.device, kernels: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a case. What a kernel raises fails its row, and is in it."""
    try:
        verdict = check(case, device, kernels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as fault:  # the other rows are checked all the same
        message = f"{type(fault).__name__}: {fault}"[:500]
        return {**case.fields(), "error": None, "bound": None, "passed": False, "raised": message}
    return {**case.fields(), **verdict._asdict(), "raised": None}


def device_answers(device: torch.device) -> bool:
    """Whether the device still works: a bad address ends a CUDA context for good."""
    try:
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False


def run(
    record: Record, setting: Setting, kernels: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All cases; `kernels` replaces the Triton kernels (tests hand in faulty ones)."""
    kernels = KERNELS if kernels is None else kernels
    lost = False
    for case in cases(quick=setting.quick):
        if lost:
            record.document["left_out"] += 1
            continue
        if record.late():
            continue
        row = row_of(case, setting.device, kernels)
        text = f"error {row['error']}, bound {row['bound']}"
        record.add(
            row,
            f"{'ok  ' if row['passed'] else 'FAIL'} {case.kernel} {row['dtype']} dim {case.dim} "
            f"page {case.page_size} {case.layout} {case.options}: {row['raised'] or text}",
        )
        lost = row["raised"] is not None and not device_answers(setting.device)
    failed = sum(not row["passed"] for row in record.rows)
    passed = len(record.rows) - failed
    return record.finish(device_lost=lost, counts={"passed": passed, "failed": failed})
