"""A prefilled document as one file (docs/format.md).

The header, little-endian:

    0   8  magic "kvpgdoc1"        16  8  pages                32 16  digest of the namespace
    8   2  version, 1              24  4  bytes of `extra`
    10  2  layer groups            28  4  0
    12  4  page_size
    48 32 * groups:   0 4 layers   4 4 kv_heads   8 4 k_width   12 4 v_width   16 2 dtype as in a
                      page record   18 2 format   20 4 first page   24 8 window, 0 for none
    ..  extra         what else the bytes depend on (`keys`)
    ..  4 * pages * page_size  token ids, big-endian
    ..  8             BLAKE2b-64 of all that stands before

Then, for each page, for each layer group from its first page on, head and body of a page record,
whose keys are those of the unsalted sequence. Nothing follows.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import IntegrityError, StorageError
from kvpaged.geometry import PageGeometry
from kvpaged.keys import NO_PAGE, TOKEN_BYTES
from kvpaged.tiers.record import DTYPES, EXACT, Head, body_bytes, body_sums, head_bytes

MAGIC = b"kvpgdoc1"
VERSION = 1
_FIXED = struct.Struct("<8sHHIQII16s")
_GROUP = struct.Struct("<IIIIHHIQ")


class Group(NamedTuple):
    """Pages of a layer group: their geometry, whose layout says nothing, the window, and the first
    logical page that is in the file.
    """

    geometry: PageGeometry
    window: int | None
    first: int

    def facts(self) -> tuple[int, ...]:
        """What has to be equal for pages to be of use, as it is written."""
        of = self.geometry
        return (
            of.layers, of.kv_heads, of.k_width, of.v_width, DTYPES.index(of.dtype), EXACT,
        )  # fmt: skip


class Header(NamedTuple):
    """What a document's file says of itself.

    Attributes:
        namespace: its digest (`keys.namespace_digest`).
        extra: what else the bytes depend on.
        tokens: the ids of its pages, encoded.
        page_size: tokens of a page.
        groups: of its pages.
    """

    namespace: bytes
    extra: bytes
    tokens: bytes
    page_size: int
    groups: tuple[Group, ...]

    @property
    def pages(self) -> int:
        """Logical pages."""
        return len(self.tokens) // (self.page_size * TOKEN_BYTES)

    def text(self, place: int) -> bytes:
        """The encoded tokens of a page."""
        width = self.page_size * TOKEN_BYTES
        return self.tokens[place * width : (place + 1) * width]

    def encode(self) -> bytes:
        """The header in bytes."""
        fixed = _FIXED.pack(
            MAGIC, VERSION, len(self.groups), self.page_size, self.pages, len(self.extra), 0,
            self.namespace,
        )  # fmt: skip
        groups = [_GROUP.pack(*group.facts(), group.first, group.window or 0)
                  for group in self.groups]  # fmt: skip
        text = b"".join([fixed, *groups, self.extra, self.tokens])
        return text + _sum(text)


def _sum(text: bytes) -> bytes:
    return blake2b(text, digest_size=8).digest()


def write_document(
    path: str | os.PathLike[str], header: Header, pages: Iterator[tuple[Head, Tensor]]
) -> None:
    """Write a document to a file that comes into being at the end, whole.

    Args:
        path: the file.
        header: of it.
        pages: head and body (uint8 `[bytes]`) of each, in the file's order.

    Raises:
        StorageError: it can't be written; what was there is there still.
    """
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(header.encode())
            for head, body in pages:
                file.write(head.encode())
                file.write(body.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


class DocumentReader:
    """Reads a document's file. A context, for one thread.

    Attributes:
        header: what it says of itself.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """
        Raises:
            IntegrityError: the header is damaged, or of another version, or the file has not the
                length it says.
            StorageError: it can't be read.
        """
        self._path = Path(path)
        try:
            self._file: BinaryIO = self._path.open("rb")
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error}") from error
        try:
            self._length = os.fstat(self._file.fileno()).st_size
            self.header = self._read_header()
            self._check_length()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "DocumentReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._file.close()

    def _fail(self, why: str) -> IntegrityError:
        return IntegrityError(f"{self._path}: {why}")

    def _bytes(self, size: int, what: str) -> bytes:
        """The next bytes of the file, which must be there."""
        left = self._length - self._file.tell()
        if size > left:
            raise self._fail(f"{what} should have {size:,} bytes, {left:,} are left in the file")
        try:
            found = self._file.read(size)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be read: {error}") from error
        if len(found) != size:
            raise self._fail(f"{what} ends after {len(found):,} of {size:,} bytes")
        return found

    # -- the header --------------------------------------------------------------------------------

    def _read_header(self) -> Header:
        fixed = self._bytes(_FIXED.size, "the header")
        magic, version, groups, page_size, pages, extra_bytes, _, namespace = _FIXED.unpack(fixed)
        if magic != MAGIC:
            raise self._fail(f"a document begins with {MAGIC!r}, not {magic!r}")
        if version != VERSION:
            raise self._fail(
                f"the document has version {version}; this release reads version {VERSION}"
            )
        facts = self._bytes(groups * _GROUP.size, "the list of layer groups")
        extra = self._bytes(extra_bytes, "what its bytes depend on")
        tokens = self._bytes(pages * page_size * TOKEN_BYTES, "the list of tokens")
        if self._bytes(8, "the header's checksum") != _sum(fixed + facts + extra + tokens):
            raise self._fail("the header does not match its checksum")
        if not groups or not pages or not page_size:
            raise self._fail(f"{groups} groups of {pages} pages of {page_size} tokens")
        found = [self._group(one, page_size, pages) for one in _GROUP.iter_unpack(facts)]
        return Header(namespace, extra, tokens, page_size, tuple(found))

    def _group(self, facts: tuple[int, ...], page_size: int, pages: int) -> Group:
        layers, kv_heads, k_width, v_width, dtype, form, first, window = facts
        if form != EXACT or dtype >= len(DTYPES):
            raise self._fail(f"pages of format {form} and dtype {dtype} are not known")
        if first >= pages:
            raise self._fail(f"the first page of a group is {first}, of {pages}")
        geometry = PageGeometry(
            layers=layers, kv_heads=kv_heads, head_dim=k_width, v_dim=v_width,
            page_size=page_size, dtype=DTYPES[dtype],
        )  # fmt: skip
        return Group(geometry, window or None, first)

    def _check_length(self) -> None:
        size = self._file.tell()
        self._starts = size
        for group in self.header.groups:
            each = head_bytes(group.geometry) + body_bytes(group.geometry)
            size += (self.header.pages - group.first) * each
        if size != self._length:
            what = "are missing at its end" if size > self._length else "follow its last page"
            raise self._fail(f"{abs(size - self._length):,} bytes {what}")

    # -- pages -------------------------------------------------------------------------------------

    def rewind(self) -> None:
        """Go back to the first page."""
        self._file.seek(self._starts)

    def page(self, place: int, group: int, keys: Sequence[bytes], room: Tensor) -> Head:
        """The next page of the file: its head, and its body in `room`, not summed.

        Args:
            place, group: which it must be.
            keys: of the pages of the unsalted sequence.
            room: uint8 `[bytes]`, contiguous.

        Raises:
            IntegrityError: it is damaged, or another page.
        """
        of, what = self.header.groups[group], f"page {place}, layer group {group}"
        try:
            head = Head.decode(self._bytes(head_bytes(of.geometry), f"the head of {what}"))
        except IntegrityError as error:
            raise self._fail(f"{what}: {error}") from error
        before = keys[place - 1] if place else NO_PAGE
        expected = group, place + 1, keys[place], before, self.header.text(place)
        if (head.group, head.depth, head.key, head.before, head.tokens) != expected:
            raise self._fail(f"{what}: another page is in its place")
        if not head.fits(of.geometry):
            raise self._fail(f"{what}: it is of {head.geometry}")
        body = self._bytes(room.numel(), f"the body of {what}")
        room.numpy()[:] = np.frombuffer(body, np.uint8)
        return head

    def check(self, keys: Sequence[bytes]) -> None:
        """Read all pages and sum them.

        Raises:
            IntegrityError: naming the first page that is damaged.
        """
        self.rewind()
        rooms = [
            torch.empty(1, body_bytes(g.geometry), dtype=torch.uint8) for g in self.header.groups
        ]
        for place in range(self.header.pages):
            for number, group in enumerate(self.header.groups):
                if place < group.first:
                    continue
                head = self.page(place, number, keys, rooms[number][0])
                wrong = body_sums(rooms[number], group.geometry)[0] != head.sums
                if wrong.any():
                    raise self._fail(
                        f"page {place}, layer group {number}, layer {int(wrong.argmax())} of it: "
                        "its bytes do not match their checksum"
                    )
