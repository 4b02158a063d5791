"""Embeddings of documents by id: computed once, kept across runs, searched, bounded in bytes.

    python examples/embeddings.py [PATH] [--ask "..."]      # with PATH, once more

Documents are chapters of Python's own manual. A value holds a vector for each token, bf16, and
their mean: a question reads the means of all, then the tokens of the nearest only. A document whose
text has changed is computed anew. Without PATH nothing is left behind.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpaged import TensorStore
from kvpaged.lsm.options import StoreOptions, now_ms
from kvpaged.testing import models

LAYERS, TOKENS = 12, 96
"""Of the model, and of a document at most. The middle layers know best what a word means."""
NAMES = """
assert async await booleans break class comparisons context-managers continue del dict else
exceptions floating for function global if import in integers lambda lists nonlocal numbers
pass power raise return shifting slicings strings truth try typesmapping typesmethods unary
while with yield
"""
"""Of chapters: those that are about one thing."""
BATCH = 8
"""Documents that are put together."""
NEAREST = 16
"""Documents whose tokens are read."""
QUESTION_S = 3600.0
"""How long a question is remembered."""
BOUND = "2MiB"
"""Of a store that has not room for all."""

Value = dict[str, Tensor]  # tokens, bf16 [tokens, width], and mean, fp32 [width]


class Clock:
    """The time, milliseconds since 1970, or later: nobody waits an hour for an example."""

    later_s = 0.0

    def __call__(self) -> int:
        """It."""
        return now_ms() + int(self.later_s * 1000)


def same(one: Tensor, other: Tensor) -> bool:
    """Same dtype, shape and bits."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@cache
def model() -> tuple[Any, Any]:
    """The model's lower layers and its tokenizer, when they are first needed."""
    language, tokenizer = models.load("smollm2", dtype=torch.float32)
    language.model.layers = language.model.layers[:LAYERS]
    return language.model, tokenizer


@torch.no_grad()
def embed(text: str) -> Value:
    """The embedding of a text."""
    lower, tokenizer = model()
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=TOKENS).input_ids
    tokens = lower(ids).last_hidden_state[0, 1:]  # the first attends to nothing: it says nothing
    return {"tokens": tokens.bfloat16(), "mean": tokens.mean(0)}


def digest(text: str) -> str:
    """Of all that an embedding is made from: the model, the way, the text."""
    made_by = f"{models.SOURCES['smollm2'].sha256} {LAYERS} layers, {TOKENS} tokens"
    return sha256(f"{made_by}\0{text}".encode()).hexdigest()


def missing(store: TensorStore, documents: Mapping[bytes, str]) -> list[bytes]:
    """Ids of documents that are not there, or were made from something else; reads no tensor."""
    found = {key: store.info(key) for key in documents}
    return [
        key
        for key, info in found.items()
        if info is None or info.metadata["digest"] != digest(documents[key])
    ]


def fill(store: TensorStore, documents: Mapping[bytes, str]) -> Mapping[bytes, Value]:
    """Compute what is missing and put it, `BATCH` at a time: a batch is there whole or not at all,
    so a run that is killed is gone on with by the next.
    """
    keys, made = missing(store, documents), {}
    for start in range(0, len(keys), BATCH):
        with store.batch() as batch:
            for key in keys[start : start + BATCH]:
                made[key] = embed(documents[key])
                batch.put(key, made[key], metadata={"digest": digest(documents[key])})
    return made


def question(store: TensorStore, text: str) -> tuple[Value, bool]:
    """A question's embedding, and whether it was there; it is forgotten after `QUESTION_S`."""
    key = b"question/" + digest(text).encode()
    found = store.get(key)
    if found is not None:
        return found, True
    made = embed(text)
    store.put(key, made, ttl=QUESTION_S)
    return made, False


def search(store: TensorStore, asked: Value) -> list[str]:
    """The ids of the documents that fit best: each token of the question looks for its likest."""
    means = dict(store.items(b"manual/", parts=["mean"]))
    keys, every = list(means), torch.stack([value["mean"] for value in means.values()])
    middle = every.mean(0)  # what all have in common says nothing

    def apart(x: Tensor) -> Tensor:
        return F.normalize(x.float() - middle, dim=-1)

    near = (apart(every) @ apart(asked["mean"])).topk(min(NEAREST, len(keys))).indices.tolist()
    read = store.get_many([keys[number] for number in near], parts=["tokens"])
    likeness = [
        (apart(asked["tokens"]) @ apart(value["tokens"]).T).amax(1).mean().item() for value in read
    ]
    best = sorted(zip(likeness, near, strict=True), reverse=True)[:3]
    return [keys[number].decode() for _, number in best]


def bounded(path: Path, source: TensorStore) -> None:
    """Copy all into a store that has not room for them, and ask for the first one all the time."""
    with TensorStore(path, max_bytes=BOUND) as store:
        keys = list(source.scan(b"manual/"))
        for key, value in source.items(b"manual/"):
            store.put(key, value)
            store.get(keys[0])
        stats, there = store.stats(), list(store.scan())
    print(f"{BOUND} for {len(keys)} documents: {stats.evicted} evicted, {len(there)} are there")
    print(f"of {stats.max_bytes:,} bytes {stats.used_bytes:,} are used")
    print(f"the one that was asked for all the time is there: {keys[0] in there}")


def ask(store: TensorStore, clock: Clock, text: str) -> None:
    """Answer a question, ask it again, and an hour later."""
    asked, _ = question(store, text)
    before = store.stats().asked_bytes
    best = search(store, asked)
    read = store.stats().asked_bytes - before
    print(f"{text} See: {', '.join(best)}")
    print(f"read for that: {read:,} bytes of {sum(sizes(store)):,}")
    print(f"asked again: {'found' if question(store, text)[1] else 'computed'}", end="; ")
    clock.later_s = QUESTION_S
    print(f"{QUESTION_S:g} s later: {'found' if question(store, text)[1] else 'computed'}")


def sizes(store: TensorStore) -> list[int]:
    """Bytes of each document's tensors, which need not be read for that."""
    infos = [store.info(key) for key in store.scan(b"manual/")]
    return [info.nbytes for info in infos if info is not None]


def main(path: Path, scratch: Path, documents: Mapping[bytes, str], text: str) -> None:
    """Fill, open again, ask, and keep within a bound."""
    start = time.perf_counter()
    with TensorStore(path) as store:
        made = fill(store, documents)
    first = time.perf_counter() - start
    print(f"{len(documents)} documents: {len(documents) - len(made)} found, {len(made)} computed")

    clock = Clock()
    start = time.perf_counter()
    with TensorStore(path, options=StoreOptions(clock=clock)) as store:  # another run
        again = fill(store, documents)
        second = time.perf_counter() - start
        print(f"opened again: {len(again)} computed", end="")
        print(f", in {second / first:.4f} of the time" if made else "")
        read = zip(made.values(), store.get_many(list(made)), strict=True)
        pairs = [(one[part], other[part]) for one, other in read for part in one]
        print(f"{len(pairs)} tensors compared, {sum(not same(*pair) for pair in pairs)} differ")
        ask(store, clock, text)
        bounded(scratch / "bounded", store)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Embeddings of documents, kept across runs.")
    parser.add_argument("path", nargs="?", type=Path, help="of the store")
    parser.add_argument("--documents", type=int, default=len(NAMES.split()), help="how many")
    parser.add_argument("--ask", default="How do I repeat something while a condition is true?")
    arguments = parser.parse_args()
    names = [name for name in NAMES.split() if name in topics][: arguments.documents]
    chapters = {f"manual/{name}".encode(): topics[name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        main(arguments.path or scratch / "documents", scratch, chapters, arguments.ask)
