"""kvpaged: the KV cache of a transformer as a library, in pages."""

from typing import TYPE_CHECKING

from kvpaged import operators as _operators  # noqa: F401 - registers torch.ops.kvpaged
from kvpaged.cache import PagedKVCache
from kvpaged.errors import KVPagedError, OutOfPagesError
from kvpaged.formats.kv import KVFormat
from kvpaged.generate.generator import Generator
from kvpaged.generate.params import Completion, SamplingParams, TokenEvent
from kvpaged.geometry import LayerGroup, PageGeometry
from kvpaged.offload.options import OffloadOptions
from kvpaged.tiers.host import HostTier
from kvpaged.token_batch import TokenBatch

if TYPE_CHECKING:
    from kvpaged.calibration import Calibration, calibrate
    from kvpaged.lsm.store import TensorStore
    from kvpaged.tiers.disk import DiskTier
    from kvpaged.tuning import tune

__all__ = [
    "Calibration",
    "Completion",
    "DiskTier",
    "Generator",
    "HostTier",
    "KVFormat",
    "KVPagedError",
    "LayerGroup",
    "OffloadOptions",
    "OutOfPagesError",
    "PageGeometry",
    "PagedKVCache",
    "SamplingParams",
    "TensorStore",
    "TokenBatch",
    "TokenEvent",
    "calibrate",
    "tune",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`TensorStore` and `DiskTier` when first asked for, because only a store needs zstandard and
    xxhash; `calibrate` and `tune` because few ever do.
    """
    if name in ("Calibration", "calibrate"):
        from kvpaged import calibration

        return getattr(calibration, name)
    if name == "tune":
        from kvpaged.tuning import tune

        return tune
    if name == "DiskTier":
        from kvpaged.tiers.disk import DiskTier

        return DiskTier
    if name == "TensorStore":
        from kvpaged.lsm.store import TensorStore

        return TensorStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
