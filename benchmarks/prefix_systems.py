"""The systems that benchmarks.prefix runs, each with what it has against computing a prefix twice.

All compute greedily, in one dtype, and never stop by themselves. `generate()` is never modified.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import common
from benchmarks.systems import (
    MEMORY,
    generate_with,
    layer_bytes,
    load_model,
)
from kvpaged import PagedKVCache
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.hf import collect_results, continuous_manager
from kvpaged.bench.vllm_engine import VLLMEngine
from kvpaged.testing.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What each system is called on the command line, in tables and in documents.
SYSTEMS = {
    "paged": "kvpaged",
    "dynamic": "HF DynamicCache",
    "copied": "HF DynamicCache, kept by hand",
    "continuous": "HF continuous batching",
    "vllm": "vLLM prefix caching",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What systems are made for: at most `rows` rows a call, each of `length` tokens at its end, of
    which at most `new` generated.
    """

    dtype: torch.dtype
    rows: int
    length: int
    new: int


@dataclass(frozen=True, slots=True)
class Served:
    """One call.

    Attributes:
        total_s: from the call to the last token of the last row, its cache given back.
        first_s: until a row has its first token, the median over rows.
        computed: prompt tokens that went through the model, all rows together; `None`: not known.
        kv_bytes: held for K and V at the end, when it is most; `None`: a pool of fixed size.
        tokens: `[rows, new]`, generated.
    """

    total_s: float
    first_s: float
    computed: int | None
    kv_bytes: int | None
    tokens: torch.Tensor


class System:
    """Generates after prompts, and may keep what it computed for later calls.

    Attributes:
        shares: a prefix that was computed once serves later calls.
        shares_within: it serves the other rows of the same call, too.
    """

    shares = True
    shares_within = False

    def forget(self) -> None:
        """Be as if nothing had been computed before; not timed."""

    def prepare(self, prefix: torch.Tensor) -> float:
        """Compute a prefix `[1, tokens]` that later calls begin with, as a user would; seconds."""
        return self.generate(prefix, 1).total_s

    def generate(self, ids: torch.Tensor, new: int) -> Served:
        """`new` tokens after each of the prompts `[rows, tokens]`."""
        raise NotImplementedError

    def converse(self, ids: torch.Tensor, new: int) -> Served:
        """The next turn of a conversation since `forget`: `ids` is all of it."""
        return self.generate(ids, new)


class Paged(System):
    """Ours: `generate()` over a session of the prompts, which begins with what the cache has."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model
        self.cache = PagedKVCache.for_model(model, memory=MEMORY, page_size=PAGE_SIZE)

    def forget(self) -> None:
        """Free all pages that nobody holds."""
        self.cache.clear()

    def generate(self, ids: torch.Tensor, new: int) -> Served:
        """One session, closed at the end: its full pages stay for the next."""
        start = common.clock()
        with self.cache.session(ids, attention_mask=torch.ones_like(ids)) as past:
            computed = ids.shape[0] * (ids.shape[1] - past.reused)
            run = generate_with(self._model, past, ids, new, start)
            held = past.memory_bytes()
        return Served(common.clock() - start, run.first_s, computed, held, run.tokens)


class Dynamic(System):
    """Hugging Face's default, which computes every prompt from its first token."""

    shares = False

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model = model

    def generate(self, ids: torch.Tensor, new: int) -> Served:
        """A new cache for the call."""
        return self._over(lambda _: self._new(), ids, new)

    def _new(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _over(self, make: Callable[[int], Any], ids: torch.Tensor, new: int) -> Served:
        """`generate()` over the cache that `make` gives for so many rows, in the time measured."""
        rows, columns = ids.shape
        start = common.clock()
        past = make(rows)
        computed = rows * (columns - past.get_seq_length())
        run = generate_with(self._model, past, ids, new, start)
        return Served(common.clock() - start, run.first_s, computed, layer_bytes(past), run.tokens)


class Copied(Dynamic):
    """What users of Hugging Face's cache do by hand: they keep that of the prefix, and give each
    call a deep copy of it, or go on with that of the turn before.
    """

    shares = True

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__(model)
        self._prefix: Any = None
        self._turns: Any = None

    def forget(self) -> None:
        """Let go of both."""
        self._prefix = self._turns = None

    def prepare(self, prefix: torch.Tensor) -> float:
        """One forward pass over the prefix."""
        start = common.clock()
        past = self._new()
        with torch.inference_mode():
            self._model(prefix, past_key_values=past, logits_to_keep=1)
        self._prefix = past
        return common.clock() - start

    def generate(self, ids: torch.Tensor, new: int) -> Served:
        """Over a copy for all rows, where there is a prefix."""
        return self._over(self._copy, ids, new)

    def _copy(self, rows: int) -> Any:
        if self._prefix is None:
            return self._new()
        past = copy.deepcopy(self._prefix)
        if rows > 1:
            past.batch_repeat_interleave(rows)
        return past

    def converse(self, ids: torch.Tensor, new: int) -> Served:
        """Over the cache of the turn before, which lacks the last token of the reply only."""
        if self._turns is None:
            self._turns = self._new()
        return self._over(lambda _: self._turns, ids, new)


class Continuous(System):
    """Hugging Face's continuous batching with its prefix sharing; see `systems.run_continuous`.

    Its pool has room for all rows unshared. It starts anew, untimed, when it has to forget.
    """

    def __init__(self, model: "PreTrainedModel", *, rows: int, length: int, new: int) -> None:
        self._model = model
        self._rows = rows
        self._blocks = (rows + 2) * -(-length // PAGE_SIZE)
        self._new = new
        self._stack = ExitStack()
        self._manager: Any = None

    def forget(self) -> None:
        """Stop; the next call starts it."""
        self._stack.close()
        self._manager = None

    def prepare(self, prefix: torch.Tensor) -> float:
        """Two tokens: it keeps nothing of a request that ends with its prompt's pass."""
        return self.generate(prefix, 2).total_s

    def generate(self, ids: torch.Tensor, new: int) -> Served:
        """All rows as requests at once."""
        manager = self._started()
        prompts = ids.tolist()
        start = common.clock()
        order = manager.add_requests(prompts, max_new_tokens=new, record_timestamps=True)
        results = collect_results(manager, len(prompts))
        end = common.clock()
        first = statistics.median(result.timestamps[0] for result in results.values())
        tokens = torch.tensor([results[request].generated_tokens for request in order])
        return Served(end - start, first - start, None, None, tokens)

    def _started(self) -> Any:
        if self._manager is None:
            manager = continuous_manager(
                self._model,
                new=self._new,
                blocks=self._blocks,
                requests=self._rows,
                sharing=True,
            )
            self._manager = self._stack.enter_context(manager)
            self._manager.add_requests([[1]], max_new_tokens=1)
            collect_results(self._manager, 1)
        return self._manager


class VLLM(System):
    """vLLM's automatic prefix caching.

    Attributes:
        about: its versions, and tokens a block.
    """

    shares_within = True

    def __init__(self, engine: VLLMEngine) -> None:
        self._engine = engine
        self.about = engine.about

    def forget(self) -> None:
        """Have the next call reset its cache."""
        self._engine.forget()

    def generate(self, ids: torch.Tensor, new: int) -> Served:
        """All rows at once; times are taken over there."""
        answer = self._engine.ask(ids.tolist(), new)
        computed = ids.numel() - answer["cached"]
        tokens = torch.tensor(answer["tokens"])
        return Served(answer["total_s"], answer["first_s"], computed, None, tokens)


def open_systems(
    names: Sequence[str], stack: ExitStack, work: Work, *, vllm: Path | None
) -> tuple[dict[str, System], "PreTrainedModel"]:
    """The named systems, over two instances of the same weights; the one that is left as it was
    loaded is given, too.
    """
    made: dict[str, System] = {}
    sizes = {"rows": work.rows, "length": work.length}
    with phase(f"loading SmolLM2-135M, {work.dtype}"):
        plain = load_model(work.dtype)
        if "paged" in names:
            made["paged"] = paged = Paged(load_model(work.dtype))
            stack.callback(paged.cache.close)
    if "dynamic" in names:
        made["dynamic"] = Dynamic(plain)
    if "copied" in names:
        made["copied"] = Copied(plain)
    if "continuous" in names:
        made["continuous"] = Continuous(plain, **sizes, new=work.new)
        stack.callback(made["continuous"].forget)
    if "vllm" in names and vllm is not None:
        with phase("starting vLLM, which may compile for a minute"):
            engine = VLLMEngine(vllm, work.dtype, rows=work.rows, length=work.length)
        stack.callback(engine.close)
        made["vllm"] = VLLM(engine)
    return made, plain
