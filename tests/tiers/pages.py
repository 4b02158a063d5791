"""Heads of made-up pages."""

import numpy as np

from kvpaged.geometry import PageGeometry
from kvpaged.keys import encode_tokens
from kvpaged.tiers.record import Head


def head_of(geometry: PageGeometry, number: int, group: int = 0) -> Head:
    rng = np.random.default_rng(number)
    return Head(
        group=group, geometry=geometry, depth=number, key=rng.bytes(16), before=rng.bytes(16),
        tokens=encode_tokens(rng.integers(0, 2**32, geometry.page_size)),
        sums=rng.integers(-(2**63), 2**63, geometry.layers),
    )  # fmt: skip
