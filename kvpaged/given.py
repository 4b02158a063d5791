"""What a cache and its sequences are made with, checked."""

from collections.abc import Sequence
from typing import Any

import torch

from kvpaged.config import Backend, CacheConfig, Layout, parse_bytes
from kvpaged.errors import ConfigError, UsageError
from kvpaged.geometry import LayerGroup, PageGeometry


def one_each(name: str, given: Any, rows: int, kinds: tuple[type, ...]) -> list[Any]:
    """`given` for each of `rows` rows: itself, or the one of each."""
    if isinstance(given, kinds):
        return [given] * rows
    if not isinstance(given, Sequence) or len(given) != rows:
        raise UsageError(f"{name} is one for all rows or a sequence of {rows}, got {given!r}")
    wrong = [each for each in given if not isinstance(each, kinds)]
    if wrong:
        raise UsageError(f"{name} of a row can't be {wrong[0]!r}")
    return list(given)


def config_of(
    groups: list[LayerGroup],
    memory: int | str,
    layout: Layout | None,
    backend: Backend | None,
    checksums: bool,
) -> CacheConfig:
    """The config of a cache of these groups; raises `ConfigError` where it is impossible."""
    sizes = {group.geometry.page_size for group in groups}
    if len(sizes) != 1:
        raise ConfigError(f"the groups of a cache have one page size, got {sorted(sizes)}")
    return CacheConfig(
        memory=parse_bytes(memory),
        page_size=sizes.pop(),
        layout=layout,
        backend=backend,
        checksums=checksums,
    )


def as_groups(
    geometry: PageGeometry | Sequence[LayerGroup], device: torch.device
) -> list[LayerGroup]:
    """Layer groups, of a geometry as well; raises `ConfigError` if there are none."""
    if isinstance(geometry, PageGeometry):
        return [LayerGroup(geometry=geometry, layers=tuple(range(geometry.layers)), device=device)]
    groups = list(geometry)
    if not groups:
        raise ConfigError("a cache has at least one layer group")
    return groups
