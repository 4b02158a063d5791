"""PagedKVCache: the KV cache of one model, in pages."""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.config import Backend, Layout
from kvpaged.errors import ConfigError, UsageError
from kvpaged.token_batch import TokenBatch

if TYPE_CHECKING:
    from kvpaged.integrations.transformers import Preparation, SessionCache


class PagedKVCache(CacheBooks):
    """The KV cache of one model: pages of one byte budget, held by sessions and batches.

    With Hugging Face transformers, make it by `for_model` and hand `session(...)` to `generate()`.
    In a loop of your own, make it from a `PageGeometry`, and call `batch` and `attend`.

    Sessions and batches of one cache may live in different threads, one thread each at a time; the
    cache itself may be used from any thread.
    """

    _preparation: "Preparation | None" = None
    _release: Callable[[], object] | None = None

    # -- with transformers -------------------------------------------------------------------------

    @classmethod
    def for_model(
        cls,
        model: Any,
        memory: int | str,
        *,
        page_size: int = 64,
        kv_format: str = "auto",
        layout: Layout | None = None,
        backend: Backend | None = None,
        checksums: bool = True,
    ) -> "PagedKVCache":
        """A cache that serves a transformers causal language model under its unmodified
        `generate()`.

        The model's attention is routed through ours while any such cache of it is open: a forward
        pass with one of our sessions reads and writes pages; any other behaves as before. One token
        is run through the model to see what its layers cache. `close` undoes it all.

        Args:
            model: a `transformers` causal LM (or a PEFT model around one), in eval mode.
            memory: bytes of the page pool, such as "4GiB".
            page_size: token slots a page.
            kv_format: "auto": pages hold K and V in the model's own dtype.
            layout, backend, checksums: see `CacheConfig`.

        Raises:
            UnsupportedModelError: its attention can't be served from pages; the message says which
                layer, and why.
            ConfigError: see the constructor.
        """
        if kv_format != "auto":
            raise ConfigError(
                f"kv_format must be 'auto' (the model's own dtype), got {kv_format!r}"
            )
        from kvpaged.integrations.transformers import prepare

        preparation, groups = prepare(model, page_size)
        try:
            cache = cls(groups, memory, layout=layout, backend=backend, checksums=checksums)
        except BaseException:
            preparation.release()
            raise
        cache._preparation = preparation
        cache._release = weakref.finalize(cache, preparation.release)
        return cache

    def session(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> "SessionCache":
        """A `transformers.Cache` to hand to `generate(past_key_values=...)`, for these prompts.

        Args:
            input_ids: int64 `[rows, columns]`, the prompts.
            attention_mask: `[rows, columns]`, 0 where a row is padded; padding on the left only.

        Returns:
            A context manager; its pages go back on exit, on `close`, and when it is forgotten.

        Raises:
            UsageError: the cache is closed or was not made by `for_model`, or shapes or padding do
                not fit.
        """
        if self._preparation is None:
            raise UsageError(
                "session() serves transformers models: make the cache by PagedKVCache.for_model"
            )
        self.check_open()
        from kvpaged.integrations.transformers import SessionCache

        return SessionCache(self, self._preparation, input_ids, attention_mask)

    # -- in a loop of one's own --------------------------------------------------------------------

    def batch(self, sequences: Sequence[Sequence[int] | Tensor]) -> TokenBatch:
        """Sequences to compute: `batch.tokens`, `.positions` and `.cu_seqlens` say what is to be
        computed next.

        Args:
            sequences: token ids of each row (lists or one-dimensional tensors).

        Raises:
            OutOfPagesError: the pool has no room for them; nothing changed.
            UsageError: closed, or ids that are not ints.
        """
        self.check_open()
        if not len(sequences):
            raise UsageError("a batch has at least one sequence")
        return TokenBatch(self, sequences)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        batch: Batch,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Store a layer's new K and V and attend: causal, ragged, over everything the batch's rows
        hold.

        Args:
            layer: the layer's number.
            q: `[tokens, q_heads, k_width]`, for `batch.tokens`; rotary position embedding already
                applied, as on `k`.
            k: `[tokens, kv_heads, k_width]`; `v`: `[tokens, kv_heads, v_width]`, or `None` for a
                group without V. Of the pages' dtype, last dimension contiguous; copied into pages.
            batch: whose tokens these are.
            scale: factor of `q . k`; `None`: `k_width ** -0.5`.
            softcap: cap of the scaled scores, `softcap * tanh(s / softcap)`.
            sinks: `[q_heads]` logits that join the softmax denominator only.

        Returns:
            `[tokens, q_heads, v_width]` of `q`'s dtype.

        Raises:
            UsageError: no step waits, or a tensor requires gradients.
            ValueError: shapes, strides or dtypes do not fit the pages.
        """
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v)):
            raise UsageError(
                "keys and values that require gradients can't be cached: run under torch.no_grad()"
            )
        batch.write(layer, k, v)
        return batch.attend(
            layer,
            q,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            softcap=softcap,
            sinks=sinks,
        )

    # -- its end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the model back its attention and let go of the memory. Sessions still alive become
        unusable.
        """
        if self._release is not None:
            self._release()
        super().close()

    def __enter__(self) -> "PagedKVCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
