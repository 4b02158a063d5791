"""What a page is: every byte count, stride and offset of it, named once, in Python ints (64 bits
and more).

Page-major, a page is one run of bytes (`U` pads it to whole units of 256 bytes):

    page p     [ layer 0: K head 0 [slot, dim], head 1, .. | V head 0, .. ][ layer 1: .. ] .. U
    pool       page 0 | page 1 | page 2 | ..                  entry of a page = its byte offset /
    256

Layer-major, the pages of a class lie side by side within each head of each layer:

    pool       layer 0: K head 0: [page 0 slots][page 1 slots] ..   K head 1: ..   then all V the
    same way entry of a page = its number
"""

import itertools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from kvpaged.config import Layout, check_page_size
from kvpaged.errors import ConfigError
from kvpaged_kernels.sealed import SliceLayout

UNIT_BYTES = 256
"""Alignment and address unit of page-major pages: 16-byte loads stay aligned, and 2**31 units are
512 GiB.
"""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Kind = Literal["k", "v"]
_CPU = torch.device("cpu")


class View(NamedTuple):
    """A strided view of one layer's K or V over all pages of a class, in elements from the start of
    its storage.

    `torch.as_strided(flat, size, stride, offset)` is what kernels call `k_pages`: `[entries,
    kv_heads, slots, width]`.
    """

    size: tuple[int, int, int, int]
    stride: tuple[int, int, int, int]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGeometry:
    """The shape of one page: all layers of a group, K and V, for `page_size` tokens.

    Attributes:
        layers: layers in the group.
        kv_heads: heads of K and V.
        head_dim: elements of a K row of one head, and of a V row unless `v_dim` says otherwise.
        v_dim: elements of a V row; 0 for a group without V (latent attention that stores one
            tensor); `None`: `head_dim`.
        page_size: token slots (16 to 256, a power of two).
        dtype: bfloat16, float16 or float32.
        layout: `"page-major"` or `"layer-major"`.

    Raises:
        ConfigError: a count is not positive, a width is not a multiple of 8 in 8..256, or the dtype
            is not one of the three.
    """

    layers: int
    kv_heads: int
    head_dim: int
    v_dim: int | None = None
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    layout: Layout = "page-major"

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        for name in ("layers", "kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, width in (("head_dim", self.head_dim), ("v_dim", self.v_width)):
            if width % 8 or not (0 if name == "v_dim" else 8) <= width <= 256:
                raise ConfigError(f"{name} must be a multiple of 8 up to 256, got {width}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"pages hold {', '.join(map(str, DTYPES))}; got {self.dtype}")
        if self.layout not in ("page-major", "layer-major"):
            raise ConfigError(f"layout must be 'page-major' or 'layer-major', got {self.layout!r}")

    @property
    def k_width(self) -> int:
        """Elements of one head's K row."""
        return self.head_dim

    @property
    def v_width(self) -> int:
        """Elements of one head's V row; 0 without V."""
        return self.head_dim if self.v_dim is None else self.v_dim

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token over the group's layers: what an ideal cache would hold."""
        return self.layers * self.kv_heads * (self.k_width + self.v_width) * self.itemsize

    @property
    def slice_bytes(self) -> int:
        """Bytes of one layer's K and V in one page: the piece a checksum covers."""
        return self.kv_heads * self.page_size * (self.k_width + self.v_width) * self.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes a page takes in the pool: its content, padded to whole units when page-major."""
        content = self.layers * self.slice_bytes
        return -(-content // UNIT_BYTES) * UNIT_BYTES if self.layout == "page-major" else content

    def width(self, kind: Kind) -> int:
        """Elements of a row of `kind`."""
        return self.k_width if kind == "k" else self.v_width

    def entry_elements(self, kind: Kind) -> int:
        """Elements between the addresses of entries `e` and `e + 1` of a block table."""
        if self.layout == "page-major":
            return UNIT_BYTES // self.itemsize
        return self.page_size * self.width(kind)

    def entries_per_page(self) -> int:
        """How far apart the entries of two adjacent pages are."""
        return self.page_bytes // UNIT_BYTES if self.layout == "page-major" else 1

    def view(self, layer: int, kind: Kind, *, pages: int, storage_bytes: int) -> View:
        """The view of `layer`'s K or V over a storage that holds `pages` pages (layer-major) in
        `storage_bytes` bytes.

        Page-major views overlap themselves in dimension 0 (an entry is a unit, a page is many):
        only entries of pages may be used. Pure arithmetic, so offsets beyond 2**31 are tested
        without memory.
        """
        assert 0 <= layer < self.layers
        width, slots, heads = self.width(kind), self.page_size, self.kv_heads
        if self.layout == "page-major":
            layer_elements = self.slice_bytes // self.itemsize
            offset = layer * layer_elements + (0 if kind == "k" else heads * slots * self.k_width)
            entry = self.entry_elements(kind)
            last = storage_bytes // self.itemsize - offset - heads * slots * width
            return View(
                (last // entry + 1, heads, slots, width), (entry, slots * width, width, 1), offset
            )
        head = pages * slots * width
        before = 0 if kind == "k" else self.layers * heads * pages * slots * self.k_width
        offset = before + layer * heads * head
        return View((pages, heads, slots, width), (slots * width, head, width, 1), offset)

    def words(self, kind: Kind, *, pages: int, storage_bytes: int) -> View:
        """K or V of all layers as int32 words, `[entries, layers, pieces, words]`: for checksums.

        The logical order of a slice's words is K before V, head by head, slot by slot, in both
        layouts, so a page keeps its checksums when its layout changes.
        """
        first = self.view(0, kind, pages=pages, storage_bytes=storage_bytes)
        per_word = 4 // self.itemsize
        words = self.page_size * self.width(kind) // per_word
        entry, head, layer = (
            x // per_word
            for x in (first.stride[0], first.stride[1], self.layer_elements(kind, pages=pages))
        )
        count = pages if self.layout == "layer-major" else self._entries(storage_bytes)
        size = (count, self.layers, self.kv_heads, words)
        return View(size, (entry, layer, head, 1), first.offset // per_word)

    @property
    def v_first_word(self) -> int:
        """The place of V's first word within a slice, after K's."""
        return self.kv_heads * self.page_size * self.k_width * self.itemsize // 4

    def layer_elements(self, kind: Kind, *, pages: int) -> int:
        """Elements between one layer's K (or V) and the next layer's."""
        if self.layout == "page-major":
            return self.slice_bytes // self.itemsize
        return self.kv_heads * pages * self.page_size * self.width(kind)

    def _entries(self, storage_bytes: int) -> int:
        """Entries of a page-major storage at which a whole page fits."""
        return (storage_bytes - self.layers * self.slice_bytes) // UNIT_BYTES + 1

    def pieces(self, kind: Kind, *, pages: int, storage_bytes: int) -> View:
        """What one page is made of, `[entries, 1, pieces, elements]`: for copies.

        Page-major, `kind` "k" is the whole page in one piece and "v" adds nothing.
        """
        if self.layout == "page-major":
            elements = self.layers * self.slice_bytes // self.itemsize
            entry = self.entry_elements(kind)
            return View((self._entries(storage_bytes), 1, 1, elements), (entry, 0, elements, 1), 0)
        first = self.view(0, kind, pages=pages, storage_bytes=storage_bytes)
        elements = self.page_size * self.width(kind)
        rows = self.layers * self.kv_heads
        return View(
            (pages, 1, rows, elements), (first.stride[0], 0, first.stride[1], 1), first.offset
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedGeometry:
    """The shape of a compressed page: a slice a layer, one after another, whatever the layout of
    the exact pages it is made of; so a page is one run of bytes, in a pool and in a record.

    Attributes:
        exact: the page it is made of.
        layouts: of each layer's slice.
        form: the id of the format (docs/format.md).
        queries: of each layer, fp16 `[kv_heads, 2, k_width]` as bytes: what queries are like for
            which errors of keys are made to cancel; empty: it is not known. None: of no layer.
    """

    exact: PageGeometry
    layouts: tuple[SliceLayout, ...]
    form: int = 0
    queries: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.queries and len(self.queries) != self.exact.layers:
            raise ConfigError(
                f"queries of {len(self.queries)} layers are given, {self.exact.layers} are in the "
                "page"
            )
        if len(self.layouts) != self.exact.layers:
            raise ConfigError(
                f"{len(self.layouts)} layers have a format, {self.exact.layers} are in the page"
            )

    @property
    def layers(self) -> int:
        """Layers in the group."""
        return self.exact.layers

    @property
    def page_size(self) -> int:
        """Token slots."""
        return self.exact.page_size

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each layer's slice begins, in bytes, and where the last one ends."""
        ends = itertools.accumulate(layout.slice_bytes for layout in self.layouts)
        return (0, *ends)

    @property
    def content_bytes(self) -> int:
        """Bytes of all slices: what a record of the page has."""
        return self.offsets[-1]

    @property
    def page_bytes(self) -> int:
        """Bytes a page takes in the pool: its content, padded to whole units."""
        return -(-self.content_bytes // UNIT_BYTES) * UNIT_BYTES

    def entries_per_page(self) -> int:
        """How far apart the entries of two adjacent pages are."""
        return self.page_bytes // UNIT_BYTES

    def bits_per_element(self) -> float:
        """Bits of the page for each element of K and V, scales, zero points and padding in it."""
        elements = self.exact.layers * self.exact.slice_bytes // self.exact.itemsize
        return 8 * self.page_bytes / elements


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that share a geometry, a window and a device, hence a block table.

    Attributes:
        geometry: the page of the group; `geometry.layers == len(layers)`.
        layers: the model's layer numbers, ascending; position in it is the layer's place in the
            page.
        window: tokens a query sees, itself included (sliding-window attention); `None`: all.
        device: where the pages live.
    """

    geometry: PageGeometry
    layers: tuple[int, ...]
    window: int | None = None
    device: torch.device = _CPU

    def __post_init__(self) -> None:
        if self.geometry.layers != len(self.layers):
            raise ConfigError(
                f"geometry has {self.geometry.layers} layers, the group names {len(self.layers)}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(
                f"layers of a group must be distinct and ascending, got {self.layers}"
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(f"a window sees at least 1 token, got {self.window}")

    def with_layout(self, layout: Layout, page_size: int) -> "LayerGroup":
        """The same group with pages laid out as `layout`, of `page_size` slots."""
        return replace(self, geometry=replace(self.geometry, layout=layout, page_size=page_size))
