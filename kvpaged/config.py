"""Options of a cache: one main dial (`memory`), the rest derived or defaulted."""

import re
from dataclasses import dataclass
from typing import Literal

from kvpaged.errors import ConfigError

Layout = Literal["page-major", "layer-major"]
Backend = Literal["cpu", "triton", "reference"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = _UNITS[_letter] = 1024**_power

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 16, 256


def parse_bytes(size: int | str) -> int:
    """Bytes of a size such as `1073741824`, `"4GiB"`, `"500 MB"` or `"1.5G"` (K, M, G, T alone are
    powers of 1024).

    Raises:
        ConfigError: not a size, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ConfigError(f"a size is an int of bytes or a string like '4GiB', not {size!r}")
    if isinstance(size, int):
        count = size
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        if match is None or match[2].upper() not in _UNITS:
            raise ConfigError(
                f"{size!r} is not a size: write bytes, or a number with KiB, MiB, GiB, TiB, KB, ..."
            )
        count = int(float(match[1]) * _UNITS[match[2].upper()])
    if count <= 0:
        raise ConfigError(f"a size must be positive, got {size!r}")
    return count


def format_bytes(count: int) -> str:
    """`1536` -> `'1.5 KiB'`: for messages, never parsed back."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """What a cache is made with.

    Attributes:
        memory: bytes of the page pool, exact: never more is held in pages. On a CPU it is committed
            as it is touched.
        page_size: token slots a page (16, 32, 64, 128 or 256). Small pages waste less at the end of
            a sequence and share more of a prefix; large ones need fewer table entries and copies.
            64 suits both devices.
        layout: where the bytes of a page lie. `None`: page-major on a GPU (a page is one DMA),
            layer-major on a CPU (a run of adjacent pages is one view per head).
        backend: which implementation computes: `"triton"` (GPUs; under Triton's interpreter
            anywhere), `"cpu"` (stock torch), `"reference"` (the eager oracles: slow, for tests).
            `None`: by the device of the pages.
        checksums: compute a checksum a layer slice when a page seals. About 0.5 % of a prefill on a
            CPU; without them `check_integrity` can only check the books.
    """

    memory: int
    page_size: int = 64
    layout: Layout | None = None
    backend: Backend | None = None
    checksums: bool = True

    def __post_init__(self) -> None:
        if self.memory <= 0:
            raise ConfigError(f"memory must be positive, got {self.memory}")
        check_page_size(self.page_size)
        if self.layout not in (None, "page-major", "layer-major"):
            raise ConfigError(f"layout must be 'page-major' or 'layer-major', got {self.layout!r}")
        if self.backend not in (None, "cpu", "triton", "reference"):
            raise ConfigError(
                f"backend must be 'cpu', 'triton' or 'reference', got {self.backend!r}"
            )

    def layout_on(self, device_type: str) -> Layout:
        """The layout pages have on a device of this type (`"cuda"`, `"cpu"`)."""
        return self.layout or ("layer-major" if device_type == "cpu" else "page-major")

    def backend_on(self, device_type: str) -> Backend:
        """The implementation that serves pages on a device of this type.

        Raises:
            ConfigError: the stock-torch path was asked for pages that are not on a CPU.
        """
        if self.backend == "cpu" and device_type != "cpu":
            raise ConfigError(f"backend 'cpu' cannot serve pages on a {device_type!r} device")
        return self.backend or ("cpu" if device_type == "cpu" else "triton")


def check_page_size(page_size: int) -> None:
    """Raise `ConfigError` unless `page_size` is a power of two the kernels know (16 to 256)."""
    fits = isinstance(page_size, int) and MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE
    if not fits or page_size & (page_size - 1):
        raise ConfigError(
            f"page_size must be 16, 32, 64, 128 or 256 token slots, got {page_size!r}"
        )
