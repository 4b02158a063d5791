"""Set-up that must come before any import of torch, triton or transformers, and the real models."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Kernels run under Triton's interpreter unless the caller asks for the compiled ones.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A test that would ask a hub for something fails at once instead of waiting for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers share the cores (processes they start too): `pytest -n` runs that many.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Models here are small: more threads than this only wait for each other.
torch.set_num_threads(min(torch.get_num_threads(), 4))


@pytest.fixture(scope="session")
def smollm2() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct in fp32 with its tokenizer; one instance for the whole run."""
    from kvpaged.testing import models

    return models.load("smollm2", dtype=torch.float32)


@pytest.fixture(scope="session")
def gemma3() -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Gemma-3-270m (sliding and full layers) in fp32 with its tokenizer."""
    from kvpaged.testing import models

    return models.load("gemma3", dtype=torch.float32)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors of a few hundred numbers: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
