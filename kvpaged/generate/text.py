"""Text of a reply while it is generated: characters when they are whole, stop texts held back."""

from collections.abc import Callable, Sequence
from typing import Protocol

BROKEN = "\ufffd"
"""What stands for bytes that are no whole character."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' have it."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""


def decoder_of(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """`tokenizer.decode` without special tokens; where that is all that transformers' does, the
    `tokenizers` object behind it is asked itself: a quarter of the time.
    """
    kind, behind = type(tokenizer), getattr(tokenizer, "_tokenizer", None)
    plain = {
        getattr(getattr(kind, name, None), "__qualname__", "").split(".")[0]
        for name in ("decode", "_decode")
    } <= {"TokenizersBackend", "PreTrainedTokenizerBase"}
    if (
        plain
        and behind is not None
        and not getattr(tokenizer, "clean_up_tokenization_spaces", True)
    ):
        direct: Callable[..., str] = behind.decode
        return lambda ids: direct(ids, skip_special_tokens=True)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


class TextTail:
    """The text of a reply, told token by token.

    Attributes:
        text: what may be shown by now.
        stopped: a stop text was met; `text` ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.stopped = False
        self._decoded = decoder_of(tokenizer)
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._from = self._read = 0
        self._held = ""

    def add(self, ids: Sequence[int]) -> str:
        """Tell new token ids; returns the text that can be shown now and could not before."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        known, whole = self._decode(self._from, self._read), self._decode(self._from, None)
        if len(whole) <= len(known) or whole.endswith(BROKEN):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._show(whole[len(known) :], final=False)

    def end(self) -> str:
        """The reply ended: what is still to be shown."""
        if self.stopped:
            return ""
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
