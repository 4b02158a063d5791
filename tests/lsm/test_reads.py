"""Ranges become calls that read each byte once, to where it belongs."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpaged.lsm.files import aligned
from kvpaged.lsm.layout import BLOCK
from kvpaged.lsm.reads import GAP, Range, plan

DATA = np.random.default_rng(0).integers(0, 256, 1 << 19, dtype=np.uint8)


def read(ranges, request):
    """What is where after the planned calls."""
    planned = plan(ranges, request=request)
    for one in planned.requests:
        at = one.offset
        assert at % BLOCK == 0
        assert one.size == sum(len(piece) for piece in one.into)
        for piece in one.into:
            assert piece.ctypes.data % BLOCK == 0
            assert len(piece) % BLOCK == 0
            raw = DATA[at : at + len(piece)]
            piece[: len(raw)] = raw
            at += len(piece)
    for copies in planned.copies.values():
        for into, source in copies:
            into[:] = source
    return planned


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40_000), st.integers(0, 30_000), st.sampled_from("afn")),
        max_size=12,
    ),
    st.sampled_from([BLOCK, 16 * BLOCK, 1 << 20]),
)
def test_every_range_gets_its_bytes_in_aligned_calls(pieces, request_bytes):
    ranges, at = [], 0
    for owner, (gap, size, kind) in enumerate(pieces):
        at += gap if gap % 3 else -(-gap // BLOCK) * BLOCK - at % -BLOCK
        at += -at % 64
        into = {"a": aligned(size), "f": aligned(size + 1)[1:], "n": None}[kind]
        ranges.append(Range(owner, at, size, into))
        at += size
    planned = read(ranges, request_bytes)
    for one, place in zip(ranges, planned.places, strict=True):
        assert np.array_equal(place, DATA[one.offset : one.offset + one.size])
        assert one.into is None or place is one.into
    asked = sum(one.size for one in ranges)
    done = sum(request.size for request in planned.requests)
    assert done <= asked + 2 * BLOCK * len(ranges) + GAP * len(ranges)
    owners = set().union(*(request.owners for request in planned.requests))
    assert owners == {one.owner for one in ranges if one.size}


def test_neighbours_are_one_read_and_far_ones_two():
    near = [Range(n, n * 3 * BLOCK, 2 * BLOCK, aligned(2 * BLOCK)) for n in range(8)]
    assert (plan(near).runs, len(plan(near).requests)) == (1, 1)
    far = [Range(n, n * 2 * GAP, BLOCK, aligned(BLOCK)) for n in range(3)]
    assert plan(far).runs == 3
    assert plan([]).runs == 0
    large = [Range(0, 0, 1 << 22, aligned(1 << 22))]
    assert (plan(large).runs, len(plan(large).requests)) == (1, 4)
