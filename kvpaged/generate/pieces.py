"""What each token of a tokenizer stands for, where a text is just that, one after another.

Asking a tokenizer for every new token takes 2.6 microseconds; a dict takes a tenth of one. Two
kinds of decoders of the `tokenizers` library put texts together from pieces: `ByteLevel` (GPT-2's
alphabet of bytes: Llama 3, Qwen, SmolLM), and `Replace`, `ByteFallback`, `Fuse` (SentencePiece
without a space that is taken off the front: Gemma). Whatever else there is is asked itself.
"""

import json
import re
from functools import lru_cache
from typing import Any

SAMPLE = 256
"""Tokens by which a tokenizer's own text is compared with what its pieces give."""


Piece = str | bytes | int
"""Whole characters; bytes of some; a byte of SentencePiece's, of which only whole runs are
characters or not.
"""


class Pieces(dict[int, Piece]):
    """By token id. Any thread may look one up."""

    def __init__(self, backend: Any, space: str | None) -> None:
        """
        Args:
            backend: a `tokenizers.Tokenizer`.
            space: what stands for a space; `None`: tokens are spelt in GPT-2's alphabet.
        """
        super().__init__()
        self._token_of = backend.id_to_token
        self._space = space
        added = backend.get_added_tokens_decoder()
        self.update({number: "" for number, token in added.items() if token.special})

    def __missing__(self, number: int) -> Piece:
        token = self._token_of(number)
        if token is None:
            return ""
        piece: Piece
        if self._space is None:
            piece = _spelt(token)
        elif _BYTE.fullmatch(token):
            piece = int(token[3:5], 16)
        else:
            piece = token.replace(self._space, " ")
        self[number] = piece
        return piece


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def pieces_of(backend: Any) -> Pieces | None:
    """The pieces of a `tokenizers.Tokenizer`, or `None`: its texts are made otherwise."""
    if backend.decoder is None:
        return None
    try:
        decoder = json.loads(backend.decoder.__getstate__())
    except Exception:  # somebody's own, which has no JSON
        return None
    parts = decoder.get("decoders", [decoder])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        pieces = Pieces(backend, None)
    elif kinds == ["Replace", "ByteFallback", "Fuse"] and parts[0]["content"] == " ":
        pieces = Pieces(backend, parts[0]["pattern"].get("String", " "))
    else:
        return None
    return pieces if _agree(backend, pieces) else None


def _agree(backend: Any, pieces: Pieces) -> bool:
    """Whether a sample of tokens has one text by both."""
    size = backend.get_vocab_size()
    ids = [n for n in range(0, size, max(size // SAMPLE, 1)) if not isinstance(pieces[n], int)]
    each = [pieces[n] for n in ids]
    data = b"".join(x if isinstance(x, bytes) else str(x).encode() for x in each)
    text: str = backend.decode(ids, skip_special_tokens=True)
    return text == data.decode(errors="replace")


def _spelt(token: str) -> str | bytes:
    """A token in GPT-2's alphabet: characters that stand for bytes; text as it is, if one does
    not.
    """
    alphabet = _alphabet()
    try:
        data = bytes(alphabet[character] for character in token)
    except KeyError:
        return token
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """GPT-2's: bytes that print stand for themselves, the others for characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
