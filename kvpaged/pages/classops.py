"""What is done to whole pages of a class: copy, clear, sum."""

import numpy as np
import torch
from torch import Tensor

from kvpaged import ops
from kvpaged.config import Backend
from kvpaged.errors import IntegrityError
from kvpaged.geometry import Kind
from kvpaged.pages.extents import Ids
from kvpaged.pages.pool import PageClass, SealedClass

ALL_LAYERS = slice(None)


def _kinds(page_class: PageClass) -> tuple[Kind, ...]:
    return ("k", "v") if page_class.geometry.v_width else ("k",)


def copy_pages(page_class: PageClass, src: Ids, dst: Ids, *, backend: Backend) -> None:
    """Copy the bytes of pages `src` to pages `dst`."""
    sources, targets = page_class.entry_tensor(src), page_class.entry_tensor(dst)
    for pieces in page_class.pieces:
        ops.copy_pages(pieces, sources, targets, backend=backend)


def clear_pages(page_class: PageClass, ids: Ids) -> None:
    """Zero pages.

    The CPU path masks the slots past a sequence's end by adding -inf to their scores, which a NaN
    left there by
    somebody else would survive: a page that starts out partly filled starts out clean.
    """
    entries = page_class.entries(ids).tolist()
    for pieces in page_class.pieces:
        for entry in entries:  # `index_fill_` goes element by element here: seven times slower
            pieces[entry].zero_()


def page_checksums(
    page_class: PageClass | SealedClass, ids: Ids, *, backend: Backend, layers: slice = ALL_LAYERS
) -> Tensor:
    """Checksums of the slices of pages, int64 `[n, layers]`, K and V of a layer summed as one
    slice; of some layers only if `layers` says so.
    """
    entries = page_class.entry_tensor(ids)
    return entry_checksums(page_class, entries, backend=backend, layers=layers)


def entry_checksums(
    page_class: PageClass | SealedClass, entries: Tensor, *, backend: Backend,
    layers: slice = ALL_LAYERS,
) -> Tensor:  # fmt: skip
    """`page_checksums` of pages whose entries, int64 `[n]`, are on the device already."""
    if isinstance(page_class, SealedClass):
        first, stop, _ = layers.indices(page_class.geometry.layers)
        found = []
        for whole, slices in page_class.runs:
            start, end = max(first, whole.start), min(stop, whole.stop)
            if end > start:
                words = slices[:, start - whole.start : end - whole.start].view(torch.int32)
                part = ops.checksum(words.unsqueeze(2), entries, first_word=0, backend=backend)
                found.append(part)
        return torch.cat(found, 1)
    geometry = page_class.geometry
    words = page_class.flat.view(torch.int32)
    size = words.numel() * 4
    total: Tensor | None = None
    for kind in _kinds(page_class):
        view = geometry.words(kind, pages=page_class.allocator.capacity, storage_bytes=size)
        first = 0 if kind == "k" else geometry.v_first_word
        strided = words.as_strided(view.size, view.stride, view.offset)[:, layers]
        part = ops.checksum(strided, entries, first_word=first, backend=backend)
        total = part if total is None else total + part
    assert total is not None
    return total


def clear_tail(page_class: PageClass, page: int, slot: int) -> None:
    """Zero the slots of a page from `slot` on, in every layer."""
    entry = int(page_class.entries(np.array([page], np.int32))[0])
    for layer in page_class.layers:
        layer.k_pages[entry, :, slot:] = 0
        if layer.v_pages is not None:
            layer.v_pages[entry, :, slot:] = 0


def keep_checksums(page_class: PageClass, ids: Ids, *, backend: Backend) -> None:
    """Sum pages just sealed, and keep the sums."""
    if page_class.checksums is not None:
        places = torch.from_numpy(ids.astype("int64")).to(page_class.flat.device)
        page_class.checksums[places] = page_checksums(page_class, ids, backend=backend)


def verify_pages(page_class: PageClass, ids: Ids, *, backend: Backend) -> None:
    """Raise `IntegrityError` naming the first sealed page and layer whose bytes are not what was
    sealed.
    """
    if page_class.checksums is None or not ids.size:
        return
    places = torch.from_numpy(ids.astype("int64")).to(page_class.flat.device)
    expected = page_class.checksums[places]
    found = page_checksums(page_class, ids, backend=backend)
    wrong = (expected != found).nonzero()
    if len(wrong):
        row, layer = wrong[0].tolist()
        raise IntegrityError(
            f"page {int(ids[row])}, layer {layer} of its group: the bytes sum to "
            f"{int(found[row, layer])}, "
            f"sealed as {int(expected[row, layer])}; {len(wrong)} slices are wrong"
        )
