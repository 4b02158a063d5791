"""`Generator`: any Hugging Face causal model, a paged cache, and a stream of requests."""

import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from kvpaged.cache import PagedKVCache
from kvpaged.errors import UsageError
from kvpaged.generate.bar import Bar
from kvpaged.generate.engine import Engine
from kvpaged.generate.interrupts import close_at_exit, held_interrupts
from kvpaged.generate.pages import PageNeeds
from kvpaged.generate.params import Completion, SamplingParams, TokenEvent
from kvpaged.generate.prompts import Prompt, Prompts, eos_of, positions_of
from kvpaged.generate.requests import Ints, Reply, Request
from kvpaged.generate.scheduler import rank_of
from kvpaged.generate.submission import Submission
from kvpaged.generate.text import Texts, TextTail
from kvpaged.generate.totals import EngineStats
from kvpaged.generate.turns import Turns
from kvpaged.keys import Salt, encode_salt
from kvpaged.pages.extents import Ids
from kvpaged.slot_batch import SlotBatch

REPLY_SEED = 0xD1342543DE82EF95
"""How far apart the seeds of a request's replies are: odd, so that no two meet."""


class Generator:
    """Continuous batching: requests come and go, each step computes what all of them need next.

    The model's own code runs, over packed tokens: prompts in chunks beside replies, no padding.
    Prefixes are shared with everything else in the cache. When pages run out, the request last in
    the line is set back and computed again later; that is no error.

    Any thread may call it, and several may: each step is taken by one of them. `submit` has a
    thread of its own take steps while something is open.
    """

    def __init__(
        self,
        model: Any,
        cache: PagedKVCache,
        *,
        tokenizer: Any = None,
        max_running: int | None = None,
        max_batch_tokens: int | None = None,
        chunk: int | None = None,
        compile: bool = False,
        pack_weights: bool = False,
        lookahead: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        """
        Args:
            model: the one the cache was made for.
            cache: made by `PagedKVCache.for_model`.
            tokenizer: a transformers tokenizer, for prompts of text and messages, texts of replies
                and stop texts.
            max_running: sequences that run at once; `None`: 64 on a CPU, 256 elsewhere.
            max_batch_tokens: tokens of a step; `None`: 512 on a CPU, 4,096 elsewhere. Long prompts
                delay the next token of running replies by at most so many.
            chunk: the most tokens of one prompt in a step; `None`: all of the step's.
            compile: run the model through `torch.compile` (inductor, any number of tokens): this
                constructor then takes a minute or two on a CPU (`compile_s`), less where
                inductor's cache on disk has the kernels.
            pack_weights: on a CPU, keep a packed copy of the linear layers' weights, which products
                are up to twice as fast with. Elsewhere, for a compiled model, lay the weights of
                layers with a common input side by side, so that one product does for all: the
                model's parameters are then views of a common tensor, until `close`.
            lookahead: launch each step before the tokens of the one before have been read (where no
                logits processor or prompt lookup needs them), so that the device does not wait for
                the host; a reply that ends has then taken part in one step more. `None`: not on a
                CPU.
            graphs: capture the model's pass for steps of one token a row as CUDA graphs, here, one
                for each of some batch sizes; hooks and adapters are as they are when it is
                captured: again between requests when any has come or gone, or weights have been
                replaced. `None`: where the cache is on one CUDA device.

        Raises:
            UsageError: the cache is of another model, or a number is out of range.
            UnsupportedModelError: the model can't be run over packed tokens.
        """
        from kvpaged.integrations.transformers import open_packed

        preparation = cache._preparation
        if preparation is None:
            raise UsageError("a Generator runs on a cache made by PagedKVCache.for_model")
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if preparation.model is not inner:
            raise UsageError("the cache was made for another model object")
        on_cpu = cache.groups[0].device.type == "cpu"
        max_running = _count("max_running", max_running, 64 if on_cpu else 256)
        budget = _count("max_batch_tokens", max_batch_tokens, 512 if on_cpu else 4096)
        budget = max(budget, max_running)
        chunk = _count("chunk", chunk, budget)
        self.cache = cache
        self.tokenizer = tokenizer
        self._texts: Texts | None = None
        self._batch = SlotBatch(cache, max_running)
        with ExitStack() as undo:
            undo.callback(self._batch.close)
            self._packed = open_packed(
                cache, preparation, self._batch, compiled=compile, pack_weights=pack_weights,
                graphs=graphs,
            )  # fmt: skip
            undo.callback(self._packed.release)
            self._packed.check(self._batch)
            vocabulary = int(inner.get_input_embeddings().weight.shape[0])
            self._prompts = Prompts(tokenizer, vocabulary, preparation.lengths, positions_of(inner))
            self._engine = Engine(
                self._batch, self._packed, PageNeeds(cache),
                budget=budget, chunk=chunk, eos=eos_of(inner),
                lookahead=not on_cpu if lookahead is None else lookahead,
            )  # fmt: skip
            undo.pop_all()
        self._numbers = itertools.count()
        self._numbering = threading.Lock()
        self._turn = Turns()
        self._inbox: deque[Request] = deque()  # submitted, not in the line yet
        self._late: deque[Request] = deque()  # to be cancelled when the step that runs has ended
        self._thread: threading.Thread | None = None

    # -- asking ------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        salt: Salt = None,
        priority: int = 0,
        deadline_s: float | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Reply to every prompt.

        Args:
            prompts: one request each.
            params: for all, or one for each.
            salt: a tenant's secret, see `PagedKVCache.batch`.
            priority: higher ones go before lower ones.
            deadline_s: seconds from now after which a reply ends as it is.
            progress: show a bar.
            options: fields of `SamplingParams`, instead of `params` or changing it.

        Returns:
            The replies in the order of the prompts, a request's `n` side by side. A request that
            could not be served has a reply with `finish_reason="error"` and the `error`
            (`raise_for_error()`); the others are not touched by it.

        Raises:
            UsageError: prompts are not a list, or not as many as `params`.
            ConfigError: an option is impossible.
        """
        done: list[Completion] = []
        asked = self._requests(
            prompts, params, options, salt=salt, priority=priority, deadline_s=deadline_s
        )
        for request in asked:
            request.on_end = done.append
        with Bar(sum(len(request.replies) for request in asked), progress) as moved:
            self._run(asked, lambda: moved(len(done)))
        replies = [reply.completion for request in asked for reply in request.replies]
        first = asked[0].number if asked else 0
        for completion in replies:
            completion.request -= first
        return replies

    def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        salt: Salt = None,
        priority: int = 0,
        deadline_s: float | None = None,
        **options: Any,
    ) -> Iterator[TokenEvent]:
        """The same as events, as they come; arguments as of `generate`. A stream that is not read
        to its end (`close()`, or `break` out of its loop) cancels what is open of it.
        """
        events: deque[TokenEvent] = deque()
        asked = self._requests(
            prompts, params, options, salt=salt, priority=priority, deadline_s=deadline_s,
            on_event=events.append,
        )  # fmt: skip
        return self._stream(asked, events)

    def _stream(self, asked: list[Request], events: deque[TokenEvent]) -> Iterator[TokenEvent]:
        first = asked[0].number if asked else 0
        try:
            self._add(asked)
            while True:
                while events:
                    event = events.popleft()
                    if event.completion is not None:
                        event.completion.request -= first
                    yield replace(event, request=event.request - first)
                with held_interrupts(), self._turn:  # in another's step one ends before it is told
                    if not events and not any(request.open for request in asked):
                        break
                if not events:
                    self._step()
        finally:
            self._cancel(asked)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        salt: Salt = None,
        priority: int = 0,
        deadline_s: float | None = None,
        **options: Any,
    ) -> Submission:
        """Ask for one prompt's replies and go on: `async for event in ...`, `await ...`, or
        `.result()`.

        Arguments as of `generate`. A thread of the generator's own takes the steps; this call waits
        for none of them.
        """
        submission = Submission(self._cancel)
        (request,) = self._requests(
            [prompt], params, options, salt=salt, priority=priority, deadline_s=deadline_s,
            on_event=submission.tell,
        )  # fmt: skip
        submission.of = request
        self._engine.check()
        with held_interrupts(), self._numbering:
            self._inbox.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="kvpaged", daemon=True)
                self._thread.start()
                close_at_exit(self)
        return submission

    # -- looking after itself ----------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Running totals of its steps, and how many replies run and wait now."""
        with held_interrupts(), self._turn:
            return self._engine.totals()

    def page_map(self, group: int = 0) -> dict[tuple[int, int], Ids]:
        """Page ids that each running reply holds in a layer group, in order of the tokens they
        hold: by the number its request has in this generator, and its index.
        """
        with held_interrupts(), self._turn:
            return self._engine.page_map(group)

    @property
    def compile_s(self) -> float | None:
        """Seconds that compiling took, when it was made; `None`: the model is not compiled."""
        return self._packed.compile_s

    def close(self) -> None:
        """Cancel what is open and give all pages back; full ones wait in the cache.

        Raises:
            UsageError: called within a step, by a logits processor, say.
        """
        self._check_outside()
        with held_interrupts(), self._turn:
            if not self._batch.closed:
                self._engine.reset()
            self._batch.close()
            self._collect()
            self._packed.release()
        if (thread := self._thread) is not None and thread is not threading.current_thread():
            thread.join()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- steps -------------------------------------------------------------------------------------

    def _add(self, asked: list[Request]) -> None:
        self._check_outside()
        with held_interrupts(), self._turn:
            self._engine.check()
            self._collect()
            for request in asked:
                self._enter(request)

    def _collect(self) -> None:
        """Put what was submitted into the line; if this has been closed, end it."""
        while self._inbox:
            request = self._inbox.popleft()
            if self._batch.closed:
                self._engine.add(request)
                self._engine.cancel(request)
            else:
                self._enter(request)
        while self._late:
            request = self._late.popleft()
            if request.open and not self._batch.closed:
                self._engine.cancel(request)

    def _enter(self, request: Request) -> None:
        try:
            if self._engine.idle:
                self._packed.refresh(self._batch)
            self._engine.add(request)
        except Exception as error:  # whatever it is, it is of this request alone
            self._engine.refuse(request, error)

    def _run(self, asked: list[Request], after: Callable[[], None]) -> None:
        """Take steps until these requests have ended."""
        try:
            self._add(asked)
            while any(request.open for request in asked):
                self._step()
                after()
        finally:
            self._cancel(asked)

    def _step(self) -> None:
        self._check_outside()
        with held_interrupts(), self._turn:
            self._collect()
            self._engine.step()
            self._collect()

    def _cancel(self, asked: Sequence[Request]) -> None:
        self._late.extend(asked)
        if not self._turn.is_mine():  # else within a step: at its end
            with held_interrupts(), self._turn:
                self._collect()

    def _check_outside(self) -> None:
        """Raise `UsageError` if this thread is within a step."""
        if self._turn.is_mine():
            raise UsageError(
                "a step of this generator runs in this thread: it can't be used within"
            )

    def _serve(self) -> None:
        while True:
            with self._turn:
                try:
                    self._collect()
                    if not self._engine.idle and not self._batch.closed:
                        self._engine.step()
                        continue
                except Exception as error:  # nobody else would hear of it, and many wait
                    self._engine.reset(error)
                with self._numbering:
                    if not self._inbox and not self._late:
                        self._thread = None
                        return

    # -- requests ----------------------------------------------------------------------------------

    def _requests(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        options: dict[str, Any],
        *,
        salt: Salt,
        priority: int,
        deadline_s: float | None,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> list[Request]:
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence | Tensor):
            raise UsageError(f"prompts are a list of prompts, got {type(prompts).__name__}")
        given = [params] * len(prompts) if isinstance(params, SamplingParams | None) else params
        if len(given) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts came with {len(given)} params")
        encode_salt(salt)  # raises if it is none
        now = time.perf_counter()
        each = [replace(p or SamplingParams(), **options) for p in given]
        deadline = np.inf if deadline_s is None else now + deadline_s
        with self._numbering:  # one call's follow each other, whoever else calls
            numbers = [next(self._numbers) for _ in each]
        return [
            self._request(number, prompt, own, salt, priority, now, deadline, on_event)
            for number, prompt, own in zip(numbers, prompts, each, strict=True)
        ]

    def _request(
        self, number: int, prompt: Prompt, params: SamplingParams, salt: Salt, priority: int,
        now: float, deadline: float, on_event: Callable[[TokenEvent], None] | None,
    ) -> Request:  # fmt: skip
        problem: Exception | None = None
        ids: Ints = np.zeros(1, np.int64)
        try:
            ids = self._prompts.ids(prompt)
            self._prompts.check(ids, params)
        except Exception as error:  # a tokenizer's too: the other prompts of the call are served
            problem = error
        seed = secrets.randbits(62) if params.seed is None else params.seed
        texts = self._texts_now()
        request = Request(
            number=number, prompt=ids, params=params, salt=salt, rank=rank_of(number, priority),
            submitted=now, deadline=deadline, seed=seed, on_event=on_event, problem=problem,
            decode=None if texts is None else texts.decode,
        )  # fmt: skip
        told = texts if params.stop or on_event is not None else None
        for index in range(params.n):
            completion = Completion(number, index, len(ids))
            tail = None if told is None else TextTail(told, params.stop)
            request.replies.append(
                Reply(
                    request=request,
                    index=index,
                    seed=(seed + index * REPLY_SEED) % 2**64,
                    ids=ids,
                    tail=tail,
                    completion=completion,
                )
            )
        return request

    def _texts_now(self) -> Texts | None:
        """How ids become text by the tokenizer as it is now."""
        if self.tokenizer is None:
            return None
        known = self._texts
        if known is None or not known.are_of(self.tokenizer):
            known = self._texts = Texts(self.tokenizer)
        return known


def _count(name: str, given: int | None, default: int) -> int:
    if given is None:
        return default
    if given < 1:
        raise UsageError(f"{name} is 1 or more, got {given}")
    return given
