"""Ranges of a file as read calls: few, aligned for direct I/O, and straight to where bytes belong.

Pure: nothing here touches a file. Blocks that belong to one destination go there; those that hold
the ends of several, or whose destination is not aligned, are read into memory of their own:

    file      | header | value A, 2.5 blocks  | value B ...
    calls     |  gap   | A[0:2] | own block   | B[0:n] ...      one preadv
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvpaged.lsm.files import Bytes, aligned
from kvpaged.lsm.layout import BLOCK, up

GAP = 64 * 1024
"""Bytes between two ranges that are read with them: cheaper than another call."""
REQUEST = 1 << 20
"""Bytes of a call: drives reach their speed with many of these in flight."""


class Range(NamedTuple):
    """Bytes wanted: `size` from `offset` on, into `into` or wherever they happen to be read."""

    owner: int
    offset: int
    size: int
    into: Bytes | None


@dataclass(eq=False, slots=True)
class Request:
    """One call: buffers that are filled one after another from `offset` on, for some owners."""

    offset: int
    into: list[Bytes] = field(default_factory=list)
    owners: set[int] = field(default_factory=set)
    size: int = 0


class Plan(NamedTuple):
    """How ranges are read.

    Attributes:
        requests: in the order of the file.
        runs: contiguous pieces of the file they make up.
        places: where each range's bytes are afterwards; for those with an `into` that is it.
        copies: (to, from) to be done when all is read, by owner.
    """

    requests: list[Request]
    runs: int
    places: list[Bytes]
    copies: dict[int, list[tuple[Bytes, Bytes]]]


class _Span(NamedTuple):
    start: int
    memory: Bytes
    owners: frozenset[int]

    @property
    def end(self) -> int:
        return self.start + len(self.memory)


def plan(ranges: Sequence[Range], *, request: int = REQUEST) -> Plan:
    """Plan reading ranges of one file; they may not overlap."""
    spans: list[_Span] = []
    loose: list[tuple[int, int, int, int]] = []
    for number, one in enumerate(ranges):
        whole = 0
        if one.into is not None and one.offset % BLOCK == one.into.ctypes.data % BLOCK == 0:
            whole = one.size // BLOCK * BLOCK
        if whole:
            assert one.into is not None
            spans.append(_Span(one.offset, one.into[:whole], frozenset((one.owner,))))
        if whole < one.size:
            loose.append((one.offset + whole, one.offset + one.size, number, whole))
    places: dict[int, Bytes] = {}
    copies: dict[int, list[tuple[Bytes, Bytes]]] = {}
    for start, memory, parts in _merged(loose):
        spans.append(_Span(start, memory, frozenset(ranges[n].owner for _, _, n, _ in parts)))
        for begin, end, number, done in parts:
            piece, into = memory[begin - start : end - start], ranges[number].into
            if into is None:
                places[number] = piece
            else:
                copies.setdefault(ranges[number].owner, []).append((into[done:], piece))
    runs = list(_runs(sorted(spans, key=lambda span: span.start)))
    requests = [one for run in runs for one in _requests(run, request)]
    found = []
    for number, one in enumerate(ranges):
        found.append(one.into if one.into is not None else places.get(number, aligned(0)))
    return Plan(requests, len(runs), found, copies)


def _merged(
    loose: list[tuple[int, int, int, int]],
) -> Iterator[tuple[int, Bytes, list[tuple[int, int, int, int]]]]:
    """Pieces whose blocks touch, with memory for those blocks."""
    group: list[tuple[int, int, int, int]] = []
    start = end = 0
    for piece in sorted(loose):
        if group and piece[0] // BLOCK * BLOCK > end:
            yield start, aligned(end - start), group
            group = []
        if not group:
            start = end = piece[0] // BLOCK * BLOCK
        group.append(piece)
        end = max(end, up(piece[1], BLOCK))
    if group:
        yield start, aligned(end - start), group


def _runs(spans: Sequence[_Span]) -> Iterator[list[_Span]]:
    run: list[_Span] = []
    for span in spans:
        if run and span.start - run[-1].end > GAP:
            yield run
            run = []
        if run and span.start > run[-1].end:
            run.append(_Span(run[-1].end, aligned(span.start - run[-1].end), frozenset()))
        run.append(span)
    if run:
        yield run


def _requests(run: Sequence[_Span], most: int) -> Iterator[Request]:
    current = Request(run[0].start)
    for span in run:
        done = 0
        while done < len(span.memory):
            if current.size >= most:
                yield current
                current = Request(span.start + done)
            step = min(len(span.memory) - done, most - current.size)
            current.into.append(span.memory[done : done + step])
            current.owners |= span.owners
            current.size += step
            done += step
    yield current
