"""The oracle of `fill_pages`."""

from torch import Tensor

from kvpaged_kernels.checks import check_fill


def fill_pages(records: Tensor, pages: Tensor, entries: Tensor) -> None:
    """Copy pieces of records into pages.

    - `records`: `[n, slices, pieces, piece_len]` of any dtype, last stride 1, on the device of the
      pages or in pinned host memory.
    - `pages`: `[entries_total, slices, pieces, piece_len]` of that dtype, last stride 1,
      **mutated**. It may overlap itself in dimension 0.
    - `entries`: int32 or int64 `[n]`, distinct.

    Bytes are copied exactly. Raises ValueError where shapes, strides, dtypes or devices disagree.
    """
    check_fill(records, pages, entries)
    for row, entry in enumerate(entries.tolist()):
        pages[entry].copy_(records[row])
