"""One tiny model for all that is asked of it."""

import pytest
from transformers import LlamaForCausalLM

from tests.hf.tiny import tiny


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny()
