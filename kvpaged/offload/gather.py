"""Pages of a sequence, from wherever they are, as records: to be kept or sent elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import IntegrityError, StorageError
from kvpaged.keys import TOKEN_BYTES
from kvpaged.offload.copies import Sums
from kvpaged.offload.pool import PoolView
from kvpaged.offload.stack import Stack
from kvpaged.pages.trail import Trail
from kvpaged.tiers.base import Record, Tier
from kvpaged.tiers.record import Head, body_sums, record_key

T = TypeVar("T")

CALL_BYTES = 16 << 20
"""Of the bodies that are in memory at a time, about."""


class Piece(NamedTuple):
    """The page of one layer group at a place of a sequence.

    Attributes:
        place, group: which.
        key, before: page keys of it and of the one before.
        tokens: its token ids, encoded.
        page: where it is in the pool, or `None`.
        tier: else the tier that has its record, or `None`.
    """

    place: int
    group: int
    key: bytes
    before: bytes
    tokens: bytes
    page: int | None = None
    tier: int | None = None


class Located(NamedTuple):
    """The pages of a sequence that are somewhere, by ascending places, and those that are not."""

    here: list[Piece]
    missing: list[Piece]


class Gathered(NamedTuple):
    """A page: which, the checksums of its slices, int64 `[layers]`, and its body, uint8 `[bytes]`,
    which has been found to have them.
    """

    piece: Piece
    sums: Sums
    body: Tensor


def pieces_of(trail: Trail, tokens: bytes, page_size: int, firsts: Sequence[int]) -> list[Piece]:
    """The pages of encoded `tokens`: of each layer group from page `firsts[group]` on."""
    width = page_size * TOKEN_BYTES
    before, pieces = trail.root.region.first, []
    for place, key in enumerate(trail.page_keys(tokens, page_size)):
        text = tokens[place * width : (place + 1) * width]
        for group, first in enumerate(firsts):
            if place >= first:
                pieces.append(Piece(place, group, key, before, text))
        before = key
    return pieces


def locate(
    view: PoolView, stack: Stack | None, trail: Trail, tokens: bytes, firsts: Sequence[int]
) -> Located:
    """Where the pages of encoded `tokens` are; the cache's lock is held.

    Args:
        view, stack: the pool and the tiers, if there are any.
        trail: of the sequence.
        tokens: all of full pages.
        firsts: of each layer group, the first logical page that matters.
    """
    size = view.index.page_size
    match = view.index.find(trail, tokens, len(tokens) // TOKEN_BYTES)
    nodes = match.nodes[: match.tokens // size]
    found = Located([], [])
    if stack is not None:
        stack.settle()
    up = [] if stack is None else stack.up()
    for piece in pieces_of(trail, tokens, size, firsts):
        page = nodes[piece.place].pages[piece.group] if piece.place < len(nodes) else None
        at = None
        if page is None and stack is not None:
            with stack.lock:
                at = stack.where(record_key(piece.key, piece.group), up)
        one = piece._replace(page=page, tier=None if at is None else at[0])
        found[page is None and at is None].append(one)
    return found


def record_of(view: PoolView, one: Gathered) -> Record:
    """The record of a page."""
    piece = one.piece
    head = Head.of(
        view.geometry(piece.group, piece.place), group=piece.group, depth=piece.place + 1,
        key=piece.key, before=piece.before, tokens=piece.tokens, sums=one.sums,
    )  # fmt: skip
    return head.record(one.body)


class Gathering:
    """Reads located pages, some at a time, each checked. A context, for one thread; pages of the
    pool are leased until it is left.

    Iterating raises `StorageError` if a tier fails or has lost a page, `IntegrityError` if bytes
    are not what was sealed.
    """

    def __init__(self, view: PoolView, stack: Stack | None, pieces: Sequence[Piece]) -> None:
        """The cache's lock is held, and was since the pages were located."""
        self._view, self._stack, self._pieces = view, stack, list(pieces)
        self._leases = []
        for group, page_class in enumerate(view.classes):
            pages = [p.page for p in pieces if p.group == group and p.page is not None]
            ids = np.array(pages, np.int32)
            self._leases.append((page_class.allocator, page_class.allocator.lease(ids)))
        self._leaving = ExitStack()
        if stack is not None:  # what is on its way into a tier stays where it was found
            keys = [record_key(p.key, p.group) for p in pieces if p.tier == len(stack.levels)]
            self._leaving.enter_context(stack.leaving.read(keys, ()))

    def __enter__(self) -> "Gathering":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._leaving.close()
        leases, self._leases = self._leases, []
        with self._view.lock:
            for allocator, lease in leases:
                allocator.end_lease(lease)

    def __iter__(self) -> Iterator[list[Gathered]]:
        start = 0
        while start < len(self._pieces):
            stop, size = start, 0
            while stop < len(self._pieces) and size < CALL_BYTES:
                size += self._view.body_bytes(self._pieces[stop].group, self._pieces[stop].place)
                stop += 1
            yield self._fetch(self._pieces[start:stop])
            start = stop

    def _fetch(self, pieces: Sequence[Piece]) -> list[Gathered]:
        found: dict[int, Gathered] = {}
        kinds: dict[tuple[int, int | None, int], list[int]] = {}
        for number, piece in enumerate(pieces):
            size = self._view.body_bytes(piece.group, piece.place)
            kinds.setdefault((piece.group, piece.tier, size), []).append(number)
        for (group, tier, size), numbers in kinds.items():
            some = [pieces[number] for number in numbers]
            rooms = host_room(self._view, group, size, len(some))
            if tier is None:
                sums = self._copy_out(group, some, rooms)
            else:
                sums = self._read(group, tier, some, rooms)
            geometry = self._view.geometry(group, some[0].place)
            wrong = (body_sums(rooms, geometry) != sums).any(1)
            if wrong.any():
                place = some[int(wrong.argmax())].place
                raise IntegrityError(
                    f"page {place}, layer group {group}: its bytes are not what was sealed"
                )
            for number, one, total, body in zip(numbers, some, sums, rooms, strict=True):
                found[number] = Gathered(one, total, body)
        return [found[number] for number in range(len(pieces))]

    def _copy_out(self, group: int, pieces: Sequence[Piece], rooms: Tensor) -> Sums:
        ids = np.array([piece.page for piece in pieces], np.int32)
        ticket = self._view.copies[group].out(ids, rooms)
        ticket.wait()
        return ticket.sums()

    def _read(self, group: int, number: int, pieces: Sequence[Piece], rooms: Tensor) -> Sums:
        stack = self._stack
        assert stack is not None
        keys = [record_key(piece.key, group) for piece in pieces]

        def read(tier: Tier) -> list[bytes | None]:
            heads: list[bytes | None] = []
            with tier.read(keys, list(rooms)) as found:
                for record, room in zip(found, rooms, strict=True):
                    good = record is not None and record.body.numel() == room.numel()
                    if record is not None and good and record.body.data_ptr() != room.data_ptr():
                        room.copy_(record.body)
                    heads.append(record.head if record is not None and good else None)
            return heads

        name = stack.tiers[number].name
        heads: list[bytes | None] = ask(stack, number, read)
        sums = []
        for piece, text in zip(pieces, heads, strict=True):
            if text is None:
                raise StorageError(f"tier {name} has lost page {piece.place}, layer group {group}")
            head = Head.decode(text)
            geometry = self._view.geometry(group, piece.place)
            head.check(piece.key, group, piece.tokens, geometry, rooms.shape[1])
            sums.append(head.sums)
        return np.stack(sums)


def host_room(view: PoolView, group: int, size: int, pages: int) -> Tensor:
    """Memory for the bodies of pages, of `size` bytes each, uint8 `[pages, size]`, pinned where
    copies want that.
    """
    pin = not view.immediate[group] and torch.cuda.is_available()
    return torch.empty(pages, size, dtype=torch.uint8, pin_memory=pin)


def ask(
    stack: Stack, number: int, work: Callable[[Tier], T], timeout: float | None = None, *,
    kind: str = "read",
) -> T:  # fmt: skip
    """What a tier answers, waited for as long as `timeout` seconds (`None`: of a call that writes).
    `kind`: see `Stack.call`.

    Raises:
        StorageError: it fails, is too slow, or is not asked now.
    """
    timeout = stack.options.write_deadline_s if timeout is None else timeout
    try:
        answer: T = stack.call(number, work, timeout, kind=kind)
    except Exception as error:  # whatever a tier raises
        raise StorageError(f"tier {stack.tiers[number].name}: {error!r}") from error
    return answer


def put(view: PoolView, stack: Stack, number: int, pages: Sequence[Gathered]) -> bool:
    """Put pages to a tier and wait; whether it took them all, or had them."""
    job = stack.put(number, [record_of(view, one) for one in pages])
    return stack.finish(number, job) == len(pages)
