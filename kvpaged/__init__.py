"""kvpaged: the KV cache of a transformer as a library, in pages."""

from typing import TYPE_CHECKING

from kvpaged import operators as _operators  # noqa: F401 - registers torch.ops.kvpaged
from kvpaged.cache import PagedKVCache
from kvpaged.errors import KVPagedError, OutOfPagesError
from kvpaged.generate.generator import Generator
from kvpaged.generate.params import Completion, SamplingParams, TokenEvent
from kvpaged.geometry import LayerGroup, PageGeometry
from kvpaged.token_batch import TokenBatch

if TYPE_CHECKING:
    from kvpaged.lsm.store import TensorStore

__all__ = [
    "Completion",
    "Generator",
    "KVPagedError",
    "LayerGroup",
    "OutOfPagesError",
    "PageGeometry",
    "PagedKVCache",
    "SamplingParams",
    "TensorStore",
    "TokenBatch",
    "TokenEvent",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`TensorStore` when it is first asked for: only a store needs zstandard and xxhash."""
    if name == "TensorStore":
        from kvpaged.lsm.store import TensorStore

        return TensorStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
