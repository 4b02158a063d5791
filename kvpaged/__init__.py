"""kvpaged: the KV cache of a transformer as a library, in pages."""

from kvpaged import operators as _operators  # noqa: F401 - registers torch.ops.kvpaged
from kvpaged.cache import PagedKVCache
from kvpaged.errors import KVPagedError, OutOfPagesError
from kvpaged.generate.generator import Generator
from kvpaged.generate.params import Completion, SamplingParams, TokenEvent
from kvpaged.geometry import LayerGroup, PageGeometry
from kvpaged.token_batch import TokenBatch

__all__ = [
    "Completion",
    "Generator",
    "KVPagedError",
    "LayerGroup",
    "OutOfPagesError",
    "PageGeometry",
    "PagedKVCache",
    "SamplingParams",
    "TokenBatch",
    "TokenEvent",
]
__version__ = "0.1.0"
