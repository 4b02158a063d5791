"""Full pages coded as compressed ones: all layers of some, or one layer of pages in a step."""

import numpy as np
import torch
from torch import Tensor

from kvpaged import mixed_ops
from kvpaged.config import Backend
from kvpaged.errors import IntegrityError
from kvpaged.pages.classops import page_checksums, verify_pages
from kvpaged.pages.extents import Ids
from kvpaged.pages.mixed import AnyClass, MixedClass


def code_pages(of: MixedClass, full: Ids, compressed: Ids, *, backend: Backend) -> None:
    """Code full exact pages as compressed ones (ids of both under their group's numbering), and
    keep the checksums and errors of these.
    """
    device = of.flat.device
    source = of.exact.entry_tensor(full)
    numbers = of.numbers(compressed)
    target = _places(of.sealed.entries(numbers), device)
    kept = _places(numbers, device)
    k, v = of.exact.whole
    for layers, slices in of.sealed.runs:
        layout = of.sealed.geometry.layouts[layers.start]
        sums, errors = mixed_ops.seal(
            k[:, layers], v[:, layers], source, slices, target, layout,
            of.sealed.queries(layers), backend=backend,
        )  # fmt: skip
        of.sealed.checksums[kept, layers] = sums
        of.sealed.errors[kept, layers] = errors


def code_layer(
    of: MixedClass, place: int, k: Tensor, v: Tensor, own: Tensor, entries: Tensor, numbers: Tensor,
    *, backend: Backend,
) -> None:  # fmt: skip
    """Code one layer of full pages that a step has in hand.

    Args:
        of: the group's pages.
        place: of the layer in the group.
        k, v: `[n, kv_heads, page_size, width]`, exact.
        own: int64 `[m]`, which of them are full and to be coded.
        entries, numbers: int64 `[m]`, of the compressed pages: where they are, and which.
        backend: which implementation.
    """
    slices, layout = of.sealed.slices[place], of.sealed.geometry.layouts[place]
    sums, errors = mixed_ops.seal(
        k.unsqueeze(1), v.unsqueeze(1), own, slices.unsqueeze(1), entries, layout,
        of.sealed.queries(slice(place, place + 1)), backend=backend,
    )  # fmt: skip
    of.sealed.checksums[numbers, place] = sums.squeeze(1)
    of.sealed.errors[numbers, place] = errors.squeeze(1)


def verify_class(of: AnyClass, ids: Ids, *, backend: Backend) -> None:
    """Raise `IntegrityError` naming the first sealed page of a group and the layer whose bytes are
    not what was sealed.
    """
    if not isinstance(of, MixedClass):
        verify_pages(of, ids, backend=backend)
        return
    compressed = of.allocator.is_sealed(ids)
    verify_pages(of.exact, ids[~compressed], backend=backend)
    numbers = of.numbers(ids[compressed])
    if not numbers.size:
        return
    kept = _places(numbers, of.flat.device)
    expected, found = of.sealed.checksums[kept], page_checksums(of.sealed, numbers, backend=backend)
    wrong = (expected != found).nonzero()
    if len(wrong):
        row, layer = wrong[0].tolist()
        raise IntegrityError(
            f"compressed page {int(numbers[row])}, layer {layer} of its group: the bytes sum to "
            f"{int(found[row, layer])}, sealed as {int(expected[row, layer])}; {len(wrong)} slices "
            "are wrong"
        )


def _places(ids: Ids, device: torch.device) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(device)
