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

from typing import NamedTuple

import torch
import triton

from kvpaged_kernels.checks import require
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

    def constants(self, name: str) -> dict[str, int]:
        """As the kernels' arguments of K or V."""
        return {
            f"{name}_FORM": self.form,
            f"{name}_WORDS": self.words,
            f"{name}_TILES": self.tiles,
            f"{name}_WIDTH": self.width,
            f"{name}_BLOCK": self.block,
            f"{name}_GROUP": self.group,
            f"{name}_GROUPS": self.groups,
        }


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


def word_dtype(layout: SliceLayout, name: str) -> torch.dtype:
    """The dtype that a slice is seen in to read K's or V's words."""
    part = layout.k if name == "K" else layout.v
    return layout.dtype if part.form == "exact" else torch.int16
