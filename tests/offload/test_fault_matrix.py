"""The same tokens, under `generate()` and by a `Generator`, over tiers that are full, slow, gone,
failing, corrupt or read-only.
"""

from pydoc_data.topics import topics

import pytest
import torch

from kvpaged import PagedKVCache
from tests.hf.tiny import ids, tiny
from tests.offload.faults import (
    FAULTS,
    MEMORY,
    PAGE_SIZE,
    POSITIONS,
    by_generator,
    by_session,
    run_matrix,
)  # fmt: skip

DRIVES = [by_session, by_generator]


@pytest.fixture(scope="module")
def asked(smollm2):
    """SmolLM2, prompts of two full pages and some tokens, and their tokens without tiers."""
    model, tokenizer = smollm2
    text = tokenizer("\n".join(topics.values())[:4000])["input_ids"]
    prompts = [text[start : start + 2 * PAGE_SIZE + 5] for start in (0, 200)]
    with PagedKVCache.for_model(model, MEMORY, page_size=PAGE_SIZE) as cache:
        return model, prompts, by_session(model, cache, prompts)


@pytest.mark.parametrize(
    ("drive", "position"), [(by_session, "host"), (by_session, "disk"), (by_generator, "disk")]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_time_and_nothing_else(asked, fault, drive, position, tmp_path, caplog):
    caplog.set_level("CRITICAL", "kvpaged.offload")
    model, prompts, wanted = asked
    with torch.inference_mode():
        run_matrix(drive, model, prompts, wanted, fault, POSITIONS[position](tmp_path))


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_small_model_in_longer_prompts(drive, fault, position, tmp_path, caplog):
    """More pages, so more calls for each prompt, and more prompts than the pool has room for."""
    caplog.set_level("CRITICAL", "kvpaged.offload")
    model = tiny(num_hidden_layers=3, num_key_value_heads=4, hidden_size=512)
    prompts = [ids(1, 150, seed)[0].tolist() for seed in range(4)]
    with torch.inference_mode():
        with PagedKVCache.for_model(model, MEMORY, page_size=PAGE_SIZE) as cache:
            wanted = by_session(model, cache, prompts)
        run_matrix(drive, model, prompts, wanted, fault, POSITIONS[position](tmp_path))
