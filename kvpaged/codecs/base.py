"""What a codec is, and the one that does nothing."""

from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch

from kvpaged.errors import IntegrityError

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

WORTH = 0.97
"""Coded bytes over plain ones from which coding is not worth it: the value is stored as it is, and
can then be read where it lies.
"""


class Codec:
    """Codes a tensor's bytes and brings them back exactly. Any thread may call, several at once.

    What is coded has no checksum and does not say of what dtype it was: whoever stores it keeps
    both, and the number of plain bytes.

    Attributes:
        id: what is stored, 0 to 255.
        name: what is asked for.
    """

    id: ClassVar[int]
    name: ClassVar[str]

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """The coded bytes (uint8 [fewer]), or `None` where less than 3 % would be saved.

        Args:
            data: uint8 [bytes], contiguous, of any length and alignment: a tensor's elements, row
                by row. Only read.
            dtype: of the elements.
        """
        raise NotImplementedError

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """Fill `out` with what was encoded.

        Args:
            stored: uint8 [fewer], contiguous, of any alignment: what `encode` gave. Only read.
            out: uint8 [bytes], contiguous, of any alignment; nothing outside it is written.
            dtype: what `encode` was told.

        Raises:
            IntegrityError: `stored` cannot have been encoded from so many bytes of that dtype;
                `out` may have been written to by then. Bytes that are wrong and still can be
                decoded give wrong ones: a checksum over `stored` finds those.
        """
        raise NotImplementedError


class Raw(Codec):
    """Bytes as they are."""

    id = 0
    name = "raw"

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """Always `None`: nothing is saved."""
        return None

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """See `Codec.decode_into`."""
        if len(stored) != len(out):
            raise IntegrityError(f"raw: {len(stored)} bytes are stored for {len(out)}")
        np.copyto(out, stored)
