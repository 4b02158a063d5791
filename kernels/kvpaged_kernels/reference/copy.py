"""The oracle of `copy_pages`."""

from torch import Tensor

from kvpaged_kernels.checks import check_copy


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole pages inside one pool.

    - `pages`: `[entries, pieces, piece_len]` of any dtype, last stride 1, **mutated**: a page is
      `pieces` runs of `piece_len` contiguous elements. It may overlap itself in dimension 0.
    - `src`, `dst`: int32 or int64 `[n]`, entries; `dst` distinct and disjoint from `src`.

    Bytes are copied exactly. Raises ValueError where shapes, strides, dtypes or devices disagree.
    """
    check_copy(pages, src, dst)
    for source, target in zip(src.tolist(), dst.tolist(), strict=True):
        pages[target].copy_(pages[source])
