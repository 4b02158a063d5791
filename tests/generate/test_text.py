"""Text of replies told token by token, by tokenizers made for it, beside their own `decode`."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvpaged.generate.text import Texts, TextTail

ALPHABET = {
    chr(code): byte
    for byte, code in [
        *((b, b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]),
        *((b, 256 + i) for i, b in enumerate([*range(33), *range(127, 161), 173])),
    ]
}


def spell(data: bytes) -> str:
    letters = {byte: letter for letter, byte in ALPHABET.items()}
    return "".join(letters[byte] for byte in data)


def made(tokens, decoder):
    """A tokenizer of these, a special token and two that are not, with gaps before the last id."""
    last = len(tokens) - 1
    vocab = {token: number + 8 * (number == last) for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=tokens[0]))
    backend.decoder = decoder
    backend.add_special_tokens(["<|special|>"])
    backend.add_tokens([AddedToken("été ▁"), AddedToken("日本")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def byte_level():
    pieces = ["é".encode(), "🙂".encode(), b" a", b"b", b"\n", " 日".encode(), b"\xff", b"\xc3x"]
    halves = [data[i : i + 1] for data in ("é".encode(), "🙂".encode()) for i in range(len(data))]
    return made(list(map(spell, [*pieces, *dict.fromkeys(halves)])), decoders.ByteLevel())


def sentence_piece():
    pieces = [
        "▁a",
        "b",
        "▁",
        "é",
        "\n",
        "日",
        "<0x41>",
        "<0xFF>",
        "<0xC3>",
        "<0xA9>",
        "<0x4>",
        "<0xF0>",
    ]
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return made(pieces, decoders.Sequence(chain))


TOKENIZERS = {"bytes": byte_level(), "SentencePiece": sentence_piece()}
SIZE = 30


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(ids=st.lists(st.integers(0, SIZE), max_size=30), cuts=st.lists(st.integers(1, 4)))
def test_pieces_make_the_text_that_the_tokenizer_makes(kind, ids, cuts):
    texts = Texts(TOKENIZERS[kind])
    assert texts.pieces is not None
    tail, shown, start = TextTail(texts, ()), [], 0
    for count in [*cuts, *[1] * len(ids)]:
        shown.append(tail.add(ids[start : start + count]))
        start += count
    shown.append(tail.end())
    assert "".join(shown) == tail.text == TOKENIZERS[kind].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(ids=st.lists(st.integers(0, SIZE), min_size=4, max_size=30), at=st.integers(0, 100))
def test_a_stop_text_is_found_wherever_tokens_end(kind, ids, at):
    whole = TOKENIZERS[kind].decode(ids, skip_special_tokens=True)
    stop = whole[at % max(len(whole), 1) :][:3]
    if not stop:
        return
    tail = TextTail(Texts(TOKENIZERS[kind]), (stop,))
    for token in ids:
        tail.add([token])
    tail.end()
    assert tail.stopped
    assert tail.text == whole[: whole.index(stop)]


def test_tokens_that_come_later_are_known():
    tokenizer = byte_level()
    texts = Texts(tokenizer)
    assert texts.are_of(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    assert not texts.are_of(tokenizer)
    tail = TextTail(Texts(tokenizer), ())
    assert tail.add([tokenizer.convert_tokens_to_ids("<|tool|>")]) == ""


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]),
    ],
)  # fmt: skip
def test_other_decoders_are_asked(decoder):
    tokenizer = made(["▁a", "b", "##c", "<0xC3>", "<0xA9>"], decoder)
    texts = Texts(tokenizer)
    assert texts.pieces is None
    ids = [0, 1, 2, 0, 3, 1]
    tail = TextTail(texts, ())
    shown = [tail.add([token]) for token in ids]
    shown.append(tail.end())
    assert "".join(shown) == tail.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_decoder_of_ones_own_is_asked():
    class Own:
        def decode_chain(self, tokens):
            return [token.upper() for token in tokens]

    tokenizer = made(["a", "b"], decoders.ByteLevel())
    tokenizer.backend_tokenizer.decoder = decoders.Decoder.custom(Own())
    texts = Texts(tokenizer)
    assert texts.pieces is None
    assert texts.decode([0, 9]) == "AB"
