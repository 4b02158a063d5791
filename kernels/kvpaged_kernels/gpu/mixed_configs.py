"""Launch configurations of attention over sealed pages, as data.

Chosen by what the compiler says of registers and spills on each target (docs/kernels.md); none has
been timed on a GPU yet.
"""

from kvpaged_kernels.gpu.decode_configs import DecodeConfig, padded
from kvpaged_kernels.sealed import SliceLayout

EXACT_TOKENS = 16
"""Tokens of a tile of exact pages, of which a sequence has few: not what registers go to."""


def shared_tokens(layout: SliceLayout, block_n: int) -> int:
    """Tokens of a tile of `block_n` that are multiplied at a time: those with one set of K's
    parameters.
    """
    return min(layout.k.group, block_n) if layout.k.form == "int" else block_n


def mixed_decode_config(layout: SliceLayout, group: int, arch: str) -> DecodeConfig:
    """The configuration of `mixed_decode` for `group` query heads on a KV head."""
    wide = layout.dtype.itemsize == 4
    return DecodeConfig(
        block_m=min(16 if wide else 32, padded(group)),
        block_n=min(layout.page_size, 32 if wide else 64),
        num_warps=4,
        num_stages=1 if wide else 3,
        programs_per_sm=2,
    )
