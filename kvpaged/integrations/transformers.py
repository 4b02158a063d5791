"""Hugging Face transformers: what `PagedKVCache` needs of it, imported when it is first used."""

from collections.abc import Sequence

from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import UsageError
from kvpaged.integrations.attention import Preparation, prepare
from kvpaged.integrations.graphs import CudaCapture, can_capture
from kvpaged.integrations.identity import ModelIdentity
from kvpaged.integrations.packed_model import PackedModel
from kvpaged.integrations.prompts import check_prompts, left_pads, to_host
from kvpaged.integrations.session import SessionCache
from kvpaged.keys import Salt
from kvpaged.loading import Ahead
from kvpaged.pages.trail import Match, Trail
from kvpaged.tokens import Ids

__all__ = [
    "ModelIdentity",
    "PackedModel",
    "Preparation",
    "SessionCache",
    "open_packed",
    "open_session",
    "prepare",
]


def open_session(
    cache: CacheBooks,
    preparation: Preparation,
    input_ids: Tensor,
    mask: Tensor | None,
    *,
    salt: Salt | Sequence[Salt] = None,
    salt_from: int | Sequence[int] = 0,
    private: bool = False,
) -> SessionCache:
    """A session for prompts, with what the cache has of them: see `PagedKVCache.session`."""
    check_prompts(input_ids, mask)
    prompt = to_host(input_ids)
    rows, width = prompt.shape
    pads = left_pads(mask, rows, width)
    regime = preparation.lengths.regime(int(width - pads.min()))
    trails = cache.trails(rows, salt, salt_from, extra=regime or b"")
    batch = Batch(cache, rows, None if regime is None or private else trails)
    if private:
        batch.keep_private("it was opened so")
    elif regime is None:
        batch.keep_private("the rotary embedding's angles at this length are of one pass only")
    ids = [prompt[row, pads[row] :] for row in range(rows)]
    shared: Sequence[Trail | None] = [None] * rows if batch.private else trails
    with Ahead(cache, ids, shared), cache.lock:
        columns = _reuse(batch, ids, pads)
    cache.count_reuse(salt, [len(x) for x in ids], batch.lengths.tolist())
    return SessionCache(
        cache, preparation, batch, prompt=prompt, pads=pads, columns=columns, regime=regime
    )


def open_packed(
    cache: CacheBooks, preparation: Preparation, batch: Batch, *, compiled: bool,
    pack_weights: bool, graphs: bool | None,
) -> PackedModel:  # fmt: skip
    """The model, run over packed tokens of a batch's steps: see `PackedModel`.

    Args:
        cache, preparation, batch, compiled, pack_weights: as there.
        graphs: capture decode steps; `None`: where that is possible.

    Raises:
        UsageError: they are to be captured, and the cache is not on one CUDA device.
    """
    possible = can_capture(cache)
    if graphs and not possible:
        raise UsageError(
            "graphs are captured on one CUDA device served by the Triton kernels; this cache is on "
            + ", ".join(sorted({str(group.device) for group in cache.groups}))
            + f" served by {', '.join(sorted(set(cache.backends)))}"
        )
    capture = CudaCapture() if possible and graphs is not False else None
    return PackedModel(
        cache, preparation, batch, compiled=compiled, pack_weights=pack_weights, capture=capture
    )


def _reuse(batch: Batch, ids: list[Ids], pads: Ids) -> int:
    """Let rows begin with what the cache has of their tokens, all up to the same column; returns
    it.
    """
    found = [batch.find(row, tokens, len(tokens) - 1) for row, tokens in enumerate(ids)]
    columns = int(pads[0] + len(ids[0]))
    if batch.compressed:  # what is beyond a row's last whole page is computed again
        ends = [
            int(pad) + (0 if match is None else match.longest(len(tokens) - 1))
            for match, pad, tokens in zip(found, pads, ids, strict=True)
        ]
        return _attach_some(batch, found, ids, pads, min(ends))
    while True:  # a row may not be able to go on from where another has to
        ends = [
            int(pad) + (0 if match is None else match.longest(max(columns - int(pad), 0)))
            for match, pad in zip(found, pads, strict=True)
        ]
        if min(ends) >= columns or columns == 0:
            break
        columns = min(ends)
    for row, (match, pad) in enumerate(zip(found, pads.tolist(), strict=True)):
        if match is not None and columns > pad:
            batch.attach(row, match, ids[row][: columns - pad])
    return columns


def _attach_some(
    batch: Batch, found: list[Match | None], ids: list[Ids], pads: Ids, columns: int
) -> int:
    """The same up to a column that lies within pages which are shared whole: rows owe what they
    lack.
    """
    for row, (match, pad) in enumerate(zip(found, pads.tolist(), strict=True)):
        length = max(columns - pad, 0)
        held = 0 if match is None else match.longest(length)
        if match is not None and held:
            batch.attach(row, match, ids[row][:held])
        batch.owed[row] = ids[row][held:length]
    return columns
