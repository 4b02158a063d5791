"""A page as a record: what its head says, in bytes (docs/format.md).

The body of an exact page is its page-major form, whatever the layout of the pool it came from: for
each layer of the group K `[kv_head, slot, k_width]`, then V `[kv_head, slot, v_width]`,
little-endian, without padding; that of a compressed page its slices, layer after layer. The head,
little-endian:

    0   8  magic "kvpgrec1"            36  4  depth, pages from the sequence's start, from 1
    8   2  version, 1                  40 16  key of the page
    10  2  layer group                 56 16  key of the page before
    12  2  format: 0, as the model; others: `formats.kv.IDS`
                                    72  8 * layers  checksums of the slices, int64
    14  2  dtype: 0 bf16 1 fp16 2 fp32 ..  4 * page_size  token ids, big-endian
    16  4  layers                      ..  8  BLAKE2b-64 of all that stands before
    20  4  page_size
    24  4  kv_heads   28 4 k_width   32 4 v_width
"""

import itertools
import struct
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged import ops
from kvpaged.errors import ConfigError, IntegrityError
from kvpaged.geometry import PageGeometry, SealedGeometry
from kvpaged.keys import KEY_BYTES, TOKEN_BYTES
from kvpaged.tiers.base import Record

MAGIC = b"kvpgrec1"
VERSION = 1
EXACT = 0
"""The format of pages in the model's own dtype."""
LAST_FORM = 5
"""The largest id of a format (`formats.kv`)."""
PAGE = b"p"
"""What keys of page records begin with."""
_FIXED = struct.Struct("<8sHHHHIIIIII16s16s")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _sum(text: bytes) -> bytes:
    return blake2b(text, digest_size=8).digest()


def record_key(page_key: bytes, group: int) -> bytes:
    """The key of a page's record: `p`, the page key, the layer group's number (2 bytes)."""
    return PAGE + page_key + group.to_bytes(2, "little")


def dtype_of(head: bytes) -> torch.dtype | None:
    """What the numbers of a page record's body are, by its head or one that something was added to;
    `None` if it is no such head.
    """
    if len(head) < _FIXED.size or head[:8] != MAGIC:
        return None
    _, version, _, form, dtype, *_ = _FIXED.unpack_from(head)
    known = version == VERSION and form == EXACT and dtype < len(DTYPES)
    return DTYPES[dtype] if known else None


def body_bytes(geometry: PageGeometry | SealedGeometry) -> int:
    """Bytes of the body of a page of this geometry."""
    if isinstance(geometry, SealedGeometry):
        return geometry.content_bytes
    return geometry.layers * geometry.slice_bytes


def head_bytes(geometry: PageGeometry) -> int:
    """Bytes of the head of a page of this geometry."""
    return _FIXED.size + 8 * geometry.layers + TOKEN_BYTES * geometry.page_size + 8


def body_sums(bodies: Tensor, geometry: PageGeometry | SealedGeometry) -> npt.NDArray[np.int64]:
    """The checksums of the slices of bodies, uint8 `[n, bytes]` on the CPU, contiguous: int64
    `[n, layers]`, as of the same pages in a pool.
    """
    places = torch.arange(len(bodies))
    if isinstance(geometry, SealedGeometry):
        each = [
            ops.checksum(
                bodies[:, start:stop].view(torch.int32)[:, None, None], places, first_word=0,
                backend="cpu",
            )
            for start, stop in itertools.pairwise(geometry.offsets)
        ]  # fmt: skip
        return torch.cat(each, 1).numpy()
    words = bodies.view(torch.int32).view(len(bodies), geometry.layers, 1, -1)
    found: npt.NDArray[np.int64] = ops.checksum(words, places, first_word=0, backend="cpu").numpy()
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """What the record of a page says of itself.

    Attributes:
        group: the layer group's number.
        geometry: of the page; its layout says nothing.
        depth: see `pages.trail.Node`.
        key, before: page keys of the page and of the one before.
        tokens: its token ids, encoded (`keys.encode_tokens`).
        sums: int64 `[layers]`, the checksums of its slices.
        form: the id of the page's format, 0 for an exact one; `geometry` is that of the exact page.
    """

    group: int
    geometry: PageGeometry
    depth: int
    key: bytes
    before: bytes
    tokens: bytes
    sums: npt.NDArray[np.int64]
    form: int = EXACT

    @classmethod
    def of(
        cls, geometry: PageGeometry | SealedGeometry, *, group: int, depth: int, key: bytes,
        before: bytes, tokens: bytes, sums: npt.NDArray[np.int64],
    ) -> "Head":  # fmt: skip
        """The head of a page of that geometry."""
        exact, form = _exact_of(geometry)
        return cls(
            group=group, geometry=exact, depth=depth, key=key, before=before, tokens=tokens,
            sums=sums, form=form,
        )  # fmt: skip

    def encode(self) -> bytes:
        """The head in bytes."""
        of = self.geometry
        fixed = _FIXED.pack(
            MAGIC, VERSION, self.group, self.form, DTYPES.index(of.dtype), of.layers, of.page_size,
            of.kv_heads, of.k_width, of.v_width, self.depth, self.key, self.before,
        )  # fmt: skip
        text = fixed + self.sums.astype("<i8").tobytes() + self.tokens
        return text + _sum(text)

    @classmethod
    def decode(cls, text: bytes) -> "Head":
        """The head that bytes hold.

        Raises:
            IntegrityError: they hold none, or one of another version; the message names the field.
        """
        if len(text) < _FIXED.size + 8 or text[:8] != MAGIC:
            raise IntegrityError(f"a page record begins with {MAGIC!r}, not {text[:8]!r}")
        (
            _, version, group, form, dtype, layers, page_size, kv_heads, k_width, v_width, depth,
            key, before,
        ) = _FIXED.unpack_from(text)  # fmt: skip
        if version != VERSION:
            raise IntegrityError(
                f"the page record has version {version}; this release reads version {VERSION}"
            )
        size = _FIXED.size + 8 * layers + TOKEN_BYTES * page_size + 8
        if len(text) != size:
            raise IntegrityError(
                f"the head of a page record of {layers} layers and {page_size} tokens has {size} "
                f"bytes, this one {len(text)}"
            )
        if _sum(text[:-8]) != text[-8:]:
            raise IntegrityError("the head of a page record does not match its checksum")
        if form > LAST_FORM or dtype >= len(DTYPES):
            raise IntegrityError(f"a page record of format {form} and dtype {dtype} is not known")
        try:
            geometry = PageGeometry(
                layers=layers, kv_heads=kv_heads, head_dim=k_width, v_dim=v_width,
                page_size=page_size, dtype=DTYPES[dtype],
            )  # fmt: skip
        except ConfigError as error:
            raise IntegrityError(f"a page record of no page there can be: {error}") from error
        at = _FIXED.size + 8 * layers
        return cls(
            group=group, geometry=geometry, depth=depth, key=key, before=before,
            tokens=text[at:-8], form=form,
            sums=np.frombuffer(text, "<i8", layers, _FIXED.size).astype(np.int64),
        )  # fmt: skip

    def check(
        self, key: bytes, group: int, tokens: bytes, geometry: PageGeometry | SealedGeometry,
        body_size: int,
    ) -> None:  # fmt: skip
        """Raise `IntegrityError` unless it is of that page of a group, with a body of so many bytes
        as pages of `geometry` have.
        """
        if (self.key, self.group, self.tokens) != (key, group, tokens):
            raise IntegrityError("the record is of another page")
        if not self.fits(geometry):
            raise IntegrityError(f"the record is of pages of format {self.form}, {self.geometry}")
        if body_size != body_bytes(geometry):
            raise IntegrityError(f"the record has {body_size} bytes")

    def record(self, body: Tensor) -> Record:
        """The record of the page, with its body."""
        parent = record_key(self.before, self.group) if self.depth > 1 else b""
        return Record(record_key(self.key, self.group), self.encode(), body, parent)

    def fits(self, geometry: PageGeometry | SealedGeometry) -> bool:
        """Whether pages of `geometry`, in whatever layout, are of this kind."""
        mine = self.geometry
        geometry, form = _exact_of(geometry)
        return form == self.form and (
            mine.layers, mine.page_size, mine.kv_heads, mine.k_width, mine.v_width, mine.dtype
        ) == (
            geometry.layers, geometry.page_size, geometry.kv_heads, geometry.k_width,
            geometry.v_width, geometry.dtype,
        )  # fmt: skip


def _exact_of(geometry: PageGeometry | SealedGeometry) -> tuple[PageGeometry, int]:
    if isinstance(geometry, SealedGeometry):
        return geometry.exact, geometry.form
    return geometry, EXACT


assert KEY_BYTES == 16
