"""Hugging Face's loops as benchmarks drive them: when tokens come, and its continuous batching."""

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from kvpaged.bench import common
from kvpaged.bench.common import PAGE_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenClock:
    """A streamer for `generate()` that notes when tokens come; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """One step's tokens, of all sequences."""
        self.times.append(common.clock())

    def end(self) -> None:
        """Nothing is held back."""


def continuous_manager(
    model: "PreTrainedModel", *, new: int, blocks: int, requests: int, sharing: bool
) -> AbstractContextManager[Any]:
    """Hugging Face's continuous batching over `blocks` pages, at most `requests` at a time, of
    `new` tokens unless a request says otherwise.
    """
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    generation = GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=model.generation_config.pad_token_id,
    )
    names = inspect.signature(ContinuousBatchingConfig).parameters
    size = {"page_size" if "page_size" in names else "block_size": PAGE_SIZE}  # until 5.17
    settings = ContinuousBatchingConfig(
        num_blocks=blocks,
        max_batch_tokens=max(2048, requests),
        max_requests_per_batch=requests,
        allow_block_sharing=sharing,
        **size,
    )
    manager: AbstractContextManager[Any] = model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, warmup=False
    )
    return manager


def collect_results(manager: Any, count: int) -> dict[str, Any]:
    """Wait for `count` finished requests of a continuous-batching manager, by request id."""
    results: dict[str, Any] = {}
    while len(results) < count:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            results[result.request_id] = result
        elif result is None and not manager.is_running():
            raise RuntimeError("the continuous batching thread ended before its requests")
    return results
