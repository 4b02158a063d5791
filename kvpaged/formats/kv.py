"""How the pages of a cache hold K and V once they are full: by name, or layer by layer."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpaged.errors import ConfigError
from kvpaged.geometry import LayerGroup, PageGeometry, SealedGeometry
from kvpaged_kernels.sealed import Part, SliceLayout

EXACT = "exact"
CODES = (EXACT, "fp8", "int8", "int4", "int4g16", "int4g64")
"""How K or V of a layer can be coded: `g` and how many share a scale and a zero point, where these
are not as many as usual (`GROUPS`).
"""

NAMED = {
    "fp8": ("fp8", "fp8"), "int8": ("int8", "int8"), "k8v4": ("int8", "int4"),
    "int4": ("int4", "int4"),
}  # fmt: skip
"""By the name of a format: how it codes K and V."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Names of exact formats, each for models of that dtype alone."""

GROUPS = {"int8": (64, 32), "int4": (32, 32), "int4g16": (16, 16), "int4g64": (64, 64)}
"""How many share a scale and a zero point: in K tokens of a channel, at most a page's; in V
elements of a token, so many or the next whole number of quarters of the width, which kernels read
apart.
"""

IDS = {"fp8": 1, "int8": 2, "k8v4": 3, "int4": 4}
"""Ids of formats in records, never renumbered; exact pages are of format 0."""
BY_LAYER = 5
"""The id of every format whose layers differ: their pages' keys say which it is."""


def is_int4(code: str) -> bool:
    """Whether numbers are coded in 4 bits."""
    return code.startswith("int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """A format of full pages.

    Attributes:
        name: what it is called: one of `NAMED`, "auto" (as the model), or any other, of one made
            layer by layer.
        k, v: how all layers code them (`CODES`).
        layers: by a model's layer number: how it codes K and V, where that is other than `k`, `v`.
        keep: pages of a sequence, from the first on, that stay exact: attention sinks, the first
            tokens, are attended to by all others.
        queries: by a model's layer number: what its queries are like, fp16 `[kv_heads, 2,
            k_width]` as little-endian bytes. Keys of 4 bits are coded so that their errors cancel
            for queries like these, at the same size (`kvpaged.tune` observes them,
            `with_queries` takes them). Of other layers, nothing is known.
    """

    name: str = "auto"
    k: str = EXACT
    v: str = EXACT
    layers: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    keep: int = 1
    queries: Mapping[int, bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Takes what was given as it is at this moment. Raises ConfigError: it is no format."""
        try:
            layers = {int(n): (str(k), str(v)) for n, (k, v) in dict(self.layers).items()}
            queries = {int(n): bytes(memoryview(like)) for n, like in dict(self.queries).items()}
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"a format's layers are pairs of codes, and queries bytes, by layer number: {error}"
            ) from None
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "queries", queries)
        for k, v in ((self.k, self.v), *layers.values()):
            if k not in CODES or v not in CODES:
                raise ConfigError(f"K and V are coded as {', '.join(CODES)}; got {k!r} and {v!r}")
        if type(self.keep) is not int or self.keep < 0:
            raise ConfigError(f"a format keeps 0 or more pages exact, got {self.keep}")
        if not isinstance(self.name, str):
            raise ConfigError(f"a format's name is a string, got {self.name!r}")
        for layer, given in queries.items():
            if not given or len(given) % 4 or not np.isfinite(np.frombuffer(given, "<f2")).all():
                raise ConfigError(
                    f"what queries of layer {layer} are like is not finite numbers of fp16, but "
                    f"{len(given)} bytes"
                )

    def __hash__(self) -> int:
        return hash((self.name, self.key()))

    @classmethod
    def of(cls, given: "str | KVFormat", dtypes: set[torch.dtype]) -> "KVFormat":
        """The format of that name, for a model whose pages have these dtypes.

        Raises:
            ConfigError: there is none of that name, or it is another dtype's.
        """
        if isinstance(given, KVFormat):
            return given
        if given in NAMED:
            k, v = NAMED[given]
            return cls(name=given, k=k, v=v)
        if given in DTYPES:
            if dtypes != {DTYPES[given]}:
                raise ConfigError(
                    f"kv_format {given!r} is for models of {DTYPES[given]}, this one's pages are "
                    f"of {', '.join(sorted(map(str, dtypes)))}"
                )
            return cls()
        if given == "auto":
            return cls()
        names = ", ".join(("auto", *DTYPES, *NAMED))
        raise ConfigError(f"kv_format is one of {names}, or a KVFormat; got {given!r}")

    def codes(self, layer: int) -> tuple[str, str]:
        """How a model's layer codes K and V."""
        return self.layers.get(layer, (self.k, self.v))

    def check_layers(self, known: Iterable[int]) -> None:
        """Raise `ConfigError` unless all layers that it names are among these."""
        known = set(known)
        if unknown := sorted({*self.layers, *self.queries} - known):
            raise ConfigError(
                f"format {self.name!r} is for layers {unknown[:8]}, which the model has not: its "
                f"layers are {min(known)} to {max(known)}"
            )

    def sealed(self, group: LayerGroup) -> SealedGeometry | None:
        """What full pages of a group are like; `None`: as they were.

        Raises:
            ConfigError: pages of this size or width can't be coded so.
        """
        every = [self.codes(layer) for layer in group.layers]
        if all(codes == (EXACT, EXACT) for codes in every):
            return None
        layouts = tuple(slice_layout(group.geometry, k, v) for k, v in every)
        queries = tuple(self._queries_of(layer, group.geometry) for layer in group.layers)
        return SealedGeometry(
            exact=group.geometry, layouts=layouts, form=self.id,
            queries=queries if any(queries) else (),
        )  # fmt: skip

    def _queries_of(self, layer: int, geometry: PageGeometry) -> bytes:
        """What queries of a layer are like, if its keys are of 4 bits."""
        given = self.queries.get(layer, b"")
        shape = geometry.kv_heads, geometry.k_width
        if given and len(given) != 4 * shape[0] * shape[1]:
            raise ConfigError(
                f"what queries of layer {layer} are like is {len(given) // 2} numbers, two for "
                f"each channel, and its keys have {shape[0]} heads of {shape[1]}"
            )
        return given if is_int4(self.codes(layer)[0]) else b""

    def with_queries(self, given: Mapping[int, Tensor]) -> "KVFormat":
        """This format for a model whose queries are like these.

        Args:
            given: by a model's layer number, `[kv_heads, 2, k_width]`: vectors `u` and `w` for
                which the second moment of the queries of each KV head's query heads is about
                `u u' + diag(w)`, in any unit that fits fp16.

        Raises:
            ConfigError: another shape, numbers that are not finite, `w` below 0.
        """
        packed = {}
        for layer, like in given.items():
            if like.ndim != 3 or like.shape[1] != 2:
                raise ConfigError(
                    f"queries of layer {layer} are [kv_heads, 2, k_width], got {tuple(like.shape)}"
                )
            if not like.isfinite().all() or (like[:, 1] < 0).any():
                raise ConfigError(f"queries of layer {layer} are not finite, or w is below 0")
            most = torch.finfo(torch.float16).max
            half = like.detach().clamp(-most, most).to("cpu", torch.float16)
            packed[layer] = half.contiguous().numpy().tobytes()
        return replace(self, queries=packed)

    @property
    def id(self) -> int:
        """What records of its compressed pages call it."""
        names = {codes: name for name, codes in NAMED.items()}
        name = None if self.layers else names.get((self.k, self.v))
        return BY_LAYER if name is None else IDS[name]

    def to_json(self) -> str:
        """It, as text that `from_json` reads."""
        document = {
            "kvpaged_kv_format": 1, "name": self.name, "k": self.k, "v": self.v,
            "keep": self.keep, "layers": {str(n): list(kv) for n, kv in self.layers.items()},
            "queries": {
                str(n): base64.b64encode(given).decode() for n, given in self.queries.items()
            },
        }  # fmt: skip
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "KVFormat":
        """The format that `to_json` wrote.

        Raises:
            ConfigError: it did not.
        """
        try:
            given: dict[str, Any] = json.loads(text)
            if given.pop("kvpaged_kv_format") != 1:
                raise ConfigError("a KVFormat of another version")
            layers = given.pop("layers")
            queries = {
                int(n): base64.b64decode(text, validate=True)
                for n, text in given.pop("queries", {}).items()
            }
            return cls(layers=layers, queries=queries, **given)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"not a KVFormat in JSON: {error!r}") from None

    def key(self) -> bytes:
        """What makes pages of one format different from another's: part of a namespace."""
        if not self.layers and (self.k, self.v) == (EXACT, EXACT):
            return b""
        parts: tuple[Any, ...] = (self.k, self.v, sorted(self.layers.items()), self.keep)
        used = [n for n in sorted(self.queries) if is_int4(self.codes(n)[0])]
        if used:
            digest = hashlib.blake2b(digest_size=16)
            for layer in used:
                digest.update(f"{layer} {len(self.queries[layer])} ".encode() + self.queries[layer])
            parts = (*parts, digest.hexdigest())
        return repr(parts).encode() + b"\0"


def slice_layout(geometry: PageGeometry, k: str, v: str) -> SliceLayout:
    """The layout of a layer's slice.

    Raises:
        ConfigError: pages of this size or width can't be coded so.
    """
    size, width = geometry.page_size, geometry.v_width
    if not width:
        raise ConfigError("pages without V are not compressed: leave kv_format at 'auto'")
    quarter = max(width // 4, 1)
    v_group = min(width, quarter * -(-GROUPS.get(v, (0, 0))[1] // quarter))
    v_group = width if v_group and width % v_group else v_group
    bits = 8 * geometry.itemsize
    parts = [
        Part("exact", bits) if code == EXACT
        else Part("fp8", 8) if code == "fp8"
        else Part("int", 4 if is_int4(code) else 8, group)
        for code, group in ((k, min(GROUPS.get(k, (0, 0))[0], size)), (v, v_group))
    ]  # fmt: skip
    try:
        return SliceLayout.of(
            parts[0], parts[1], kv_heads=geometry.kv_heads, page_size=size, k_dim=geometry.k_width,
            v_dim=width, dtype=geometry.dtype,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"pages of {size} slots can't be coded as {k} and {v}: {error}") from None
