"""The systems that benchmarks.generate runs: our pages, and Hugging Face's caches.

Each takes prompts `[batch, prompt]` and how many tokens to generate after each, and returns a `Run`
by the one timer of `common`. `generate()` is never modified.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.hf import TokenClock, collect_results, continuous_manager
from kvpaged.testing import models
from kvpaged.testing.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEMORY = "1GiB"

# What each system is called on the command line, in tables and in documents.
SYSTEMS = {
    "paged": "kvpaged",
    "dynamic": "HF DynamicCache",
    "static": "HF StaticCache",
    "continuous": "HF continuous batching",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One generation.

    Attributes:
        total_s: from the call to the last token of the last sequence.
        first_s: until a sequence has its first token, the median over sequences.
        decode_s: from when every sequence has its first token to the last token of the last.
        decode_tokens: generated in `decode_s`.
        kv_bytes: held for K and V at the end.
        tokens: [batch, new] generated.
    """

    total_s: float
    first_s: float
    decode_s: float
    decode_tokens: int
    kv_bytes: int
    tokens: torch.Tensor


Runner = Callable[[torch.Tensor, int], Run]


def generate_with(
    model: "PreTrainedModel", past: Any, ids: torch.Tensor, new: int, start: float
) -> Run:
    """Unmodified `generate()` over `past`; the bytes of `past` are for the caller to fill in."""
    ticks = TokenClock()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=past,
        max_new_tokens=new,
        do_sample=False,
        streamer=ticks,
        disable_compile=True,
    )
    end = common.clock()
    first = ticks.times[1]
    tokens = out[:, ids.shape[1] :]
    return Run(end - start, first - start, end - first, tokens[:, 1:].numel(), 0, tokens)


def with_bytes(run: Run, kv_bytes: int) -> Run:
    """`run` with its memory, which is read after the clock has stopped."""
    return replace(run, kv_bytes=kv_bytes)


def run_dynamic(model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Hugging Face's default: one tensor per layer, grown by concatenation."""
    from transformers import DynamicCache

    start = common.clock()
    past = DynamicCache(config=model.config)
    return with_bytes(generate_with(model, past, ids, new, start), layer_bytes(past))


def run_static(model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Preallocated to exactly what is needed: its best case in memory and in time.

    Not by `cache_implementation="static"`, which allocates at least as much as any earlier call
    did. On a CPU generate() does not compile by itself; this asks it not to, to be plain.
    """
    from transformers import StaticCache

    start = common.clock()
    past = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    return with_bytes(generate_with(model, past, ids, new, start), layer_bytes(past))


def run_continuous(model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Hugging Face's own paged cache, as fast and as small as its settings make it on a CPU.

    The clock starts when its thread stands ready, since starting takes a second. The pool is sized
    to the work (by default it takes 60 % of the machine's memory and seconds to clear it), prefill
    goes in chunks of 2,048 tokens (128 and 512 were slower, 16 or 256 tokens a page no faster),
    prefix sharing is off because all rounds have the same prompts.
    """
    batch, prompt = ids.shape
    prompts = ids.tolist()
    blocks = batch * -(-(prompt + new) // PAGE_SIZE)
    with continuous_manager(
        model, new=new, blocks=blocks, requests=batch, sharing=False
    ) as manager:
        manager.add_requests([prompts[0][:1]], max_new_tokens=1)
        collect_results(manager, 1)
        start = common.clock()
        order = manager.add_requests(prompts, max_new_tokens=new, record_timestamps=True)
        results = collect_results(manager, batch)
        end = common.clock()
        kv_bytes = manager.batch_processor.cache.cache_tensor.nbytes
    times = [result.timestamps for result in results.values()]
    firsts = [ticks[0] for ticks in times]
    # Prompts are taken in chunks, so early sequences already generate while late ones wait.
    all_started = max(firsts)
    return Run(
        total_s=end - start,
        first_s=statistics.median(firsts) - start,
        decode_s=end - all_started,
        decode_tokens=sum(tick > all_started for ticks in times for tick in ticks),
        kv_bytes=kv_bytes,
        tokens=torch.tensor([results[request].generated_tokens for request in order]),
    )


def run_paged(cache: Any, model: "PreTrainedModel", ids: torch.Tensor, new: int) -> Run:
    """Ours: unmodified `generate()` over a session of the paged cache, which has forgotten what it
    computed before: all rounds have the same prompts.
    """
    cache.clear()
    start = common.clock()
    with cache.session(ids, attention_mask=torch.ones_like(ids)) as past:
        run = generate_with(model, past, ids, new, start)
        return with_bytes(run, past.memory_bytes())


def layer_bytes(past: Any) -> int:
    """Bytes of all K and V tensors of a Hugging Face cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)


def runners(names: Sequence[str], stack: ExitStack) -> dict[str, Runner]:
    """The named systems, over two instances of the same weights: one is left as it was loaded."""
    made: dict[str, Runner] = {}
    peers = {"dynamic": run_dynamic, "static": run_static, "continuous": run_continuous}
    with phase("loading SmolLM2-135M in bf16"):
        plain = load_model() if set(names) & set(peers) else None
        prepared = load_model() if "paged" in names else None
    for name in names:
        if name == "paged":
            from kvpaged import PagedKVCache

            cache = PagedKVCache.for_model(prepared, memory=MEMORY, page_size=PAGE_SIZE)
            stack.callback(cache.close)
            made[name] = functools.partial(run_paged, cache, prepared)
        else:
            made[name] = functools.partial(peers[name], plain)
    return made


def load_model(dtype: torch.dtype = torch.bfloat16) -> "PreTrainedModel":
    """SmolLM2, which never stops by itself: every system generates to the last token."""
    model, _ = models.load("smollm2", dtype=dtype)
    model.generation_config.eos_token_id = None
    return model
