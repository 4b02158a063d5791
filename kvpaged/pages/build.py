"""The pools of a cache, and the pages of its layer groups in them."""

from collections.abc import Sequence

from kvpaged.config import CacheConfig
from kvpaged.formats.kv import KVFormat
from kvpaged.geometry import LayerGroup
from kvpaged.pages.mixed import AnyClass, MixedClass
from kvpaged.pages.pool import PagePool


def build_pools(
    groups: Sequence[LayerGroup], config: CacheConfig, kv_format: KVFormat
) -> tuple[tuple[PagePool, ...], tuple[AnyClass, ...]]:
    """One pool a device, the budget divided by the bytes a token takes on each; and the pages of
    each group.

    Raises:
        ConfigError: see `PagePool`, `KVFormat.check_layers` and `KVFormat.sealed`.
    """
    kv_format.check_layers(layer for group in groups for layer in group.layers)
    devices = list(dict.fromkeys(group.device for group in groups))
    weights = [
        sum(group.geometry.token_bytes for group in groups if group.device == device)
        for device in devices
    ]
    sealed = [kv_format.sealed(group) for group in groups]
    pools: list[PagePool] = []
    by_group: dict[int, AnyClass] = {}
    for device, weight in zip(devices, weights, strict=True):
        mine = [i for i, group in enumerate(groups) if group.device == device]
        compressed = {i: geometry for i in mine if (geometry := sealed[i]) is not None}
        pool = PagePool(
            [*(groups[i].geometry for i in mine), *compressed.values()],
            memory=config.memory * weight // sum(weights), device=device,
            checksums=config.checksums,
        )  # fmt: skip
        pools.append(pool)
        exact = dict(zip(mine, pool.classes, strict=True))
        by_group.update(exact)
        for i, pages in zip(compressed, pool.sealed, strict=True):
            by_group[i] = MixedClass(exact[i], pages, kv_format.keep)
    return tuple(pools), tuple(by_group[i] for i in range(len(groups)))
