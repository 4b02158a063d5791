"""What a codec is, and the one that does nothing."""

from typing import Any, ClassVar

import numpy as np
import torch

from kvpaged.errors import IntegrityError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

WORTH = 0.97
"""Coded bytes over plain ones from which coding is not worth it: the value is stored as it is, and
can then be read where it lies.
"""


class Codec:
    """Codes a tensor's bytes and brings them back exactly. Any thread may call.

    Attributes:
        id: what is stored, 0 to 255.
        name: what is asked for.
    """

    id: ClassVar[int]
    name: ClassVar[str]

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """The coded bytes, or `None` where less than 3 % would be saved.

        Args:
            data: uint8 [bytes], contiguous: a tensor's elements, row by row.
            dtype: of the elements.
        """
        raise NotImplementedError

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """Fill `out` (uint8 [bytes], of any alignment) with what was encoded.

        Raises:
            IntegrityError: `stored` cannot have been encoded from so many bytes of that dtype;
                `out` may have been written to by then.
        """
        raise NotImplementedError


class Raw(Codec):
    """Bytes as they are."""

    id = 0
    name = "raw"

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """Nothing is ever saved."""
        return None

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """See `Codec.decode_into`."""
        if len(stored) != len(out):
            raise IntegrityError(f"raw: {len(stored)} bytes are stored for {len(out)}")
        np.copyto(out, stored)
