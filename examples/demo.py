"""A small real model answers through the paged cache, and through Hugging Face's DynamicCache.

    make demo        or, where everything is installed: python examples/demo.py

The first run fetches SmolLM2-135M-Instruct (93 MB) and converts it once to the user cache.
"""

import argparse
import functools
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in one sentence why the sky is blue.",
    "Write two lines of a poem about memory.",
)
SYSTEM_TOKENS = 600
"""About how long the system prompt is that all questions share: text of Python's own manual."""
INDENT = "      "
PAGE_SIZE = 16  # short chats: less is empty at the end of a row than with the default of 64


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer: its token ids, when they came (seconds after the call), and how much of
    its prompt was in the cache.
    """

    tokens: list[int]
    first_s: float
    total_s: float
    reused: int = 0


class Printer:
    """A streamer for `generate()`: notes when tokens come and shows whole words as they do."""

    def __init__(self, tokenizer: Any, *, show: bool) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._width = min(88, shutil.get_terminal_size().columns) - 1
        self._column = 0  # of the line that is being written
        self._written = 0  # characters of the text already on the screen
        self._prompt_seen = False
        self.tokens: list[int] = []
        self.start = self.first = self.last = time.perf_counter()

    def put(self, value: Any) -> None:
        """The prompt on the first call, then a token a call."""
        self.last = time.perf_counter()
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if not self.tokens:
            self.first = self.last
        self.tokens.append(int(value))
        if self._show:
            self._write(final=False)

    def end(self) -> None:
        """Whatever was held back for lack of a space after it."""
        if self._show:
            self._write(final=True)
            print(flush=True)

    def _write(self, *, final: bool) -> None:
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True).replace("\n", " ")
        ready = len(text) if final else max(text.rfind(" "), self._written)
        for word in text[self._written : ready].split():
            if self._column == 0:
                lead = INDENT
            elif self._column + 1 + len(word) > self._width:
                lead, self._column = "\n" + INDENT, 0
            else:
                lead = " "
            sys.stdout.write(lead + word)
            self._column += len(lead.lstrip("\n")) + len(word)
        sys.stdout.flush()
        self._written = ready


def answer(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    open_cache: Callable[[], Any],
    *,
    new_tokens: int,
    show: bool,
) -> tuple[Answer, Any]:
    """One answer by unmodified `generate()`, and the cache that it filled."""
    printer = Printer(tokenizer, show=show)
    past = open_cache()
    reused = past.get_seq_length()
    model.generate(
        **prompt,
        past_key_values=past,
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=printer,
    )
    first_s, total_s = printer.first - printer.start, printer.last - printer.start
    return Answer(printer.tokens, first_s, total_s, reused), past


def system_prompt(tokenizer: Any) -> str:
    """A long instruction, as assistants have: what they are, and pages of text to go by."""
    from pydoc_data.topics import topics

    manual = tokenizer(str(topics["strings"]))["input_ids"][:SYSTEM_TOKENS]
    return f"You are a helpful assistant. You know Python:\n{tokenizer.decode(manual)}"


def rate(answers: list[Answer]) -> str:
    """Tokens a second over all answers, prompts included."""
    return f"{sum(len(a.tokens) for a in answers) / sum(a.total_s for a in answers):.1f}"


def first(answers: list[Answer]) -> str:
    """The median time to first token."""
    return f"{sorted(a.first_s for a in answers)[len(answers) // 2] * 1e3:.0f} ms"


def agreement(ours: list[int], theirs: list[int]) -> str:
    """How far two answers are the same."""
    if ours == theirs:
        return f"the same {len(ours)} tokens"
    same = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    return f"the same up to token {same}"


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.2f} MB"


def table(rows: list[tuple[str, str, str]]) -> str:
    """Three aligned columns with a rule under the first row."""
    lines = [f"  {name:<22}{ours:>16}{theirs:>16}" for name, ours, theirs in rows]
    return "\n".join([lines[0], "  " + "-" * 54, *lines[1:]])


@dataclass(slots=True)
class Side:
    """One of the two caches: how to open it for a prompt, the answers over it, what it filled, and
    what it was asked.
    """

    open: Callable[[Any], Any]
    answers: list[Answer] = field(default_factory=list)
    filled: list[Any] = field(default_factory=list)
    asked: list[Any] = field(default_factory=list)

    def ask(self, model: Any, tokenizer: Any, prompt: Any, *, new_tokens: int, show: bool) -> None:
        """Answer `prompt` and keep the answer and its cache."""
        given, past = answer(
            model, tokenizer, prompt, lambda: self.open(prompt), new_tokens=new_tokens, show=show
        )
        self.asked.append(prompt)
        self.answers.append(given)
        self.filled.append(past)


def ask_both(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    ours: Side,
    theirs: Side,
    *,
    new_tokens: int,
    forget: Callable[[], object],
) -> None:
    """Ask every question of both sides, and print ours as it comes; `forget` empties our cache."""
    system = system_prompt(tokenizer)
    for number, question in enumerate(questions, 1):
        prompt = tokenizer.apply_chat_template(
            [{"role": "system", "content": system}, {"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        if number == 1:  # the first calls of a process choose kernels: not in the figures
            end = {
                name: part[:, -48:] for name, part in prompt.items()
            }  # begins as no question does
            for side in (theirs, ours):
                warm = functools.partial(side.open, end)
                _, past = answer(model, tokenizer, end, warm, new_tokens=2, show=False)
            past.close()
            forget()
        print(textwrap.fill(f"{number}/{len(questions)}   {question}", 88))
        ours.ask(model, tokenizer, prompt, new_tokens=new_tokens, show=True)
        theirs.ask(model, tokenizer, prompt, new_tokens=new_tokens, show=False)
        same = agreement(ours.answers[-1].tokens, theirs.answers[-1].tokens)
        mine, peer = ours.answers[-1], theirs.answers[-1]
        print(
            f"{INDENT}[{mine.reused} of {prompt['input_ids'].shape[1]} prompt tokens were there: "
            f"first after {mine.first_s * 1e3:.0f} ms, DynamicCache {peer.first_s * 1e3:.0f}]\n"
            f"{INDENT}[DynamicCache: {same}]\n",
            flush=True,
        )


def comparison(ours: Side, theirs: Side, *, held: int, pages: int) -> str:
    """The figures of both sides, over all answers; ours hold `pages` pages, shared ones once."""
    held_by_peer = sum(
        layer.keys.nbytes + layer.values.nbytes for past in theirs.filled for layer in past.layers
    )
    return table(
        [
            ("", "kvpaged", "DynamicCache"),
            ("tokens/s", rate(ours.answers), rate(theirs.answers)),
            ("time to first token", first(ours.answers), first(theirs.answers)),
            ("KV held", megabytes(held), megabytes(held_by_peer)),
            (f"pages of {PAGE_SIZE} tokens", f"{pages}", "-"),
        ]
    )


def restart(folder: Path, prompt: Any) -> None:
    """Have another process answer a prompt over the pages that this one left on disk."""
    print("\nThe same prompt in a new process:", flush=True)
    ids = folder / "prompt"
    ids.write_text(" ".join(map(str, prompt["input_ids"][0].tolist())))
    script = Path(__file__).with_name("restart.py")
    command = [sys.executable, str(script), str(folder / "kv"), "--prompt", str(ids)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(textwrap.indent(textwrap.fill(done.stdout.strip(), 86), "  "))


def main() -> None:
    """Ask every question twice, then compare, then start again."""
    with ExitStack() as stack:
        run(stack)


def run(stack: ExitStack) -> None:
    """`main`; what `stack` closes lives until its end."""
    parser = argparse.ArgumentParser(description="A real model through the paged KV cache.")
    parser.add_argument("--new-tokens", type=int, default=48, help="at most, an answer")
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="how many to ask")
    arguments = parser.parse_args()
    print("kvpaged: a transformer's KV cache in pages, under unmodified generate()\n", flush=True)

    # Imported here, so that the line above comes at once and the wait below has a name.
    from kvpaged.testing.progress import phase

    with phase("importing PyTorch and transformers"):
        import torch
        from transformers import DynamicCache

        from kvpaged import DiskTier, PagedKVCache
        from kvpaged.testing import models

    models.path("smollm2")
    # In fp32 both must say the same; in bf16 rounding alone parts answers after a dozen tokens.
    with phase("loading SmolLM2-135M-Instruct"):
        model, tokenizer = models.load("smollm2", dtype=torch.float32)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvpaged-demo-")))
        cache = PagedKVCache.for_model(
            model, memory="256MiB", page_size=PAGE_SIZE, tiers=[DiskTier(folder / "kv", "1GiB")]
        )
    print(f"SmolLM2-135M-Instruct, fp32, {torch.get_num_threads()} CPU threads, greedy\n")

    with cache, ExitStack() as sessions:

        def paged(prompt: Any) -> Any:
            mask = prompt["attention_mask"]
            return sessions.enter_context(cache.session(prompt["input_ids"], attention_mask=mask))

        ours, theirs = Side(paged), Side(lambda prompt: DynamicCache(config=model.config))
        questions = QUESTIONS[: arguments.questions]
        ask_both(
            model, tokenizer, questions, ours, theirs,
            new_tokens=arguments.new_tokens, forget=cache.clear,
        )  # fmt: skip
        group = cache.stats().groups[0]
        pages = group.open_pages + group.sealed_pages
        print(comparison(ours, theirs, held=pages * group.page_bytes, pages=pages), flush=True)
    if questions:
        restart(folder, theirs.asked[-1])


if __name__ == "__main__":
    main()
