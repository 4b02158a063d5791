"""Zstandard (RFC 8878): whole tensors, and pieces for other codecs.

The package `zstandard` is imported when it is first needed, so that all else works without it.
"""

import threading
from types import ModuleType

import numpy as np
import torch

from kvpaged.codecs.base import WORTH, Bytes, Codec
from kvpaged.errors import ConfigError, IntegrityError

_local = threading.local()  # no coder may be used by two threads at a time


def _zstandard() -> ModuleType:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ConfigError("the codecs zstd and lossless need the package zstandard") from error
    return zstandard


def compress(data: Bytes, *, level: int) -> bytes:
    """One frame that says how many bytes it holds; without a checksum, what is stored has one.

    Raises:
        ConfigError: there is no `zstandard`, here and below.
    """
    coders = _local.__dict__.setdefault("levels", {})
    if level not in coders:
        coders[level] = _zstandard().ZstdCompressor(level=level, write_checksum=False)
    return bytes(coders[level].compress(data.data))


def compress_entropy(data: Bytes) -> bytes:
    """One frame, coded byte by byte (Huffman) but for runs: for bytes that hardly repeat in rows.

    On exponents of real K and V the matches that level 1 finds cost more bits than the bytes they
    stand for, and twice the time to decode. There is no switch against them; with 64 places to
    remember and 7 bytes at least, next to none but those of runs are found.
    """
    coder = getattr(_local, "entropy", None)
    if coder is None:
        zstandard = _zstandard()
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, window_log=18, hash_log=6, min_match=7,
            write_checksum=False, write_content_size=True,
        )  # fmt: skip
        coder = _local.entropy = zstandard.ZstdCompressor(compression_params=parameters)
    return bytes(coder.compress(data.data))


def decompress_into(frame: Bytes, out: Bytes) -> None:
    """Fill `out` (uint8, contiguous) with the bytes of a frame, without a copy between.

    Raises:
        ConfigError: there is no `zstandard`.
        IntegrityError: it is no frame, or one of another size.
    """
    zstandard = _zstandard()
    decoder = getattr(_local, "decoder", None)
    if decoder is None:
        decoder = _local.decoder = zstandard.ZstdDecompressor()
    size = len(out)
    try:
        # Looked at first: a decoder makes room for what a frame says it holds.
        known = zstandard.frame_content_size(frame.data)
        if known != size:
            raise IntegrityError(f"zstd: a frame of {known} bytes where {size} were coded")
        reader = decoder.stream_reader(frame.data, closefd=False)
        came = reader.readinto(out.data)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"zstd: {len(frame)} bytes are no frame of {size}: {error}") from error
    if came != size:
        raise IntegrityError(f"zstd: {came} bytes came where {size} were coded")


class Zstd(Codec):
    """Any bytes, as one frame."""

    id = 1
    name = "zstd"

    def __init__(self, level: int = 1) -> None:
        """
        Args:
            level: 1 to 22 as zstd has them; higher ones are slower to encode. Decoding does not
                need to know it.
        """
        self.level = level

    def encode(self, data: Bytes, dtype: torch.dtype) -> Bytes | None:
        """See `Codec.encode`."""
        if not len(data):
            return None
        coded = compress(data, level=self.level)
        return np.frombuffer(coded, np.uint8) if len(coded) <= WORTH * len(data) else None

    def decode_into(self, stored: Bytes, out: Bytes, dtype: torch.dtype) -> None:
        """See `Codec.decode_into`."""
        decompress_into(stored, out)
