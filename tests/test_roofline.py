"""The least a kernel must move and compute, against counting it token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import roofline

HEADS = roofline.Heads(q_heads=6, kv_heads=2, k_dim=64, v_dim=32, element=2)


@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 70),
)
def test_attention(rows, window):
    lengths = [max(a, b) for a, b in rows]
    counts = [min(a, b) for a, b in rows]
    seen_bytes = pairs = queries = numbers = 0
    for length, count in zip(lengths, counts, strict=True):
        seen = set()
        for position in range(length - count, length):
            mine = [j for j in range(position + 1) if window is None or j > position - window]
            pairs += len(mine)
            seen.update(mine)
        seen_bytes += len(seen) * 2 * (64 + 32) * 2
        queries += count
        numbers += 4 * -(-len(seen) // 16) + 4 if count else 0
    floor = roofline.attention(HEADS, lengths, counts, page_size=16, window=window)
    assert floor.operations == pairs * 6 * 2 * (64 + 32)
    assert floor.bytes == seen_bytes + queries * 6 * (64 + 32) * 2 + numbers


def test_the_slower_of_memory_and_arithmetic_decides():
    floor = roofline.Floor(bytes=1000, operations=4000)
    assert floor.seconds(bytes_per_s=100.0, operations_per_s=1000.0) == 10.0
    assert floor.seconds(bytes_per_s=1000.0, operations_per_s=100.0) == 40.0


def test_the_other_kernels():
    assert roofline.append(HEADS, 3).bytes == 3 * (2 * 384 + 8)
    assert roofline.copy(2, 1000).bytes == 2 * 2016
    assert roofline.checksum(2, 1000, slices=4).bytes == 2 * 1040
    assert roofline.plan(10, 263).bytes == 40 + 16 * 264
    assert roofline.plan(10, 263).operations == 0


@pytest.mark.parametrize(("batch", "length", "mib"), [(1, 8192, 32), (32, 1024, 128)])
def test_a_decode_of_a_known_size(batch, length, mib):
    """32 / 8 heads of 128 in bf16: 4 KiB a token, beside which queries and tables are little."""
    heads = roofline.Heads(32, 8, 128, 128, 2)
    floor = roofline.attention(heads, [length] * batch, [1] * batch, page_size=16)
    assert mib * 2**20 < floor.bytes < 1.02 * mib * 2**20
