"""Prefilled documents as files, from one cache to another of the same model."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvpaged.books import CacheBooks
from kvpaged.errors import IntegrityError, OutOfPagesError, UsageError
from kvpaged.keys import encode_tokens, namespace_digest
from kvpaged.offload.copies import Sums
from kvpaged.offload.gather import (
    CALL_BYTES,
    Gathered,
    Gathering,
    Located,
    Piece,
    host_room,
    locate,
    pieces_of,
    put,
)
from kvpaged.offload.pool import PoolView
from kvpaged.pages.allocator import SEALED
from kvpaged.pages.trail import Trail
from kvpaged.tiers.document import DocumentReader, Group, Header, write_document
from kvpaged.tiers.record import Head, body_sums, record_key
from kvpaged.tokens import Ids


def export_document(
    cache: CacheBooks, path: str | os.PathLike[str], ids: Ids, trail: Trail | None, extra: bytes
) -> int:
    """See `PagedKVCache.export_document`. `trail`: of the document; `extra`: of its region."""
    size = cache.config.page_size
    trail = _shared(cache, trail)
    pages = len(ids) // size
    if not pages:
        raise UsageError(f"a document has at least a page of {size} tokens, this one {len(ids)}")
    tokens = encode_tokens(ids[: pages * size])
    view, stack = cache.page_view(), None if cache.mover is None else cache.mover.stack
    firsts = _firsts(cache, pages)
    plain = list(Trail(trail.root).page_keys(tokens, size))
    header = Header(
        namespace_digest(cache.namespace), extra, tokens, size,
        tuple(
            Group(group.geometry, group.window, first)
            for group, first in zip(cache.groups, firsts, strict=True)
        ),
    )  # fmt: skip
    with cache.lock:
        found = locate(view, stack, trail, tokens, firsts)
        _check_complete(cache, found, pages)
        gathering = Gathering(view, stack, found.here)
    with gathering:
        write_document(path, header, _as_pages(view, gathering, plain, trail.root.region.first))
    return pages * size


def _as_pages(
    view: PoolView, gathering: Gathering, keys: Sequence[bytes], first: bytes
) -> Iterator[tuple[Head, Tensor]]:
    for some in gathering:
        for piece, sums, body in some:
            place, geometry = piece.place, view.classes[piece.group].geometry
            head = Head(
                group=piece.group, geometry=geometry, depth=place + 1, key=keys[place],
                before=keys[place - 1] if place else first, tokens=piece.tokens, sums=sums,
            )  # fmt: skip
            yield head, body


def import_document(
    cache: CacheBooks, path: str | os.PathLike[str], trail_of: Callable[[bytes], Trail | None]
) -> int:
    """See `PagedKVCache.import_document`. `trail_of`: where it is to be, by `Header.extra`."""
    with DocumentReader(path) as reader:
        header = reader.header
        trail = _shared(cache, trail_of(header.extra))
        _check_kind(cache, header, path)
        plain = list(Trail(trail.root).page_keys(header.tokens, header.page_size))
        reader.check(plain)
        return _Import(cache, reader, trail, plain).run()


def _shared(cache: CacheBooks, trail: Trail | None) -> Trail:
    if trail is None:
        why = cache.private or "nothing is kept for others"
        raise UsageError(f"documents are of pages that others may have, but {why}")
    return trail


def _firsts(cache: CacheBooks, pages: int) -> list[int]:
    """Of each layer group, the first page that the token after so many pages sees."""
    size = cache.config.page_size
    return [
        0 if group.window is None else max(pages * size - group.window + 1, 0) // size
        for group in cache.groups
    ]


def _check_complete(cache: CacheBooks, found: Located, pages: int) -> None:
    size = cache.config.page_size
    whole = [p.place for p in found.missing if cache.groups[p.group].window is None]
    if whole or (found.missing and all(group.window for group in cache.groups)):
        there = min(whole or [p.place for p in found.missing]) * size
        raise UsageError(
            f"of the document's {pages * size} tokens in full pages the first {there} are computed "
            "and kept: compute the rest in a session, then export it"
        )
    if found.missing:
        raise UsageError(
            f"of the document's {pages * size} tokens all are computed, but pages of layers with a "
            f"window are gone, the first of page {found.missing[0].place}: compute it again from "
            "there"
        )


def _check_kind(cache: CacheBooks, header: Header, path: str | os.PathLike[str]) -> None:
    mine = namespace_digest(cache.namespace)
    if header.namespace != mine:
        raise UsageError(
            f"{os.fspath(path)} is of another model (or other weights, adapters or a namespace of "
            f"yours): {header.namespace.hex()}, and this cache serves {mine.hex()}"
        )
    if header.page_size != cache.config.page_size or len(header.groups) != len(cache.groups):
        raise UsageError(
            f"the document has pages of {header.page_size} tokens in {len(header.groups)} layer "
            f"groups, this cache of {cache.config.page_size} in {len(cache.groups)}"
        )
    firsts = _firsts(cache, header.pages)
    for number, (theirs, ours) in enumerate(zip(header.groups, cache.groups, strict=True)):
        here = Group(ours.geometry, ours.window, firsts[number])
        if (theirs.facts(), theirs.window, theirs.first) != (
            here.facts(), here.window, here.first
        ):  # fmt: skip
            raise UsageError(f"layer group {number} of the document is {theirs}, here it is {here}")


class _Home(NamedTuple):
    """A page of the pool for one of a document; a new one is to be filled."""

    place: int
    page: int
    new: bool


def _order(piece: Piece) -> tuple[int, int]:
    return piece.place, piece.group


class _Import:
    """A document on its way into a cache: chunk by chunk into the pool until that is full, and into
    the tiers. It holds the pages it entered until the end.
    """

    def __init__(
        self, cache: CacheBooks, reader: DocumentReader, trail: Trail, plain: Sequence[bytes]
    ) -> None:
        """`plain`: page keys of the unsalted sequence, which the file has."""
        self._cache, self._reader, self._plain = cache, reader, plain
        self._view = cache.page_view()
        self._trail = trail
        header = reader.header
        self._firsts = [group.first for group in header.groups]
        self._pieces = pieces_of(trail, header.tokens, header.page_size, self._firsts)
        self._held: list[list[int]] = [[] for _ in header.groups]
        self._there: list[set[int]] = [set() for _ in header.groups]
        """Of each group, places whose pages are in the pool or in a tier."""
        self._room = True

    def run(self) -> int:
        """Take it all in; how many tokens are there."""
        self._reader.rewind()
        try:
            for some in self._chunks():
                pages = self._read(some)
                self._enter(pages)
                self._put(pages)
        finally:
            with self._cache.lock:
                if not self._cache.closed:
                    self._release(self._held)
        return self._usable() * self._cache.config.page_size

    def _chunks(self) -> Iterator[list[Piece]]:
        """Pieces of whole logical pages, so many bytes together."""
        some: list[Piece] = []
        size = 0
        for piece in self._pieces:
            if some and size >= CALL_BYTES and piece.place != some[-1].place:
                yield some
                some, size = [], 0
            some.append(piece)
            size += self._view.body_bytes(piece.group, piece.place)
        yield some

    def _read(self, pieces: Sequence[Piece]) -> list[list[Gathered]]:
        """Pages of each group, which lie side by side."""
        groups = range(len(self._firsts))
        counts = [sum(piece.group == group for piece in pieces) for group in groups]
        rooms = [
            host_room(self._view, group, self._view.body_bytes(group, 0), counts[group])
            for group in groups
        ]
        found: list[list[Gathered]] = [[] for _ in groups]
        for piece in pieces:
            mine = found[piece.group]
            room = rooms[piece.group][len(mine)]
            head = self._reader.page(piece.place, piece.group, self._plain, room)
            mine.append(Gathered(piece, head.sums, room))
        for group in groups:  # the file may have changed since it was checked
            if counts[group]:
                sums = body_sums(rooms[group], self._view.classes[group].geometry)
                if (sums != _sums(found[group])).any():
                    raise IntegrityError("the document has changed while it was read")
        return found

    # -- into the pool -----------------------------------------------------------------------------

    def _enter(self, pages: list[list[Gathered]]) -> None:
        """Put pages into the pool and the prefix index, as far as there is room: those from the
        first on.
        """
        if not self._room:
            return
        with self._cache.lock:
            self._cache.check_open()
            self._cache.collect_garbage()
            homes = self._take(pages)
        try:
            for group, mine in enumerate(homes):
                self._fill(group, pages[group], mine)
        except BaseException:
            with self._cache.lock:
                self._release([[home.page for home in mine] for mine in homes])
            raise
        with self._cache.lock:
            self._into_index(homes)

    def _take(self, pages: list[list[Gathered]]) -> list[list[_Home]]:
        """For each page one of the pool, held: that of the same tokens, where it is there, or a new
        one; those from the first on for which there is room. The lock is held.
        """
        header = self._reader.header
        match = self._view.index.find(self._trail, header.tokens, header.pages * header.page_size)
        nodes = match.nodes[: match.tokens // header.page_size]
        homes: list[list[_Home]] = [[] for _ in pages]
        for piece in sorted((one.piece for some in pages for one in some), key=_order):
            place, group = piece.place, piece.group
            allocator, mine = self._view.classes[group].allocator, homes[group]
            there = nodes[place].pages[group] if place < len(nodes) else None
            try:
                if there is not None:
                    allocator.share(np.array([there], np.int32))
                    mine.append(_Home(place, there, new=False))
                else:
                    last = mine[-1].page if mine else None
                    mine.append(_Home(place, int(allocator.alloc(1, last)[0]), new=True))
            except OutOfPagesError:
                self._room = False
                over = [[h for h in some if h.place >= place] for some in homes]
                self._release([[home.page for home in some] for some in over])
                return [[h for h in some if h.place < place] for some in homes]
        return homes

    def _release(self, pages: list[list[int]]) -> None:
        for page_class, ids in zip(self._view.classes, pages, strict=True):
            page_class.allocator.release(np.array(ids, np.int32))

    def _fill(self, group: int, pages: list[Gathered], homes: list[_Home]) -> None:
        """Copy bodies, which lie side by side, to new pages."""
        layers = slice(0, self._view.classes[group].geometry.layers)
        both = list(zip(pages, homes, strict=False))
        for new, run in itertools.groupby(both, key=lambda each: each[1].new):
            some = list(run)
            if not new:
                continue
            ids = np.array([home.page for _, home in some], np.int32)
            first = some[0][0].body
            bodies = first.as_strided((len(ids), first.numel()), (first.numel(), 1))
            sums = _sums([one for one, _ in some])
            ticket = self._view.copies[group].into(ids, bodies, sums, layers)
            ticket.wait()
            wrong = ticket.wrong()
            if wrong.any():
                place = some[int(wrong.argmax())][1].place
                raise IntegrityError(
                    f"page {place}, layer group {group}, did not reach the pool whole"
                )

    def _into_index(self, homes: list[list[_Home]]) -> None:
        """Enter pages that are filled; the lock is held."""
        places: dict[int, list[int | None]] = {}
        for group, mine in enumerate(homes):
            allocator = self._view.classes[group].allocator
            new = np.array([home.page for home in mine if home.new], np.int32)
            allocator.states[new] = SEALED
            self._cache.counters.sealed += len(new)
            self._held[group] += [home.page for home in mine]
            for home in mine:
                places.setdefault(home.place, [None] * len(homes))[group] = home.page
        # Where all groups have a window, the first pages of a document are in none.
        for place in range(self._trail.node.depth, max(places, default=-1) + 1):
            pages = places.get(place, [None] * len(homes))
            node = self._view.index.enter(self._trail, self._reader.header.text(place), pages)
            if node is None:
                self._room = False
                return
            for group, (page, there) in enumerate(zip(pages, node.pages, strict=True)):
                if page is None or there is None:
                    continue
                if there != page:  # somebody else was first
                    self._view.classes[group].allocator.share(np.array([there], np.int32))
                    self._held[group].append(there)
                self._there[group].add(place)

    # -- into tiers --------------------------------------------------------------------------------

    def _put(self, pages: list[list[Gathered]]) -> None:
        """Put pages into the lowest persistent tier; and those that are nowhere then into whichever
        tier takes them, the fastest first.
        """
        if self._cache.mover is None:
            return
        stack = self._cache.mover.stack
        lasting = [n for n, tier in enumerate(stack.tiers) if tier.persistent][-1:]
        for number in (*lasting, *(n for n in range(len(stack.levels)) if n not in lasting)):
            with stack.lock:
                held = stack.directory.held[number]
                some = [
                    one for each in pages for one in each
                    if record_key(one.piece.key, one.piece.group) not in held
                    and (number in lasting or one.piece.place not in self._there[one.piece.group])
                ]  # fmt: skip
            if some:
                put(self._view, stack, number, some)
            stack.settle()
            with stack.lock:
                for each in pages:
                    for one in each:
                        if record_key(one.piece.key, one.piece.group) in held:
                            self._there[one.piece.group].add(one.piece.place)

    def _usable(self) -> int:
        """The most pages a sequence can begin with."""
        pages = self._reader.header.pages
        windows = [group.window for group in self._cache.groups]
        for there, window in zip(self._there, windows, strict=True):
            if window is None:
                pages = next((place for place in range(pages) if place not in there), pages)
        while pages and not all(
            place in there
            for there, first in zip(self._there, _firsts(self._cache, pages), strict=True)
            for place in range(first, pages)
        ):
            pages -= 1
        return pages


def _sums(pages: Sequence[Gathered]) -> Sums:
    return np.stack([one.sums for one in pages])
