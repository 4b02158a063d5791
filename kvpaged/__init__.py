"""kvpaged: the KV cache of a transformer as a library, in pages."""

from kvpaged import operators as _operators  # noqa: F401 - registers torch.ops.kvpaged
from kvpaged.cache import PagedKVCache
from kvpaged.errors import KVPagedError, OutOfPagesError
from kvpaged.geometry import LayerGroup, PageGeometry
from kvpaged.token_batch import TokenBatch

__all__ = [
    "KVPagedError",
    "LayerGroup",
    "OutOfPagesError",
    "PageGeometry",
    "PagedKVCache",
    "TokenBatch",
]
__version__ = "0.1.0"
