"""One layer of a session, as transformers sees it."""

import weakref
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class Session(Protocol):
    """Whose layer it is."""

    columns: int

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values into pages."""


class SessionLayer(CacheLayerMixin):
    """One layer of a session, as transformers sees it; all state is the session's."""

    is_croppable = True
    is_initialized = True
    supports_early_init = False

    def __init__(self, session: Session, layer: int, window: int | None) -> None:
        super().__init__()
        self._session = weakref.proxy(session)
        self._layer = layer
        self.is_sliding = window is not None
        self.is_compileable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to initialise: pages come with each step."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `SessionCache.update`."""
        updated: tuple[Tensor, Tensor] = self._session.update(key_states, value_states, self._layer)
        return updated

    def get_seq_length(self) -> int:
        """Columns held so far."""
        return int(self._session.columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask would have, and the first."""
        return int(self._session.columns) + query_length, 0

    def get_max_length(self) -> int:
        """No limit but the pool's."""
        return -1
