"""How a layer's K and V lie in a sealed page: codes and what they mean, in bytes.

A slice is one layer of a page, head after head; a head is

    | K codes | V codes | K parameters | V parameters | 0 .. to a multiple of 16 |

    K codes        [slot, k_dim], as the form says
    K parameters   uint16 [page_size / group, k_dim]: channels share one over `group` tokens; of
                   fp8, fp16 [k_dim]: the middle of each channel over the page
    V parameters   uint16 [v_dim / group, page_size]: tokens share one over `group` elements

Forms of codes: "exact", the numbers of the model's dtype; "fp8", e4m3 bytes, in K of what is left
of a number less its channel's middle; "int", unsigned integers of 8 or 4 bits. Four-bit codes of a
token are `dim / 4` little-endian uint16, of which number `i` holds those of the dimensions i,
i + dim / 4, i + dim / 2 and i + 3 dim / 4, from the lowest bits up: kernels read each nibble as one
operand of a quarter of the width.

Integers have parameters of two bytes: the upper byte is a scale, the lower a zero point. Both are
pieces of fp16 numbers: the scale the highest 8 bits behind the sign (5 of exponent, 3 of mantissa),
the zero point a sign, then 3 bits of exponent and 4 of mantissa:

    scale = fp16 of the bits  (p >> 8) << 7
    zero  = fp16 of the bits  (p & 0x80) << 8 | (p & 0x7f) << 6,  times 2**15     (0 .. 248)

and a code stands for scale * (code + zero * 2**bits / 16). So a zero point reaches 15 ranges of
codes away from 0, and is exact to a quarter of a step where 0 lies within them.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["exact", "fp8", "int"]

SCALE_SHIFT, ZERO_SHIFT = 7, 6
"""Bits at the end of an fp16 number that a scale, and a zero point, do without."""

ZERO_UNIT = 2.0**15
"""What a zero point's fp16 number is multiplied by, for codes of 4 bits; 16 times that for 8."""

HEAD_ALIGN = 16

MOVES, MOVE_BLOCK = 2, 16
"""Of keys of 4 bits, codes that are moved by a step where queries are known, of so many channels of
each quarter at a time: see `reference.moves`.
"""


class Part(NamedTuple):
    """How K or V is coded.

    Attributes:
        form: see the module.
        bits: of a code: those of the dtype, 8 (fp8, int), or 4 (int).
        group: of integers: how many share a parameter, tokens in K, elements in V.
    """

    form: Form
    bits: int
    group: int = 0


class Receipt(NamedTuple):
    """What is known of slices that were made.

    Attributes:
        sums: int64 `[n, layers]`, their checksums, as `reference.checksum` defines them.
        errors: fp32 `[n, layers, 2]`, the largest absolute error of K and of V.
    """

    sums: Tensor
    errors: Tensor


class SliceLayout(NamedTuple):
    """Where the parts of one head lie, in bytes from its beginning.

    Attributes:
        kv_heads, page_size, k_dim, v_dim, dtype: of the exact page.
        k, v: how each is coded.
        v_codes, k_params, v_params: where they begin; K's codes begin at 0.
        head_bytes: from a head to the next.
    """

    kv_heads: int
    page_size: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    k: Part
    v: Part
    v_codes: int
    k_params: int
    v_params: int
    head_bytes: int

    @property
    def slice_bytes(self) -> int:
        """Bytes of a layer in a page."""
        return self.kv_heads * self.head_bytes

    @classmethod
    def of(
        cls, k: Part, v: Part, *, kv_heads: int, page_size: int, k_dim: int, v_dim: int,
        dtype: torch.dtype,
    ) -> "SliceLayout":  # fmt: skip
        """The layout of a layer.

        Raises:
            ValueError: a part's group does not divide what it is of, or a width can't be coded so.
        """
        _check("K", k, page_size, k_dim, dtype)
        _check("V", v, v_dim, v_dim, dtype)
        v_codes = page_size * k_dim * k.bits // 8
        k_params = v_codes + page_size * v_dim * v.bits // 8
        each = {"exact": 0, "fp8": 1, "int": page_size // max(k.group, 1)}[k.form]
        v_params = k_params + 2 * k_dim * each
        end = v_params + (2 * page_size * (v_dim // v.group) if v.form == "int" and v_dim else 0)
        head_bytes = -(-end // HEAD_ALIGN) * HEAD_ALIGN
        return cls(
            kv_heads, page_size, k_dim, v_dim, dtype, k, v, v_codes, k_params, v_params, head_bytes
        )  # fmt: skip


def _check(name: str, part: Part, count: int, dim: int, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless numbers of a head, `dim` wide, can be coded so."""
    wanted = {"exact": (8 * dtype.itemsize,), "fp8": (8,), "int": (8, 4)}[part.form]
    if part.bits not in wanted:
        raise ValueError(f"{name}: codes of form {part.form!r} have {wanted} bits, not {part.bits}")
    if part.form != "int":
        return
    if part.group < 1 or count % part.group:
        raise ValueError(f"{name}: groups of {part.group} do not divide {count}")
    if part.bits == 4 and dim % 4:
        raise ValueError(f"{name}: codes of 4 bits need a width that 4 divides, not {dim}")
