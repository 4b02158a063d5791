"""A tiny prepared model for tests that do not need a trained one."""

from collections.abc import Iterator

import pytest
from transformers import LlamaForCausalLM

from kvpaged import PagedKVCache
from tests.hf.tiny import tiny


@pytest.fixture
def small() -> Iterator[tuple[PagedKVCache, LlamaForCausalLM]]:
    """A cache of pages of 16 tokens and its model."""
    model = tiny()
    with PagedKVCache.for_model(model, "4MiB", page_size=16) as cache:
        yield cache, model
