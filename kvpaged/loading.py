"""Pages of tiers for sequences that are about to begin: loaded before anything is computed."""

from collections.abc import Sequence
from types import TracebackType

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.pages.trail import Trail
from kvpaged.tokens import Ids


class Ahead:
    """Loads what tiers have of some sequences into the pool and the prefix index, one after
    another, and holds it until the context is left: whoever searches meanwhile finds it.

    Whatever a tier does, nothing is raised, and it is over in time (`OffloadOptions.deadline_s`).
    """

    def __init__(
        self, cache: CacheBooks, sequences: Sequence[Ids], trails: Sequence[Trail | None]
    ) -> None:
        self._cache = cache
        self._sequences, self._trails = sequences, trails
        self._held: list[Batch] = []

    def __enter__(self) -> "Ahead":
        if self._cache.mover is not None:
            try:
                for ids, trail in zip(self._sequences, self._trails, strict=True):
                    if trail is not None and len(ids) >= self._cache.config.page_size:
                        self._load(ids, trail)
            except BaseException:
                self._close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._close()

    def _close(self) -> None:
        held, self._held = self._held, []
        for batch in held:
            batch.close()

    def _load(self, ids: Ids, trail: Trail) -> None:
        batch = Batch(self._cache, 1, [trail.copy()])
        self._held.append(batch)
        with self._cache.lock:
            match = batch.find(0, ids, len(ids))
            promotion = None
            if match is not None:
                promotion = batch.begin_loading(0, match, ids, len(ids))
        if promotion is None:
            return
        try:
            promotion.start()
            outcome = promotion.wait()
        except BaseException:
            promotion.cancel("")
            raise
        if outcome.pages:
            batch.enter_pages([(0, promotion.first + outcome.pages)])
