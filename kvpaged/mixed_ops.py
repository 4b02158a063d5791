"""The operations on pages of which full ones are compressed, dispatched as in `ops`."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from kvpaged.config import Backend
from kvpaged.errors import ConfigError
from kvpaged.ops import LayerPages, Options, values_of
from kvpaged_kernels.sealed import SliceLayout


class MixedKernels(NamedTuple):
    """The functions of a backend, of the signatures that `kvpaged_kernels.reference` documents."""

    seal: Callable[..., tuple[Tensor, Tensor]]
    decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]


@lru_cache(maxsize=3)
def _mixed(backend: str) -> MixedKernels:
    """The kernels of a backend; each is imported when it is first asked for."""
    if backend == "cpu":
        from kvpaged_kernels.cpu import mixed

        return MixedKernels(mixed.seal, mixed.mixed_decode, mixed.mixed_prefill)
    if backend == "reference":
        from kvpaged_kernels.reference.mixed import mixed_decode, mixed_prefill
        from kvpaged_kernels.reference.seal import seal

        return MixedKernels(seal, mixed_decode, mixed_prefill)
    if backend == "triton":
        return _triton()
    raise ConfigError(f"no kernels are called {backend!r}")


def _triton() -> MixedKernels:
    """The Triton kernels; Triton itself is imported only when they are first asked for."""
    from kvpaged_kernels.gpu.mixed_decode import mixed_decode
    from kvpaged_kernels.gpu.mixed_prefill import mixed_prefill
    from kvpaged_kernels.gpu.seal import seal

    return MixedKernels(seal, mixed_decode, mixed_prefill)


def seal(
    k_pages: Tensor, v_pages: Tensor, src: Tensor, slices: Tensor, dst: Tensor,
    layout: SliceLayout, queries: Tensor | None, *, backend: Backend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Code layers of full pages as slices of compressed ones; their checksums and errors: see
    `kvpaged_kernels.reference.seal.seal`.
    """
    return _mixed(backend).seal(k_pages, v_pages, src, slices, dst, layout, queries)


def mixed_decode(
    pages: LayerPages, slices: Tensor, layout: SliceLayout, q: Tensor, table: Tensor,
    lengths: Tensor, options: Options, *, keep: int, backend: Backend,
) -> Tensor:  # fmt: skip
    """Attention of one query token a row over exact and compressed pages: see
    `kvpaged_kernels.reference.mixed.mixed_decode`.
    """
    return _mixed(backend).decode(
        q, pages.k_pages, values_of(pages), slices, layout, table, lengths, keep=keep,
        **options._asdict(),
    )  # fmt: skip


def mixed_prefill(
    pages: LayerPages, slices: Tensor, layout: SliceLayout, q: Tensor, own_k: Tensor,
    own_v: Tensor, cu_own: Tensor, table: Tensor, cu_q: Tensor, lengths: Tensor, options: Options,
    *, keep: int, max_q: int, max_len: int, backend: Backend,
) -> Tensor:  # fmt: skip
    """Attention of ragged new tokens over their own pages, exact, and compressed ones before them:
    see `kvpaged_kernels.reference.mixed.mixed_prefill`.
    """
    return _mixed(backend).prefill(
        q, pages.k_pages, values_of(pages), slices, layout, own_k, own_v, cu_own, table, cu_q,
        lengths, keep=keep, max_q=max_q, max_len=max_len, **options._asdict(),
    )  # fmt: skip
