"""Zstandard (RFC 8878): whole tensors, and pieces for other codecs."""

import threading

import numpy as np
import torch
import zstandard

from kvpaged.codecs.base import WORTH, Bytes, Codec
from kvpaged.errors import IntegrityError

LEVEL = 1
"""On planes of exponents higher levels are slower and no smaller."""

_local = threading.local()  # neither coder may be used by two threads at a time


def compress(data: Bytes) -> bytes:
    """One frame, without a checksum: what is stored has one of its own."""
    coder = getattr(_local, "coder", None)
    if coder is None:
        coder = _local.coder = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
    return bytes(coder.compress(data.data))


def decompress(frame: Bytes, size: int) -> bytes:
    """The `size` bytes of a frame.

    Raises:
        IntegrityError: it is no frame, or one of another size.
    """
    decoder = getattr(_local, "decoder", None)
    if decoder is None:
        decoder = _local.decoder = zstandard.ZstdDecompressor()
    try:
        known = zstandard.frame_content_size(frame.data)
        if known != size:
            raise IntegrityError(f"zstd: a frame of {known} bytes where {size} were coded")
        plain = bytes(decoder.decompress(frame.data, allow_extra_data=False))
    except (zstandard.ZstdError, ValueError) as error:
        raise IntegrityError(f"zstd: {len(frame)} bytes are no frame of {size}: {error}") from error
    if len(plain) != size:
        raise IntegrityError(f"zstd: {len(plain)} bytes came where {size} were coded")
    return plain


class Zstd(Codec):
    """Any bytes, as one frame."""

    id = 1
    name = "zstd"

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """See `Codec.encode`."""
        if not len(data):
            return None
        coded = compress(data)
        return np.frombuffer(coded, np.uint8) if len(coded) <= WORTH * len(data) else None

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """See `Codec.decode_into`."""
        out[:] = np.frombuffer(decompress(stored, len(out)), np.uint8)
