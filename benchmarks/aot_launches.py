"""What is compiled ahead of time: every shipped configuration as the launch its launcher makes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvpaged_kernels.gpu.append import append_launch
from kvpaged_kernels.gpu.checksum import checksum_launch
from kvpaged_kernels.gpu.configs import Shipped
from kvpaged_kernels.gpu.copy import copy_launch
from kvpaged_kernels.gpu.decode import decode_launches
from kvpaged_kernels.gpu.decode_configs import DecodeConfig
from kvpaged_kernels.gpu.launch import Device, Launch
from kvpaged_kernels.gpu.mixed_decode import mixed_decode_launches, mixed_plan_launch
from kvpaged_kernels.gpu.mixed_prefill import mixed_prefill_launch
from kvpaged_kernels.gpu.plan import Shape, plan_launch
from kvpaged_kernels.gpu.prefill import prefill_launch
from kvpaged_kernels.gpu.seal import seal_launch
from kvpaged_kernels.gpu.transfer import fill_launch
from kvpaged_kernels.sealed import Part, Receipt, SliceLayout


class Target(NamedTuple):
    """What is compiled for, the device facts that size its launches, and what a multiprocessor
    has.

    Attributes:
        target: the compiler's name of it.
        device: multiprocessors, and shared memory one block may take.
        shared_of_all: bytes of shared memory that the blocks of a multiprocessor have together.
        warps: the most warps of a multiprocessor.
    """

    target: GPUTarget
    device: Device
    shared_of_all: int
    warps: int


# CUDA C++ programming guide, table of compute capabilities, and the product data sheets; gfx942:
# AMD CDNA 3 white paper (a compute unit: four SIMDs of 8 waves).
TARGETS = {
    name: Target(
        GPUTarget(backend, arch, lanes), Device(name, sms, each * 1024), all_ * 1024, warps
    )
    for name, backend, arch, lanes, sms, each, all_, warps in (
        ("sm_80", "cuda", 80, 32, 108, 163, 164, 64),
        ("sm_90", "cuda", 90, 32, 132, 227, 228, 64),
        ("sm_100", "cuda", 100, 32, 148, 227, 228, 64),
        ("sm_120", "cuda", 120, 32, 170, 99, 100, 48),
        ("gfx942", "hip", "gfx942", 64, 304, 64, 64, 32),
    )
}

_UNIT = 16 * 1009
"""Bytes between entries. Pools have 256; a number that nothing else is multiplied by shows whether
products by it are wide enough, and is aligned as well."""
_ENTRIES = 2**24
_LAYERS = 32
_ROWS = 8
_TOKENS = 4096
_FEW_QUERIES = 8
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _pages(shipped: Shipped, dtype: torch.dtype, dim: int) -> Tensor:
    """A page-major view: pages of all layers back to back, entries in units of 256 bytes."""
    unit = _UNIT // dtype.itemsize
    shape = (_ENTRIES, shipped.kv_heads, shipped.page_size, dim)
    strides = (unit, shipped.page_size * dim, dim, 1)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _attention_launch(shipped: Shipped, device: Device) -> Launch:
    dtype = getattr(torch, shipped.dtype)
    computed = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    q_heads = shipped.kv_heads * shipped.group
    prefill = shipped.kernel == "prefill"
    few = "queries" in shipped.options
    tokens = _TOKENS if prefill else _ROWS * (_FEW_QUERIES if few else 1)
    ragged = _meta(_ROWS + 1, dtype=torch.int32) if prefill or few else None
    window = 4096 if "window" in shipped.options else None
    arguments: dict[str, Any] = {
        "q": _meta(tokens, q_heads, shipped.k_dim, dtype=computed),
        "k_pages": _pages(shipped, dtype, shipped.k_dim),
        "v_pages": _pages(shipped, dtype, shipped.v_dim),
        "block_table": _meta(_ROWS, 1024, dtype=torch.int32),
        "cu_q": ragged,
        "seq_lens": _meta(_ROWS, dtype=torch.int32),
        "out": _meta(tokens, q_heads, shipped.v_dim, dtype=computed),
        "scale": shipped.k_dim**-0.5,
        "softcap": 50.0 if "softcap" in shipped.options else None,
        "sinks": _meta(q_heads, dtype=computed) if "sinks" in shipped.options else None,
        "alibi_slopes": _meta(q_heads, dtype=torch.float32) if "alibi" in shipped.options else None,
    }
    if prefill:
        return prefill_launch(**arguments, max_q=_TOKENS, window=window, device=device)
    shape = Shape(
        rows=_ROWS, kv_heads=shipped.kv_heads, group=shipped.group, k_dim=shipped.k_dim,
        v_dim=shipped.v_dim, page_size=shipped.page_size, max_q=_FEW_QUERIES if few else 1,
        window=window, dtype=dtype,
    )  # fmt: skip
    plan, planning = plan_launch(shape, arguments["seq_lens"], ragged, device)
    if shipped.kernel == "plan":
        return planning
    attending, merging = decode_launches(**arguments, plan=plan)
    return merging if shipped.kernel == "merge" else attending


def sealed_layout(shipped: Shipped) -> SliceLayout:
    """The layout of slices of a configuration of sealed pages, in the groups that formats take."""
    groups = {"int8": min(64, shipped.page_size), "int4": 32}
    k, v = (
        Part("fp8", 8) if code == "fp8" else Part("int", int(code[3:]), group)
        for code, group in zip(
            shipped.options[:2],
            (groups.get(shipped.options[0], 0), max(32, shipped.v_dim // 4)),
            strict=True,
        )
    )
    return SliceLayout.of(
        k, v, kv_heads=shipped.kv_heads, page_size=shipped.page_size, k_dim=shipped.k_dim,
        v_dim=shipped.v_dim, dtype=getattr(torch, shipped.dtype),
    )  # fmt: skip


def _sealed_launch(shipped: Shipped, device: Device) -> Launch:
    layout, dtype = sealed_layout(shipped), getattr(torch, shipped.dtype)
    q_heads = shipped.kv_heads * shipped.group
    k_pages, v_pages = (_pages(shipped, dtype, dim) for dim in (shipped.k_dim, shipped.v_dim))
    slices = torch.empty_strided(
        (_ENTRIES, layout.slice_bytes), (_UNIT, 1), dtype=torch.uint8, device="meta"
    )
    if shipped.kernel == "seal":
        entries = _meta(_ROWS, dtype=torch.int64)
        receipt = Receipt(
            _meta(_ROWS, 1, dtype=torch.int64), _meta(_ROWS, 1, 2, dtype=torch.float32)
        )
        known = "queries" in shipped.options
        return seal_launch(
            k_pages.unsqueeze(1), v_pages.unsqueeze(1), entries, slices.unsqueeze(1), entries,
            layout, receipt,
            _meta(1, shipped.kv_heads, 2, shipped.k_dim, dtype=torch.float32) if known else None,
        )  # fmt: skip
    lens = _meta(_ROWS, dtype=torch.int32)
    options: dict[str, Any] = {
        "keep": 1,
        "scale": shipped.k_dim**-0.5,
        "softcap": None,
        "sinks": _meta(q_heads, dtype=dtype) if "sinks" in shipped.options else None,
        "alibi_slopes": None,
        "device": device,
    }
    window = 4096 if "window" in shipped.options else None
    table = _meta(_ROWS, 1024, dtype=torch.int32)
    if shipped.kernel == "mixed decode":
        plan, _ = mixed_plan_launch(layout, q_heads, lens, window=window, device=device)
        q = _meta(_ROWS, q_heads, shipped.k_dim, dtype=dtype)
        return mixed_decode_launches(
            q, k_pages, v_pages, slices, layout, table, lens,
            _meta(_ROWS, q_heads, shipped.v_dim, dtype=dtype), plan=plan, **options,
        )[0]  # fmt: skip
    own_k, own_v = (
        _meta(64, shipped.kv_heads, shipped.page_size, dim, dtype=dtype)
        for dim in (shipped.k_dim, shipped.v_dim)
    )
    ragged = _meta(_ROWS + 1, dtype=torch.int32)
    return mixed_prefill_launch(
        _meta(_TOKENS, q_heads, shipped.k_dim, dtype=dtype), k_pages, v_pages, slices, layout,
        own_k, own_v, ragged, table, ragged, lens,
        _meta(_TOKENS, q_heads, shipped.v_dim, dtype=dtype), window=window, **options,
    )  # fmt: skip


def decode_on_meta(
    shape: Shape,
    device: Device,
    *,
    config: DecodeConfig | None = None,
    softcap: float | None = None,
) -> Launch:
    """The attention launch of a decode of this shape; `config` takes the table's place."""
    heads = shape.kv_heads * shape.group
    shipped = Shipped("decode", "", shape.k_dim, shape.v_dim, shape.page_size, shape.kv_heads)
    lens = _meta(shape.rows, dtype=torch.int32)
    plan, _ = plan_launch(shape, lens, None, device, config)
    computed = torch.bfloat16 if shape.dtype == torch.float8_e4m3fn else shape.dtype
    q = _meta(shape.rows, heads, shape.k_dim, dtype=computed)
    return decode_launches(
        q, _pages(shipped, shape.dtype, shape.k_dim), _pages(shipped, shape.dtype, shape.v_dim),
        _meta(shape.rows, 1024, dtype=torch.int32), lens, torch.empty_like(q), plan=plan, scale=1.0,
        softcap=softcap,
    )[0]  # fmt: skip


def launch_of(shipped: Shipped, device: Device) -> Launch:
    """The launch of a shipped configuration on a device, over tensors on `device="meta"`."""
    dtype = getattr(torch, shipped.dtype)
    entries = _meta(_ROWS, dtype=torch.int32)
    if shipped.kernel == "append":
        k = _meta(_TOKENS, shipped.kv_heads, shipped.k_dim, dtype=dtype)
        v, v_pages = None, None
        if shipped.v_dim:
            v = _meta(_TOKENS, shipped.kv_heads, shipped.v_dim, dtype=dtype)
            v_pages = _pages(shipped, dtype, shipped.v_dim)
        slots = _meta(_TOKENS, dtype=torch.int64)
        return append_launch(k, v, _pages(shipped, dtype, shipped.k_dim), v_pages, slots)
    if shipped.kernel == "copy":
        shape = (_ENTRIES, 1, 2**20 // dtype.itemsize)
        strides = (_UNIT // dtype.itemsize, shape[2], 1)
        if shipped.dtype == "int8":  # a length that no wider word divides
            shape = (_ENTRIES, 1, 2**20 + 1)
        pages = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        return copy_launch(pages, entries, entries)
    if shipped.kernel == "transfer":  # layer-major pages of 16 KiB a head and kind
        piece = (_LAYERS, shipped.kv_heads, 2**14 // dtype.itemsize)
        apart = (16 * _UNIT // dtype.itemsize, 2**40, 2**32, 1)
        pages = torch.empty_strided((_ENTRIES, *piece), apart, dtype=dtype, device="meta")
        return fill_launch(_meta(_ROWS, *piece, dtype=dtype), pages, entries)
    if shipped.kernel == "checksum":
        words = shipped.page_size * shipped.k_dim // 2
        pieces = 2 * shipped.kv_heads
        tensor = torch.empty_strided(
            (_ENTRIES, _LAYERS, pieces, words),
            (_UNIT // 4, pieces * words, words, 1),
            dtype=dtype,
            device="meta",
        )
        return checksum_launch(tensor, entries, _meta(_ROWS, _LAYERS, dtype=torch.int64), 0)
    if shipped.kernel in ("seal", "mixed decode", "mixed prefill"):
        return _sealed_launch(shipped, device)
    return _attention_launch(shipped, device)


def source_of(launch: Launch) -> ASTSource:
    """What Triton's launcher would compile: pointers aligned, integers specialised by value."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, param in enumerate(launch.kernel.params):
        name, value = param.name, launch.arguments[param.name]
        if (
            param.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and not param.do_not_specialize)
        ):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if param.annotation_type:
                signature[name] = param.annotation_type
            if value % 16 or param.do_not_specialize:
                continue
        attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)
