"""Launch configurations of attention over sealed pages, as data.

Chosen by what the compiler says of registers and spills on each target (docs/kernels.md); none has
been timed on a GPU yet.
"""

from kvpaged_kernels.gpu.configs import Blocks
from kvpaged_kernels.gpu.decode_configs import DecodeConfig, padded
from kvpaged_kernels.sealed import SliceLayout

EXACT_TOKENS = 16
"""Tokens of a tile of exact pages, of which a sequence has few: not what registers go to."""

_WIDE = ("sm_90", "sm_100", "sm_103")
"""Architectures whose wide multiplications read an operand from shared memory: registers to
spare.
"""


def shared_tokens(layout: SliceLayout, block_n: int) -> int:
    """Tokens of a tile of `block_n` that are multiplied at a time: those with one set of K's
    parameters.
    """
    return min(layout.k.group, block_n) if layout.k.form == "int" else block_n


def mixed_decode_config(layout: SliceLayout, group: int, arch: str) -> DecodeConfig:
    """The configuration of `mixed_decode` for `group` query heads on a KV head.

    Integers are multiplied by one warp a program: what a group of codes shares is worked out once
    a warp, and with four of them each would have a fourth of the codes to use it for.
    """
    head_dim = max(64, padded(max(layout.k_dim, layout.v_dim)))
    if layout.dtype.itemsize == 4:
        config = DecodeConfig(16, 32, 4, 1, 2)
    elif "int" not in (layout.k.form, layout.v.form):
        config = DecodeConfig(32, 64, 4, 3, 2)
    elif head_dim <= 64:
        config = DecodeConfig(16, 32, 1, 3, 12)
    else:
        config = DecodeConfig(16, 32, 1 if head_dim <= 128 else 2, 3, 8 if head_dim <= 128 else 4)
    return config._replace(
        block_m=min(config.block_m, padded(group)), block_n=min(config.block_n, layout.page_size)
    )


def mixed_prefill_blocks(layout: SliceLayout, group: int, arch: str) -> Blocks:
    """The blocks of `mixed_prefill`: as many rows as an own page has, up to what spills nothing."""
    rows = padded(layout.page_size * group)
    if layout.dtype.itemsize == 4:
        return Blocks(min(rows, 16), min(layout.page_size, 32), 4, 1)
    head_dim = max(layout.k_dim, layout.v_dim)
    m, n, warps = 128, 32, 8
    if arch.startswith("gfx") and head_dim > 64:
        m, warps = 64, 4
    elif arch not in _WIDE and head_dim > 64 and (layout.k.bits, layout.v.bits) != (4, 4):
        m, n, warps = 32, 16 if (layout.v.form, layout.v.bits) == ("int", 8) else 32, 4
    if head_dim > 128:
        m, warps = m // 2, 8
    m = min(rows, m)
    return Blocks(m, min(layout.page_size, n), warps if m >= 64 else 4, 3)
