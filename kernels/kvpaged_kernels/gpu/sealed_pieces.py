"""How the kernels of sealed pages take a coded tile apart, as compile-time constants.

Codes are read as *words*: numbers of the model's dtype where they are exact, else int16 with four
codes of 4 bits or two of 8. A word's codes belong to columns that lie apart, so a tile of words is
several operands, its *pieces*, none of which is ever interleaved:

    exact       one piece, all columns
    fp8, int8   two: the even columns, and the odd ones
    int4        four: the quarters of the width

V's integers share parameters over groups of columns. Words are read in tiles so narrow that a
piece's columns lie in one group: tile t of a quarter, or a group's bytes. The pieces of the first
tile come first.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvpaged_kernels.checks import require
from kvpaged_kernels.gpu.launch import E4M3_SCALE, INTERPRETED
from kvpaged_kernels.sealed import Part, SliceLayout

EXACT, FP8, INT8, INT4 = range(4)


class Pieces(NamedTuple):
    """K or V of a head as a kernel reads it.

    Attributes:
        form: `EXACT`, `FP8`, `INT8` or `INT4`.
        words: of a token.
        tiles: of words, side by side.
        width: words of a tile, hence columns of a piece.
        block: `width` padded.
        pieces: of all tiles.
        group: as in `Part`.
        groups: of V's columns; 1 where nothing is shared.
    """

    form: int
    words: int
    tiles: int
    width: int
    block: int
    pieces: int
    group: int
    groups: int


def form_of(part: Part) -> int:
    """A part's form as the kernels number them."""
    if part.form == "int":
        return INT8 if part.bits == 8 else INT4
    return FP8 if part.form == "fp8" else EXACT


def pieces_of(layout: SliceLayout, name: str) -> Pieces:
    """The pieces of K or V ("K", "V").

    Raises ValueError for groups of V that no tile of words fits, and K's of fewer than 16 tokens.
    """
    part, dim = (layout.k, layout.k_dim) if name == "K" else (layout.v, layout.v_dim)
    form = form_of(part)
    each = {EXACT: 1, FP8: 2, INT8: 2, INT4: 4}[form]
    words, width, groups = dim // each, dim // each, 1
    if name == "V" and part.form == "int":
        share = part.group // 2 if form == INT8 else part.group
        width = min(words, share)
        groups = dim // part.group
        require(
            words % width == 0 and share % width == 0 and (form == INT4 or part.group % 2 == 0),
            f"V: kernels on a GPU read groups that are whole quarters of the width or divide one "
            f"(of bytes: an even number), not {part.group} of {dim}",
        )
    elif part.form == "int":
        require(part.group >= 16, f"K: kernels on a GPU read groups of 16 and more, not {part}")
    block = max(16, triton.next_power_of_2(width))
    tiles = words // width
    return Pieces(form, words, tiles, width, block, tiles * each, part.group, groups)


def sealed_arguments(
    slices: Tensor, layout: SliceLayout, score_scale: float, arch: str
) -> dict[str, Any]:
    """The arguments of a kernel that reads sealed pages: the slices seen as K's words, as V's and
    as parameters, how each lies in them, and the factor of scores, `score_scale` elsewhere.
    """
    k_words, v_words = (
        slices.view(layout.dtype if part.form == "exact" else torch.int16)
        for part in (layout.k, layout.v)
    )
    params = slices.view(torch.int16)
    k, v = pieces_of(layout, "K"), pieces_of(layout, "V")
    return {
        "sealed_scale": score_scale * (E4M3_SCALE if k.form == FP8 else 1.0),
        "k_codes": k_words,
        "v_codes": v_words,
        "params": params,
        "STRIDE_K_CODES": k_words.stride(0),
        "STRIDE_V_CODES": v_words.stride(0),
        "STRIDE_PARAMS": params.stride(0),
        "K_CODES_HEAD": layout.head_bytes // k_words.itemsize,
        "V_CODES_HEAD": layout.head_bytes // v_words.itemsize,
        "PARAMS_HEAD": layout.head_bytes // 2,
        "V_CODES": layout.v_codes // v_words.itemsize,
        "K_PARAMS": layout.k_params // 2,
        "V_PARAMS": layout.v_params // 2,
        "K_FORM": k.form,
        "K_WORDS": k.words,
        "K_BLOCK": k.block,
        "K_GROUP": k.group,
        "V_FORM": v.form,
        "V_WORDS": v.words,
        "V_TILES": v.tiles,
        "V_WIDTH": v.width,
        "V_BLOCK": v.block,
        "V_GROUP": v.group,
        "V_GROUPS": v.groups,
        "FP32": layout.dtype == torch.float32,
        "PTX": int(arch.startswith("sm_") and not INTERPRETED),
    }
