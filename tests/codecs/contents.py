"""Bytes to be coded, of every kind."""

import numpy as np
import torch
from hypothesis import strategies as st

from kvpaged.codecs import Bytes, Codec, Lossless, Raw, Zstd

CODECS: tuple[Codec, ...] = (Raw(), Zstd(), Zstd(level=7), Lossless())
DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64,
    torch.complex128, torch.int16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip

# As bits of a float32: zeros, the least and the greatest denormal, infinities, NaNs with payloads.
_SPECIAL = np.array(
    [0, 1 << 31, 1, 0x007F_FFFF, 0x7F80_0000, 0xFF80_0000, 0x7FC0_0001, 0xFFFF_FFFF, 0x7F80_0001],
    np.uint32,
)


def normal(elements: int, dtype: torch.dtype, seed: int = 0) -> Bytes:
    """Bytes of normally distributed numbers, as K and V more or less are."""
    generator = torch.Generator().manual_seed(seed)
    return bytes_of(torch.randn(elements, generator=generator).to(dtype))


def bytes_of(tensor: torch.Tensor) -> Bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def noise(size: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def unaligned(data: Bytes, offset: int) -> Bytes:
    """A copy whose address is `offset` more than a multiple of 16."""
    memory = np.empty(len(data) + 32, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    found = memory[start : start + len(data)]
    found[:] = data
    return found


def framed(size: int) -> tuple[Bytes, Bytes]:
    """Memory with 64 bytes of 0xa5 before and after `size` bytes, and those bytes."""
    memory = np.full(size + 128, 0xA5, np.uint8)
    return memory, memory[64 : 64 + size]


def is_framed(memory: Bytes) -> bool:
    return bool((memory[:64] == 0xA5).all() and (memory[-64:] == 0xA5).all())


@st.composite
def anything(draw: st.DrawFn, most: int = 6000) -> Bytes:
    """Bytes of random length: noise, few values, numbers, special numbers, zeros within noise."""
    size = draw(st.one_of(st.integers(0, 64), st.integers(0, most)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["given", "noise", "few", "floats", "special", "holes", "zeros"]))
    if kind == "given":
        return np.frombuffer(draw(st.binary(max_size=200)), np.uint8)
    if kind == "few":
        return random.choice(np.array([0, 1, 0x3F, 0xBF, 0x80], np.uint8), size)
    if kind == "floats":
        numbers = random.normal(0, draw(st.sampled_from([1e-40, 1.0, 1e30])), size // 4 + 1)
        return numbers.astype(np.float32).view(np.uint8)[:size].copy()
    if kind == "special":
        return random.choice(_SPECIAL, size // 4 + 1).view(np.uint8)[:size].copy()
    data = np.zeros(size, np.uint8) if kind == "zeros" else random.integers(0, 256, size, np.uint8)
    if kind == "holes":
        data[: random.integers(0, size + 1)] = 0
    return data
