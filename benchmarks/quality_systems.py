"""The caches whose quality is measured: ours in each format, and transformers' `QuantizedCache`."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpaged import PagedKVCache
from kvpaged.batch import Batch
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.books import CacheBooks
from kvpaged.config import Backend
from kvpaged.formats.kv import KVFormat
from kvpaged.geometry import LayerGroup
from kvpaged.likeness import bits_per_element
from kvpaged.pages.mixed import MixedClass

LENGTHS = (1_500, 8_000)
"""Tokens of the sequences whose bits are counted whole."""

PLAIN_BITS = 16
"""Of an exact element, wherever bits are counted: as of a model in bf16, whatever this is in."""

PEERS: dict[str, tuple[str, dict[str, int]]] = {
    "quanto-4": ("quanto", {"nbits": 4, "axis_key": 0, "axis_value": 0}),
    "quanto-8": ("quanto", {"nbits": 8, "axis_key": 0, "axis_value": 0}),
    "hqq-4": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
    "hqq-8": ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1}),
    "hf-fp8": ("fp8", {}),
}
"""Back ends of `QuantizedCache` and their options: the axes its documentation recommends, all else
as it comes (groups of 64, 128 exact tokens at the end).
"""

PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq", "fp8": "torch"}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A cache to be measured.

    Attributes:
        name: of the format, or of the peer.
        open: for prompts `[rows, columns]`, an empty cache as a context manager.
        bits: what an element takes, in several ways: see `format_bits` and `peer_bits`.
        close: when all is done.
    """

    name: str
    open: Callable[[Tensor], AbstractContextManager[Any]]
    bits: Callable[[], dict[str, float]]
    close: Callable[[], object]


def paged(
    model: Any, name: str, kv_format: str | KVFormat, *, memory: int, backend: Backend | None
) -> System:
    """Ours, in a format ("auto": exact)."""
    cache = PagedKVCache.for_model(
        model, memory, page_size=PAGE_SIZE, kv_format=kv_format, backend=backend,
        prefix_sharing=False,
    )  # fmt: skip
    return System(
        name=name, open=cache.session, bits=lambda: format_bits(cache.groups, cache.kv_format),
        close=cache.close,
    )  # fmt: skip


def peer(model: Any, name: str) -> System | str:
    """transformers' `QuantizedCache`, or why it can't be measured."""
    back_end, options = PEERS[name]
    if not _is_there(PACKAGES[back_end]):
        return f"{PACKAGES[back_end]} is not installed"
    from transformers import QuantizedCache

    def make() -> Any:
        return QuantizedCache(backend=back_end, config=model.config, **options)

    try:
        make()
    except ValueError as error:  # which layers, and which bits, it serves
        return str(error)
    last: list[Any] = []

    @contextmanager
    def opened(rows: Tensor) -> Iterator[Any]:
        last[:] = [make()]
        yield last[0]

    return System(name=name, open=opened, bits=lambda: peer_bits(last[0]), close=last.clear)


def dynamic(model: Any) -> System:
    """transformers' exact cache: what its quantised ones are compared with, as ours with ours."""
    from transformers import DynamicCache

    return System(
        name="hf-exact", open=lambda rows: nullcontext(DynamicCache(config=model.config)),
        bits=lambda: {"page": float(PLAIN_BITS)}, close=lambda: None,
    )  # fmt: skip


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package it is in is missing
        return False


# -- bits of ours ----------------------------------------------------------------------------------


def format_bits(groups: tuple[LayerGroup, ...], kv_format: KVFormat) -> dict[str, float]:
    """Bits an element of K and V takes: in a sealed page, all in ("page"), and in sequences of
    `LENGTHS` tokens: their exact first page, their open page, and what rounding adds, by the
    bytes that a cache of such pages says it holds.
    """
    plain = tuple(
        replace(g, geometry=replace(g.geometry, dtype=torch.bfloat16), device=torch.device("cpu"))
        for g in groups
    )
    bits = {"page": bits_per_element(plain, kv_format)}
    for length in LENGTHS:
        held = held_bytes(plain, kv_format, length)
        there = sum(elements_of(g, min(length, g.window or length)) for g in plain)
        bits[f"{length} tokens"] = 8 * held / there
    return bits


def elements_of(group: LayerGroup, tokens: int) -> int:
    """Numbers in K and V of so many tokens, all layers."""
    geometry = group.geometry
    return tokens * geometry.layers * geometry.kv_heads * (geometry.k_width + geometry.v_width)


def held_bytes(groups: tuple[LayerGroup, ...], kv_format: KVFormat, length: int) -> int:
    """Bytes that a sequence of so many tokens holds, which went in as in a long decode; nothing is
    computed or written.
    """
    need = sum(group.geometry.page_bytes * (length // PAGE_SIZE + 4) for group in groups)
    books = CacheBooks(groups, 2 * need, kv_format=kv_format, backend="reference")
    try:
        batch = Batch(books, 1)
        for count in [PAGE_SIZE] * (length // PAGE_SIZE) + [length % PAGE_SIZE]:
            if count:
                batch.begin(np.array([count]))
                batch.commit()
                batch.publish()  # what has left a window goes back
        held = batch.memory_bytes()
        expected = [isinstance(each, MixedClass) for each in books.classes]
        assert any(expected) or kv_format.key() == b"", "a format without compressed pages"
        batch.close()
        return held
    finally:
        books.close()


# -- bits of peers ---------------------------------------------------------------------------------


def peer_bits(past: Any) -> dict[str, float]:
    """Bits an element takes in the quantised part of a `QuantizedCache`, scales and zero points
    counted as 16 bits each ("page"), and in sequences of some lengths with the exact tokens that it
    has at their end on average ("exact tokens").
    """
    coded = numbers = 0.0
    for layer in past.layers:
        for state in (layer._quantized_keys, layer._quantized_values):
            bits, count = coded_bits(state)
            coded += bits
            numbers += count
    page = coded / numbers
    exact = (getattr(past.layers[0], "residual_length", 1) - 1) / 2  # from none to one less
    return {
        "page": page, "exact tokens": exact,
        **{f"{n} tokens": page + (PLAIN_BITS - page) * exact / n for n in (1_280, *LENGTHS)},
    }  # fmt: skip


def coded_bits(state: Any) -> tuple[float, float]:
    """Bits of one quantised tensor, and how many numbers it stands for."""
    if isinstance(state, tuple) and isinstance(state[1], dict):  # hqq: packed codes, and the rest
        packed, meta = state
        params = sum(meta[name].numel() for name in ("scale", "zero"))
        return 8 * packed.nbytes + PLAIN_BITS * params, math.prod(meta["shape"])
    if isinstance(state, tuple):  # fp8: codes, one scale
        return 8 * state[0].nbytes + PLAIN_BITS, state[0].numel()
    packed = state._data._data if hasattr(state._data, "_data") else state._data
    params = state._scale.numel() + state._shift.numel()
    return 8 * packed.nbytes + PLAIN_BITS * params, state.numel()
