"""A kernel launch as data, and the facts about a device that size one.

A launcher first builds its `Launch` (also from tensors on `device="meta"`) and then runs it, so
that the arithmetic of a launch is tested without memory and the ahead-of-time compiler sees the
very arguments that a real launch passes.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvpaged_kernels.gpu.decode_configs import padded

LOG2_E = 1.4426950408889634
E4M3_SCALE = 256.0
"""What converting e4m3 to fp16 by moving bits leaves out: the exponents' biases differ by 8."""

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter stands in for a GPU (`TRITON_INTERPRET=1` before the import)."""


class Device(NamedTuple):
    """What sizes a launch: architecture (`sm_90`, `gfx942`), multiprocessors, and bytes of shared
    memory one block may take.
    """

    arch: str
    multiprocessors: int
    shared_memory: int


WITHOUT_GPU = Device(arch="sm_80", multiprocessors=4, shared_memory=99 * 1024)
"""Stands in for a device under the interpreter: few multiprocessors, so that programs are few."""


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    # ROCm builds of torch lack the opt-in limit; there the ordinary one is the limit.
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    # CUDA builds have the name too, and put the device's model there.
    amd = properties.gcnArchName.split(":")[0] if torch.version.hip else ""
    return Device(
        arch=amd or f"sm_{properties.major}{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        shared_memory=shared or properties.shared_memory_per_block,
    )


def device_of(tensor: Tensor) -> Device:
    """The facts about `tensor`'s device, asked once per device."""
    if tensor.device.type != "cuda":
        return WITHOUT_GPU
    index = tensor.device.index
    return _cuda_device(torch.cuda.current_device() if index is None else index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel launch. UPPERCASE arguments are compile-time constants.

    `max_registers`: of a thread, on NVIDIA. Left to itself the assembler may spill to reach an
    occupancy that nobody asked for.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told beside the arguments; fusion is Triton's default, named."""
        chosen = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if self.max_registers is not None:
            chosen["maxnreg"] = self.max_registers
        return chosen

    def run(self, device: torch.device) -> None:
        """Launch on `device`'s current stream."""
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with guard:
            self.kernel[self.grid](**self.arguments, **self.options)


def bounded(window: int | None) -> int:
    """A window as the kernels take it: 0 for none, and at most 2**30, past which positions less a
    window would leave int32 (no row is that long).
    """
    return 0 if window is None else min(window, 2**30)


def attention_arguments(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    arch: str,
) -> dict[str, Any]:
    """The arguments that the decode and the prefill kernel have in common.

    log2(e) is folded into the factor of the scores. With a cap c, c*tanh(s/c) is computed as
    `primitives.capped` says, which takes the factor 2*log2(e)*scale/c. Pages of e4m3 numbers go in
    as int16 pairs; what their conversion leaves out of K is in the factor too.
    """
    fp8 = 0
    k_dim, v_dim = k_pages.shape[3], v_pages.shape[3]
    if k_pages.dtype == torch.float8_e4m3fn:
        fp8 = 2 if arch.startswith("sm_") and not INTERPRETED else 1
        k_pages, v_pages = k_pages.view(torch.int16), v_pages.view(torch.int16)
        scale *= E4M3_SCALE
    # A tile of pairs is half as wide, and a product's operands are at least 16.
    least = 32 if fp8 else 16
    score_scale, cap = scale * LOG2_E, 0.0
    if softcap is not None:
        score_scale, cap = 2.0 * score_scale / softcap, softcap * LOG2_E
    return {
        "q": q,
        "k_pages": k_pages,
        "v_pages": v_pages,
        "block_table": block_table,
        "stride_k_head": k_pages.stride(1),
        "stride_v_head": v_pages.stride(1),
        "stride_table_row": block_table.stride(0),
        "q_heads": q.shape[1],
        "window": bounded(window),
        "score_scale": score_scale,
        "cap": cap,
        "STRIDE_K_ENTRY": k_pages.stride(0),
        "STRIDE_V_ENTRY": v_pages.stride(0),
        "STRIDE_K_SLOT": k_pages.stride(2),
        "STRIDE_V_SLOT": v_pages.stride(2),
        "GROUP": q.shape[1] // k_pages.shape[1],
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "BLOCK_K": max(least, padded(k_dim)),
        "BLOCK_V": max(least, padded(v_dim)),
        "PAGE_SIZE": k_pages.shape[2],
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "FP8": fp8,
    }
