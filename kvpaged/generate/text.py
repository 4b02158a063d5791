"""Text of a reply while it is generated: characters when they are whole, stop texts held back."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from kvpaged.generate.pieces import Pieces, pieces_of

BROKEN = "\ufffd"
"""What stands for bytes that are no whole character."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' have it."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""


class Texts:
    """How a tokenizer's ids become text, without special tokens.

    Where transformers' `decode` does no more than ask a `tokenizers` object, that is asked, which
    takes a quarter of the time, or, token by token, nobody (`pieces`).

    Attributes:
        pieces: what each token stands for; `None`: that depends on its neighbours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._of, self._size = tokenizer, _size_of(tokenizer)
        kind, behind = type(tokenizer), getattr(tokenizer, "_tokenizer", None)
        plain = {
            getattr(getattr(kind, name, None), "__qualname__", "").split(".")[0]
            for name in ("decode", "_decode")
        } <= {"TokenizersBackend", "PreTrainedTokenizerBase"}
        cleans = getattr(tokenizer, "clean_up_tokenization_spaces", True)
        if behind is None or not plain or cleans:
            self._ask: Callable[..., str] = tokenizer.decode
            self.pieces: Pieces | None = None
        else:
            self._ask, self.pieces = behind.decode, pieces_of(behind)

    def are_of(self, tokenizer: Tokenizer) -> bool:
        """Whether they are this one's, and it has got no more tokens since."""
        return tokenizer is self._of and _size_of(tokenizer) == self._size

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these."""
        return self._ask(ids, skip_special_tokens=True)


def _size_of(tokenizer: Tokenizer) -> int:
    count = getattr(getattr(tokenizer, "_tokenizer", None), "get_vocab_size", None)
    return 0 if count is None else int(count())


class TextTail:
    """The text of a reply, told token by token.

    Attributes:
        text: what may be shown by now.
        stopped: a stop text was met; `text` ends before it.
    """

    def __init__(self, texts: Texts, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._decoded, self._pieces = texts.decode, texts.pieces
        self._bytes = b""  # of pieces that are no whole character yet
        self._run = bytearray()  # of SentencePiece's bytes, which end with another piece
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._from = self._read = 0
        self._held = ""

    def add(self, ids: Sequence[int]) -> str:
        """Tell new token ids; returns the text that can be shown now and could not before."""
        if self.stopped:
            return ""
        if self._pieces is not None:
            more = self._put_together(self._pieces, ids)
            if not more or self._stop:
                return self._show(more, final=False) if more else ""
            self.text += more
            return more
        self._ids.extend(ids)
        known, whole = self._decode(self._from, self._read), self._decode(self._from, None)
        if len(whole) <= len(known) or whole.endswith(BROKEN):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._show(whole[len(known) :], final=False)

    def _put_together(self, pieces: Pieces, ids: Sequence[int]) -> str:
        """The text that tokens add."""
        more = ""
        for token in ids:
            piece = pieces[token]
            if isinstance(piece, str) and not self._bytes:
                more += self._end_run() + piece if self._run and piece else piece
            elif isinstance(piece, int):
                self._run.append(piece)
            else:
                data = self._bytes + (piece if isinstance(piece, bytes) else piece.encode())
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                more += decoder.decode(data)
                self._bytes = decoder.getstate()[0]
        return more

    def _end_run(self) -> str:
        """The characters of a run of bytes, or a sign for each byte."""
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return BROKEN * len(run)

    def end(self) -> str:
        """The reply ended: what is still to be shown."""
        if self.stopped:
            return ""
        if self._pieces is not None:
            rest = self._end_run() + self._bytes.decode(errors="replace")
            return self._show(rest, final=True)
        known, whole = self._decode(self._from, self._read), self._decode(self._from, None)
        return self._show(whole[len(known) :], final=True)

    def _decode(self, start: int, stop: int | None) -> str:
        ids = self._ids[start:stop]
        return self._decoded(ids) if ids else ""

    def _show(self, more: str, *, final: bool) -> str:
        held = self._held + more
        found = [place for text in self._stop if (place := held.find(text)) >= 0]
        if found:
            self.stopped, shown, self._held = True, held[: min(found)], ""
        else:
            keep = 0 if final else max((_overlap(held, text) for text in self._stop), default=0)
            shown, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` may be the beginning of `stop`."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )
