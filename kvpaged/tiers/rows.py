"""Saved rows as a record: token ids, pads, where salts begin (docs/format.md). No salt, no page.

The head, 80 bytes, little-endian:

    0   8  magic "kvpgrows"            24 16  digest of the namespace
    8   2  version, 1                  40 16  random, for the digests of salts
    10  2  0                           56  8  bytes of the body
    12  4  rows                        64  8  BLAKE2b-64 of the body
    16  8  how often it was saved      72  8  BLAKE2b-64 of all that stands before

The body: 40 bytes for each row, then the ids of each row, 4 bytes each, big-endian.

    0   4  tokens       8   8  the token from whose page on the salt counts      20  4  0
    4   4  pads         16  4  1 with a salt, else 0                             24 16  its digest
"""

import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvpaged.errors import IntegrityError
from kvpaged.keys import TOKEN_BYTES, encode_tokens

MAGIC = b"kvpgrows"
VERSION = 1
NONE = bytes(16)
_HEAD = struct.Struct("<8sHHIQ16s16sQ8s")
_ROW = struct.Struct("<IIQII16s")

Ids = npt.NDArray[np.int64]


def _sum(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def salt_digest(salt: bytes, random: bytes) -> bytes:
    """What tells a salt from another without saying it."""
    return blake2b(random, digest_size=16, key=blake2b(salt, digest_size=32).digest()).digest()


class SavedRow(NamedTuple):
    """A sequence.

    Attributes:
        tokens: int64 `[n]`.
        pads: columns before it.
        salt_from: the token from whose page on its salt counts.
        salt: the salt's digest, or `None`.
    """

    tokens: Ids
    pads: int
    salt_from: int
    salt: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedRows:
    """What is saved under a name.

    Attributes:
        namespace: its digest (`keys.namespace_digest`).
        times: how often something was saved under the name, from 1.
        random: 16 bytes of its own, for `salt_digest`.
        rows: the sequences.
    """

    namespace: bytes
    times: int
    random: bytes
    rows: tuple[SavedRow, ...]

    def encode(self) -> tuple[bytes, Tensor]:
        """Head and body of the record."""
        facts = [
            _ROW.pack(len(row.tokens), row.pads, row.salt_from, row.salt is not None, 0,
                      row.salt or NONE)
            for row in self.rows
        ]  # fmt: skip
        body = b"".join([*facts, *(encode_tokens(row.tokens) for row in self.rows)])
        head = _HEAD.pack(
            MAGIC, VERSION, 0, len(self.rows), self.times, self.namespace, self.random, len(body),
            _sum(body),
        )  # fmt: skip
        return head + _sum(head), torch.frombuffer(bytearray(body), dtype=torch.uint8)

    @classmethod
    def decode(cls, head: bytes, body: Tensor) -> "SavedRows":
        """What a record holds.

        Raises:
            IntegrityError: it holds none, one of another version, or a damaged one; the message
                names the field.
        """
        if len(head) != _HEAD.size + 8 or head[:8] != MAGIC:
            raise IntegrityError(
                f"a saved session begins with {MAGIC!r} and has a head of {_HEAD.size + 8} bytes, "
                f"not {head[:8]!r} and {len(head)}"
            )
        _, version, _, rows, times, namespace, random, size, total = _HEAD.unpack_from(head)
        if version != VERSION:
            raise IntegrityError(
                f"the saved session has version {version}; this release reads version {VERSION}"
            )
        if _sum(head[:-8]) != head[-8:]:
            raise IntegrityError("the head of a saved session does not match its checksum")
        data = body.numpy().tobytes()
        if len(data) != size or _sum(data) != total:
            raise IntegrityError(
                f"the body of a saved session has {len(data)} bytes, {size} were written, or does "
                "not match its checksum"
            )
        return cls(namespace=namespace, times=times, random=random, rows=_rows(data, rows))


def _rows(data: bytes, count: int) -> tuple[SavedRow, ...]:
    at = count * _ROW.size
    if not count or len(data) < at:
        raise IntegrityError(f"a saved session of {count} rows in {len(data)} bytes")
    rows = []
    for number in range(count):
        tokens, pads, salt_from, salted, _, digest = _ROW.unpack_from(data, number * _ROW.size)
        if salted > 1 or at + tokens * TOKEN_BYTES > len(data):
            raise IntegrityError(f"row {number} of a saved session has {tokens} tokens, or no flag")
        ids = np.frombuffer(data, ">u4", tokens, at).astype(np.int64)
        rows.append(SavedRow(ids, pads, salt_from, digest if salted else None))
        at += tokens * TOKEN_BYTES
    if at != len(data):
        raise IntegrityError(f"{len(data) - at} bytes behind the last row of a saved session")
    return tuple(rows)
