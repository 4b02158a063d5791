"""The least time each kernel could take: bytes it must move, operations it must do.

Bytes are counted once, as if caches were perfect: what is read twice, partial results and page
tables beyond their size are a kernel's own doing. The floor is the larger of bytes over bandwidth
and operations over the rate of matrix products (the roofline; Williams, Waterman and Patterson,
CACM 52(4), 2009).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Floor(NamedTuple):
    """What a kernel cannot do without.

    Attributes:
        bytes: to and from memory.
        operations: multiplications and additions.
    """

    bytes: int
    operations: int = 0

    def seconds(self, *, bytes_per_s: float, operations_per_s: float) -> float:
        """The least time on a device of these rates."""
        return max(self.bytes / bytes_per_s, self.operations / operations_per_s)


class Heads(NamedTuple):
    """Heads, widths and bytes of an element."""

    q_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    element: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return self.kv_heads * (self.k_dim + self.v_dim) * self.element

    @property
    def query_bytes(self) -> int:
        """One query read and one output written."""
        return self.q_heads * (self.k_dim + self.v_dim) * self.element

    @property
    def pair_operations(self) -> int:
        """Both products of one query token with one token, over all heads."""
        return 2 * self.q_heads * (self.k_dim + self.v_dim)


def attention(
    heads: Heads,
    lengths: Sequence[int],
    queries: Sequence[int],
    *,
    page_size: int,
    window: int | None = None,
) -> Floor:
    """Decode and prefill: the last `queries[i]` of `lengths[i]` tokens attend, causally.

    Each row's K and V in reach of some query is read once, its part of the block table too.
    """
    moved = operations = 0
    for length, count in zip(lengths, queries, strict=True):
        if not count:
            continue
        start = length - count
        first = 0 if window is None else max(0, start - window + 1)
        moved += (length - first) * heads.token_bytes + count * heads.query_bytes
        moved += 4 * -(-(length - first) // page_size) + 4
        pairs = count * start + count * (count + 1) // 2
        if window is not None:
            pairs = sum(min(position + 1, window) for position in range(start, length))
        operations += pairs * heads.pair_operations
    return Floor(moved, operations)


def append(heads: Heads, tokens: int) -> Floor:
    """K and V of new tokens read and written, and where each goes."""
    return Floor(tokens * (2 * heads.token_bytes + 8))


def copy(pages: int, page_bytes: int) -> Floor:
    """Pages read and written, and which."""
    return Floor(pages * (2 * page_bytes + 16))


def checksum(pages: int, page_bytes: int, slices: int) -> Floor:
    """Pages read, a sum a slice written."""
    return Floor(pages * (page_bytes + 8 * slices + 8))


def plan(rows: int, programs: int) -> Floor:
    """Lengths read, a record a program written."""
    return Floor(4 * rows + 16 * (programs + 1))
