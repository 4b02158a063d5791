"""The custom operators `torch.ops.kvpaged.*`: what `torch.compile` and CUDA graphs hold.

Views of pages go in as integers (`LayerPages.k_view`), a plan of a decode as its records.
"""

import torch
from torch import Tensor

from kvpaged import ops
from kvpaged.config import Backend

_library = torch.library.Library("kvpaged", "DEF")
_library.define(
    "append(Tensor(a!) flat, Tensor k, Tensor? v, Tensor slots, int[] k_view, int[] v_view, "
    "str backend) -> ()"
)
_VIEWS = "int[] k_view, int[] v_view"
_OPTIONS = (
    "float scale, SymInt? window, float? softcap, Tensor? sinks, Tensor? alibi_slopes, str backend"
)
_library.define(
    f"decode(Tensor flat, Tensor q, Tensor table, Tensor lengths, Tensor? cu_q, Tensor? records, "
    f"{_VIEWS}, SymInt max_q, {_OPTIONS}) -> Tensor"
)
_library.define(
    f"prefill(Tensor flat, Tensor q, Tensor table, Tensor cu_q, Tensor lengths, {_VIEWS}, "
    f"SymInt max_q, SymInt max_len, {_OPTIONS}) -> Tensor"
)


def _op_pages(flat: Tensor, k_view: list[int], v_view: list[int]) -> ops.LayerPages:
    return ops.LayerPages.of_views(flat, k_view, v_view)


def _append_op(
    flat: Tensor, k: Tensor, v: Tensor | None, slots: Tensor,
    k_view: list[int], v_view: list[int], backend: Backend,
) -> None:  # fmt: skip
    ops.append(_op_pages(flat, k_view, v_view), k, v, slots, backend=backend)


def _decode_op(
    flat: Tensor, q: Tensor, table: Tensor, lengths: Tensor, cu_q: Tensor | None,
    records: Tensor | None, k_view: list[int], v_view: list[int], max_q: int, scale: float,
    window: int | None, softcap: float | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
    backend: Backend,
) -> Tensor:  # fmt: skip
    pages = _op_pages(flat, k_view, v_view)
    options = ops.Options(scale, window, softcap, sinks, alibi_slopes)
    plan = None
    if records is not None:
        plan = ops.plan_shares(
            pages, q.shape[1], lengths, window, cu_q=cu_q, max_q=max_q, records=records
        )
    return ops.decode(
        pages, q, table, lengths, options, backend=backend, cu_q=cu_q, max_q=max_q, plan=plan
    )


def _prefill_op(
    flat: Tensor, q: Tensor, table: Tensor, cu_q: Tensor, lengths: Tensor,
    k_view: list[int], v_view: list[int], max_q: int, max_len: int, scale: float,
    window: int | None, softcap: float | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
    backend: Backend,
) -> Tensor:  # fmt: skip
    return ops.prefill(
        _op_pages(flat, k_view, v_view), q, table, cu_q, lengths,
        ops.Options(scale, window, softcap, sinks, alibi_slopes), max_q=max_q, max_len=max_len,
        backend=backend,
    )  # fmt: skip


def _output(q: Tensor, k_view: list[int], v_view: list[int]) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], (v_view or k_view)[3])


for _key in ("CPU", "CUDA"):
    _library.impl("append", _append_op, _key)
    _library.impl("decode", _decode_op, _key)
    _library.impl("prefill", _prefill_op, _key)
torch.library.register_fake("kvpaged::append", lambda *_: None, lib=_library)
torch.library.register_fake(
    "kvpaged::decode",
    lambda flat, q, table, lengths, cu_q, records, k_view, v_view, *_: _output(q, k_view, v_view),
    lib=_library,
)
torch.library.register_fake(
    "kvpaged::prefill",
    lambda flat, q, table, cu_q, lengths, k_view, v_view, *_: _output(q, k_view, v_view),
    lib=_library,
)
