"""One document, ten questions: the document is computed once, and what its answers hold is a tree.

    python examples/tree.py [--picture docs/tree.png]

Each box of the tree is a page of 16 tokens; a page that several answers hold stands once.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

QUESTIONS = (
    "What is this text about?", "Who is it written for?", "Name one thing it forbids.",
    "What is an escape sequence?", "What does a raw string do?", "What are f-strings?",
    "How are strings joined?", "Is there a character type?", "What is a bytes literal?",
    "Which quotes may be used?",
)  # fmt: skip
FOLLOW_UPS = ("Say it in one word.", "Why?")
PAGE_SIZE = 16


class Branch(NamedTuple):
    """An answer: its question, how many tokens were computed for it, and the pages it holds."""

    name: str
    computed: int
    pages: list[int]


def ask(model: Any, tokenizer: Any, past: Any, ids: Any, question: str, new_tokens: int) -> Any:
    """Go on from what `past` holds (the tokens `ids`) with a question; returns all tokens."""
    import torch

    turn = f"\n\nQuestion: {question}\nAnswer:"
    more = tokenizer(turn, return_tensors="pt", add_special_tokens=False)["input_ids"]
    prompt = torch.cat((ids, more), dim=1)
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=past,
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def grow(
    model: Any, tokenizer: Any, cache: Any, document: Any, *, questions: int, new_tokens: int
) -> tuple[list[Branch], Any]:
    """Ask all questions of one document, and two more after the first answer.

    Returns the branches, and the cache's statistics while all of them were alive.
    """
    import torch

    branches = []
    with cache.session(document) as root, torch.no_grad():
        model(document[:, root.columns :], past_key_values=root, logits_to_keep=1)
        answers = root.branch(questions)
        texts = []
        for question, past in zip(QUESTIONS, answers, strict=False):
            texts.append(ask(model, tokenizer, past, document, question, new_tokens))
            computed = past.columns - document.shape[1]
            branches.append(Branch(question, computed, past.batch.page_map()[0].tolist()))
        # What was generated last has not been fed to the model yet: it comes with the next turn.
        before, place = answers[0].columns, 1
        for follow_up, past in zip(FOLLOW_UPS, answers[0].branch(len(FOLLOW_UPS)), strict=True):
            answers.append(past)
            ask(model, tokenizer, past, texts[0], follow_up, new_tokens)
            pages = past.batch.page_map()[0].tolist()
            branches.insert(place, Branch(f"  .. {follow_up}", past.columns - before, pages))
            place += 1
        stats = cache.stats()
        for past in answers:
            past.close()
    return branches, stats


def shared_with(branches: Sequence[Branch]) -> dict[int, int]:
    """How many branches hold each page."""
    held: dict[int, int] = {}
    for branch in branches:
        for page in branch.pages:
            held[page] = held.get(page, 0) + 1
    return held


def draw(branches: Sequence[Branch], path: str) -> None:
    """The tree as a picture: a row for each branch, a box for each page it is the first to hold."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    held, place = shared_with(branches), dict[int, tuple[int, int]]()
    figure, axes = plt.subplots(figsize=(11, 0.42 * len(branches) + 1.2))
    shades = plt.get_cmap("YlGnBu")
    for row, branch in enumerate(branches):
        parent = None
        for column, page in enumerate(branch.pages):
            if page in place:
                parent = place[page]
                continue
            if parent is not None and parent[1] != row:
                axes.plot([parent[0] + 0.5, parent[0] + 0.5, column], [parent[1], row, row],
                          color="0.6", linewidth=1, zorder=0)  # fmt: skip
                parent = None
            place[page] = column, row
            shade = shades(0.15 + 0.75 * (held[page] - 1) / max(len(branches) - 1, 1))
            box = (column + 0.08, row - 0.32)
            axes.add_patch(plt.Rectangle(box, 0.84, 0.64, facecolor=shade, edgecolor="0.3"))
        last = len(branch.pages) + 0.3
        axes.text(last, row, branch.name, va="center", fontsize=9)
    axes.set_xlim(0, max(len(b.pages) for b in branches) + 9)
    axes.set_ylim(len(branches) - 0.4, -0.6)
    axes.set_xlabel(f"page of a sequence ({PAGE_SIZE} tokens each); darker: held by more answers")
    axes.set_yticks([])
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Ask, print the tree, and draw it if told where."""
    parser = argparse.ArgumentParser(description="One document, ten questions, as a tree of pages.")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many to ask")
    parser.add_argument("--new-tokens", type=int, default=24, help="an answer")
    parser.add_argument("--tokens", type=int, default=400, help="of the document")
    parser.add_argument("--picture", help="where to draw the tree (needs matplotlib)")
    arguments = parser.parse_args()

    from pydoc_data.topics import topics

    import torch

    from kvpaged import PagedKVCache
    from kvpaged.testing import models

    model, tokenizer = models.load("smollm2", dtype=torch.float32)
    text = tokenizer(str(topics["strings"]), return_tensors="pt")["input_ids"]
    document = text[:, : arguments.tokens]
    with PagedKVCache.for_model(model, memory="256MiB", page_size=PAGE_SIZE) as cache:
        branches, stats = grow(
            model, tokenizer, cache, document,
            questions=arguments.questions, new_tokens=arguments.new_tokens,
        )  # fmt: skip
        apart = sum(len(branch.pages) for branch in branches)
        together = len(shared_with(branches))
        assert stats.used >= together * cache.groups[0].geometry.page_bytes
    print(f"a document of {document.shape[1]} tokens, {len(branches)} answers\n")
    for branch in branches:
        print(f"  {branch.name:<32}{branch.computed:>4} tokens computed")
    print(f"\n{together} pages hold them all; each by itself would take {apart}")
    if arguments.picture:
        draw(branches, arguments.picture)
        print(f"drawn: {arguments.picture}")


if __name__ == "__main__":
    main()
