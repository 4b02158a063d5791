"""kvpaged over SmolLM2 in a process of its own, which can end and begin again as a service does.

    python -m benchmarks.tiers_worker '{"loop": "generate", "dtype": "bfloat16", "memory": 50000000,
                                        "host": 1000000000, "disk": "/folder", "compile": false}'

Asked as vLLM is (`kvpaged.bench.vllm_runner`), one prompt at a time. The end of its input closes
the cache, so that what tiers still have to write is written.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import torch

from benchmarks import common
from benchmarks.systems import generate_with, load_model
from kvpaged import DiskTier, Generator, HostTier, PagedKVCache, SamplingParams
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.tiers.base import Tier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DISK_BYTES = "4GiB"


class Served(NamedTuple):
    """One prompt: seconds to the first and to the last token, prompt tokens found, the reply."""

    first_s: float
    total_s: float
    cached: int
    tokens: list[int]


Loop = Callable[[list[int], int], Served]


def make_tiers(host: int | None, disk: str | Path | None) -> list[Tier]:
    """The levels under the pool: bytes of host memory, a folder; `None`: without."""
    tiers: list[Tier] = []
    if host is not None:
        tiers.append(HostTier(host))
    if disk is not None:
        tiers.append(DiskTier(disk, DISK_BYTES))
    return tiers


def hugging_face(model: "PreTrainedModel", cache: PagedKVCache) -> Loop:
    """Unmodified `generate()` over a session."""

    def serve(prompt: list[int], new: int) -> Served:
        ids = torch.tensor([prompt])
        start = common.clock()
        with cache.session(ids, attention_mask=torch.ones_like(ids)) as past:
            found = past.reused
            run = generate_with(model, past, ids, new, start)
        return Served(run.first_s, common.clock() - start, found, run.tokens[0].tolist())

    return serve


def own_loop(generator: Generator) -> Loop:
    """A `Generator`."""

    def serve(prompt: list[int], new: int) -> Served:
        start = common.clock()
        (done,) = generator.generate([prompt], SamplingParams(max_new_tokens=new, ignore_eos=True))
        total = common.clock() - start
        done.raise_for_error()
        assert done.first_token_s is not None
        return Served(done.first_token_s, total, done.cached_tokens, done.tokens)

    return serve


def serve(asked: dict[str, Any], cache: PagedKVCache, loop: Loop) -> dict[str, Any]:
    """The answer to a line."""
    if asked["reset"]:
        cache.clear()
    (prompt,) = asked["prompts"]
    done = loop(prompt, asked["new"])
    return {**done._asdict(), "tokens": [done.tokens]}


def main(arguments: Sequence[str], questions: TextIO, answers: TextIO) -> None:
    """Say that it stands ready, then answer until the questions end."""
    (text,) = arguments
    options = json.loads(text)
    start = common.clock()
    model = load_model(getattr(torch, options["dtype"]))
    loaded = common.clock()
    with ExitStack() as stack:
        tiers = make_tiers(options["host"], options["disk"])
        cache = stack.enter_context(
            PagedKVCache.for_model(model, options["memory"], page_size=PAGE_SIZE, tiers=tiers)
        )
        if options["loop"] == "generate":
            loop = hugging_face(model, cache)
        else:
            generator = Generator(
                model, cache, max_batch_tokens=2048, compile=options["compile"], pack_weights=True
            )
            loop = own_loop(stack.enter_context(generator))
        about = {"load_s": loaded - start, "open_s": common.clock() - loaded}
        print(json.dumps(about), file=answers, flush=True)
        for line in questions:
            print(json.dumps(serve(json.loads(line), cache, loop)), file=answers, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")  # answers keep what was stdout; whatever else prints is log
    os.dup2(2, 1)
    main(sys.argv[1:], sys.stdin, own)
