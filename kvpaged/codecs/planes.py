"""Elements of 2, 4 or 8 bytes as planes: all their lowest bytes, ..., all their highest bytes.

Taking every second byte is slow in numpy (2.7 GB/s back), so halves of elements are paired: of
`2 h` elements, `j` and `j + h` make one high and one low word, each as wide as an element,

    high word   high half of j + h | high half of j
    low word    low half of j + h  | low half of j

which takes six shifts and masks over whole arrays each way and no memory besides (5 to 9 GB/s
back). High words and low words, taken as twice as many of half the width, are split again until
they are bytes.
"""

from collections.abc import Sequence

import numpy as np

from kvpaged.codecs.base import Bytes


def split(block: Bytes, width: int) -> list[Bytes]:
    """The planes of a block, lowest bytes first: `width` of uint8 [bytes / width], in the order of
    this module's description.

    Args:
        block: uint8 [bytes], contiguous, an even number of elements. Width 1 gives it back.
        width: bytes of an element: 1, 2, 4 or 8.
    """
    if width == 1:
        return [block]
    words = block.view(f"u{width}")
    half, bits = len(words) // 2, 4 * width
    first, second = words[:half], words[half:]
    high, low = np.right_shift(first, bits), np.bitwise_and(second, _mask(bits) << bits)
    np.bitwise_or(high, low, out=high)
    # (second ^ high) is what low needs of second, xor the first's high half; first takes that off.
    np.bitwise_xor(second, high, out=low)
    np.left_shift(low, bits, out=low)
    np.bitwise_xor(low, first, out=low)
    return [
        *split(low.view(np.uint8), width // 2),
        *split(high.view(np.uint8), width // 2),
    ]


def merge(planes: Sequence[Bytes], out: Bytes) -> None:
    """Fill `out` (uint8 [bytes], contiguous) with the block that `split` made `planes` of."""
    width = len(planes)
    if width == 1:
        out[:] = planes[0]
        return
    low = _merged(planes[: width // 2]).view(f"u{width}")
    high = _merged(planes[width // 2 :]).view(f"u{width}")
    words = out.view(f"u{width}")
    half, bits = len(words) // 2, 4 * width
    first, second = words[:half], words[half:]
    np.bitwise_and(low, _mask(bits), out=second)
    np.left_shift(high, bits, out=first)
    np.bitwise_or(first, second, out=first)
    np.bitwise_xor(low, first, out=second)
    np.right_shift(second, bits, out=second)
    np.bitwise_xor(second, high, out=second)


def _merged(planes: Sequence[Bytes]) -> Bytes:
    if len(planes) == 1:
        return planes[0]
    out = np.empty(sum(len(plane) for plane in planes), np.uint8)
    merge(planes, out)
    return out


def _mask(bits: int) -> int:
    return (1 << bits) - 1
