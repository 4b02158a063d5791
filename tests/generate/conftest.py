"""One tiny model for all that is asked of it."""

import functools

import pytest
from transformers import LlamaForCausalLM

from kvpaged import Generator
from tests.hf.tiny import tiny


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny()


@pytest.fixture(params=[False, True], ids=["", "ahead"])
def lookahead(request, monkeypatch):
    """Everything holds too where a step is launched before the one before has been read."""
    made = functools.partialmethod(Generator.__init__, lookahead=request.param)
    monkeypatch.setattr(Generator, "__init__", made)
