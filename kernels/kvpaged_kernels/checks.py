"""What the kernels require of their arguments, checked once for every implementation.

The checks look at shapes, strides, dtypes and devices only: they never read a tensor's values, so
they cost no device synchronisation and work on `device="meta"`. Each raises ValueError with the
fact and the values.

Pages. A pool is one allocation; the K (or V) of one layer in all pages of a class is a strided view
`[entries, kv_heads, page_size, dim]` with last stride 1. An entry is what stands in a block table;
the view may overlap itself in dimension 0, whose stride is one entry unit and not one page.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""dtypes of keys, values, queries and pages."""

DECODED_FLOATS = (*FLOATS, torch.float8_e4m3fn)
"""dtypes of pages that a decode on a GPU reads."""

ORACLE_FLOATS = (*DECODED_FLOATS, torch.float64)
"""The references also take float64, which is how tests get the exact result."""

MAX_DIM = 256
MIN_PAGE_SIZE = 16
MAX_PAGE_SIZE = 256
MAX_CHECKSUM_WORDS = 2**32
MAX_DECODE_QUERIES = 16
"""Queries a row may have in `paged_decode`: drafts of speculation are few."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _require_rank(name: str, tensor: Tensor, axes: str) -> None:
    rank = axes.count(",") + 1
    require(
        tensor.dim() == rank,
        f"{name} must be [{axes}], got shape {tuple(tensor.shape)}",
    )


def _require_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    require(
        tensor.dtype in dtypes,
        f"{name} must be one of {', '.join(map(str, dtypes))}, got {tensor.dtype}",
    )


def _require_dense_last(name: str, tensor: Tensor) -> None:
    require(
        tensor.stride(-1) == 1 or tensor.shape[-1] <= 1,
        f"{name} must have last stride 1, got strides {tensor.stride()}",
    )


def require_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raise ValueError naming the first of these tensors, by their names, that is elsewhere."""
    for name, tensor in tensors.items():
        require(
            tensor is None or tensor.device == device,
            f"{name} is on {tensor.device if tensor is not None else None}, expected {device}",
        )


def _require_dim(name: str, dim: int) -> None:
    require(
        0 < dim <= MAX_DIM and dim % 8 == 0,
        f"{name} must be a multiple of 8 up to {MAX_DIM}, got {dim}",
    )


def check_pages(name: str, pages: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """Check one strided view of pages, `[entries, kv_heads, page_size, dim]`."""
    _require_rank(name, pages, "entries, kv_heads, page_size, dim")
    _require_dtype(name, pages, dtypes)
    _require_dense_last(name, pages)
    page_size = pages.shape[2]
    require(
        MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE and page_size & (page_size - 1) == 0,
        f"page_size of {name} must be a power of two in {MIN_PAGE_SIZE}..{MAX_PAGE_SIZE}, "
        f"got {page_size}",
    )
    _require_dim(f"last dimension of {name}", pages.shape[3])
    require(
        page_size * pages.stride(2) < 2**31,
        f"page_size * slot stride of {name} must be under 2**31 (kernels keep it in int32), "
        f"got {page_size} * {pages.stride(2)}",
    )


def _check_pages_pair(
    k_pages: Tensor, v_pages: Tensor, dtypes: Sequence[torch.dtype] = FLOATS
) -> None:
    check_pages("k_pages", k_pages, dtypes)
    check_pages("v_pages", v_pages, dtypes)
    require(
        k_pages.shape[1:3] == v_pages.shape[1:3],
        "k_pages and v_pages must agree in kv_heads and page_size, got "
        f"{tuple(k_pages.shape[1:3])} and {tuple(v_pages.shape[1:3])}",
    )
    require(
        k_pages.dtype == v_pages.dtype,
        f"k_pages and v_pages must have one dtype, got {k_pages.dtype} and {v_pages.dtype}",
    )


def _check_tokens(name: str, tokens: Tensor, pages: Tensor, count: int) -> None:
    _require_rank(name, tokens, "tokens, kv_heads, dim")
    _require_dense_last(name, tokens)
    expected = (count, pages.shape[1], pages.shape[3])
    require(
        tuple(tokens.shape) == expected,
        f"{name} must be {expected} to fit its pages, got {tuple(tokens.shape)}",
    )
    require(
        tokens.dtype == pages.dtype,
        f"{name} and its pages must have one dtype, got {tokens.dtype} and {pages.dtype}",
    )


def check_append(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slots: Tensor,
    *,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Check the arguments of `append`."""
    require(
        (v is None) == (v_pages is None),
        f"v and v_pages must both be given or both be None, got "
        f"{'None' if v is None else 'a tensor'} and {'None' if v_pages is None else 'a tensor'}",
    )
    _require_rank("slots", slots, "tokens")
    _require_dtype("slots", slots, (torch.int64,))
    if v is None or v_pages is None:
        check_pages("k_pages", k_pages, dtypes)
    else:
        _check_pages_pair(k_pages, v_pages, dtypes)
        _check_tokens("v", v, v_pages, slots.shape[0])
    _check_tokens("k", k, k_pages, slots.shape[0])
    require_device(k_pages.device, k=k, v=v, v_pages=v_pages, slots=slots)


def _check_queries(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    _require_dense_last("q", q)
    if k_pages.dtype == torch.float8_e4m3fn:
        _require_dtype("q over pages of float8_e4m3fn", q, (torch.bfloat16, torch.float16))
        for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
            require(
                not any(step % 2 for step in (*pages.stride()[:3], pages.storage_offset())),
                f"{name} of float8_e4m3fn are read in pairs: strides and offset must be even, got "
                f"{pages.stride()} and {pages.storage_offset()}",
            )
    else:
        require(
            q.dtype == k_pages.dtype,
            f"q and pages must have one dtype, got {q.dtype} and {k_pages.dtype}",
        )
    require(
        max(q.stride(0), q.shape[1] * max(q.stride(1), v_pages.shape[3])) < 2**23,
        f"a token of q may extend over at most 2**23 elements (kernels keep a block's offsets in "
        f"int32), got strides {q.stride()} and {q.shape[1]} heads of {v_pages.shape[3]}",
    )
    require(
        q.shape[2] == k_pages.shape[3],
        f"q has dimension {q.shape[2]}, k_pages {k_pages.shape[3]}",
    )
    q_heads, kv_heads = q.shape[1], k_pages.shape[1]
    require(
        kv_heads > 0 and q_heads > 0 and q_heads % kv_heads == 0,
        f"q_heads must be a positive multiple of kv_heads, got {q_heads} and {kv_heads}",
    )


def _check_table(block_table: Tensor, seq_lens: Tensor) -> None:
    _require_rank("block_table", block_table, "rows, width")
    _require_dtype("block_table", block_table, (torch.int32,))
    _require_dense_last("block_table", block_table)
    _check_lengths(seq_lens)
    require(
        block_table.shape[0] == seq_lens.shape[0],
        f"block_table has {block_table.shape[0]} rows, seq_lens {seq_lens.shape[0]}",
    )


def _check_lengths(seq_lens: Tensor) -> None:
    _require_rank("seq_lens", seq_lens, "rows")
    _require_dtype("seq_lens", seq_lens, (torch.int32,))
    _require_dense_last("seq_lens", seq_lens)


def _check_cu_q(cu_q: Tensor, seq_lens: Tensor) -> None:
    _require_rank("cu_q", cu_q, "rows + 1")
    _require_dtype("cu_q", cu_q, (torch.int32,))
    _require_dense_last("cu_q", cu_q)
    require_device(seq_lens.device, cu_q=cu_q)
    require(
        cu_q.shape[0] == seq_lens.shape[0] + 1,
        f"cu_q must have rows + 1 = {seq_lens.shape[0] + 1} elements, got {cu_q.shape[0]}",
    )


def _check_window(window: int | None) -> None:
    require(
        window is None or 0 < window < 2**31,
        f"window must be a positive int32 or None, got {window}",
    )


def _check_options(
    q_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    require(0 < scale < float("inf"), f"scale must be positive, got {scale}")
    _check_window(window)
    require(
        softcap is None or 0 < softcap < float("inf"),
        f"softcap must be positive and finite, or None, got {softcap}",
    )
    for name, of_heads in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if of_heads is None:
            continue
        require(
            tuple(of_heads.shape) == (q_heads,),
            f"{name} must be [q_heads] = [{q_heads}], got {tuple(of_heads.shape)}",
        )
        _require_dtype(name, of_heads, ORACLE_FLOATS)
        _require_dense_last(name, of_heads)


def _check_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dtypes: Sequence[torch.dtype],
) -> None:
    _require_rank("q", q, "tokens, q_heads, k_dim")
    _check_pages_pair(k_pages, v_pages, dtypes)
    _check_queries(q, k_pages, v_pages)
    _check_table(block_table, seq_lens)
    _check_options(q.shape[1], scale, window, softcap, sinks, alibi_slopes)
    require_device(
        q.device,
        k_pages=k_pages,
        v_pages=v_pages,
        block_table=block_table,
        seq_lens=seq_lens,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )


def check_decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    cu_q: Tensor | None = None,
    max_q: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Check the arguments of `paged_decode`."""
    _check_attention(
        q, k_pages, v_pages, block_table, seq_lens, scale, window, softcap, sinks, alibi_slopes,
        dtypes,
    )  # fmt: skip
    _check_few_queries(seq_lens, cu_q, max_q)
    require(
        cu_q is not None or q.shape[0] == seq_lens.shape[0],
        f"without cu_q each row has one query, got {q.shape[0]} for {seq_lens.shape[0]} rows",
    )


def _check_few_queries(seq_lens: Tensor, cu_q: Tensor | None, max_q: int) -> None:
    require(
        1 <= max_q <= MAX_DECODE_QUERIES,
        f"max_q must be in 1..{MAX_DECODE_QUERIES} for a decode, got {max_q}",
    )
    require(cu_q is not None or max_q == 1, f"max_q must be 1 without cu_q, got {max_q}")
    if cu_q is not None:
        _check_cu_q(cu_q, seq_lens)


def check_plan(
    seq_lens: Tensor, cu_q: Tensor | None, *, rows: int, max_q: int, window: int | None
) -> None:
    """Check the arguments of `plan_decode`."""
    _check_lengths(seq_lens)
    require(seq_lens.shape[0] == rows, f"seq_lens has {seq_lens.shape[0]} rows, expected {rows}")
    _check_few_queries(seq_lens, cu_q, max_q)
    _check_window(window)


def check_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    cu_q: Tensor,
    seq_lens: Tensor,
    *,
    max_q: int,
    max_len: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Check the arguments of `paged_prefill`."""
    _check_attention(
        q, k_pages, v_pages, block_table, seq_lens, scale, window, softcap, sinks, alibi_slopes,
        dtypes,
    )  # fmt: skip
    _check_cu_q(cu_q, seq_lens)
    require(0 <= max_len < 2**31, f"max_len must fit int32 and not be negative, got {max_len}")
    require(0 <= max_q <= max_len, f"max_q must be in 0..max_len = {max_len}, got {max_q}")


def check_copy(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """Check the arguments of `copy_pages`."""
    _require_rank("pages", pages, "entries, pieces, piece_len")
    _require_dense_last("pages", pages)
    for name, entries in (("src", src), ("dst", dst)):
        _require_rank(name, entries, "n")
        _require_dtype(name, entries, (torch.int32, torch.int64))
    require(
        src.shape == dst.shape,
        f"src and dst must have one length, got {src.shape[0]} and {dst.shape[0]}",
    )
    require_device(pages.device, src=src, dst=dst)


def check_fill(records: Tensor, pages: Tensor, entries: Tensor) -> None:
    """Check the arguments of `fill_pages`."""
    for name, tensor in (("records", records), ("pages", pages)):
        first = "n" if name == "records" else "entries_total"
        _require_rank(name, tensor, f"{first}, slices, pieces, piece_len")
        _require_dense_last(name, tensor)
    _require_dtype("records", records, (pages.dtype,))
    require(
        records.shape[1:] == pages.shape[1:],
        f"records and pages must be of the same pieces, got {tuple(records.shape[1:])} and "
        f"{tuple(pages.shape[1:])}",
    )
    _require_rank("entries", entries, "n")
    _require_dtype("entries", entries, (torch.int32, torch.int64))
    require(
        entries.shape[0] == records.shape[0],
        f"there must be an entry a record, got {entries.shape[0]} and {records.shape[0]}",
    )
    require_device(pages.device, entries=entries)
    if records.device != pages.device:
        require(
            records.device.type == "cpu" and records.is_pinned(),
            f"records must lie on {pages.device} or in pinned host memory",
        )


def check_checksum(words: Tensor, entries: Tensor, *, first_word: int) -> None:
    """Check the arguments of `checksum`."""
    _require_rank("words", words, "entries_total, slices, pieces, piece_words")
    _require_dtype("words", words, (torch.int32,))
    _require_dense_last("words", words)
    _require_rank("entries", entries, "n")
    _require_dtype("entries", entries, (torch.int32, torch.int64))
    last = first_word + words.shape[2] * words.shape[3]
    require(
        first_word >= 0 and last <= MAX_CHECKSUM_WORDS,
        f"words {first_word}..{last} of a slice must be in 0..{MAX_CHECKSUM_WORDS}",
    )
    require_device(words.device, entries=entries)
