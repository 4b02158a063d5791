"""PagedKVCache: the KV cache of one model, in pages."""

import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.config import Backend, Layout
from kvpaged.documents import export_document, import_document
from kvpaged.errors import UsageError
from kvpaged.formats.kv import KVFormat
from kvpaged.keys import Salt
from kvpaged.offload.options import OffloadOptions
from kvpaged.saved import SavedSessions
from kvpaged.tiers.base import Tier
from kvpaged.token_batch import TokenBatch, as_ids

if TYPE_CHECKING:
    from kvpaged.integrations.transformers import ModelIdentity, Preparation, SessionCache


class PagedKVCache(CacheBooks):
    """The KV cache of one model: pages of one byte budget, held by sessions and batches.

    With Hugging Face transformers, make it by `for_model` and hand `session(...)` to `generate()`.
    In a loop of your own, make it from a `PageGeometry`, and call `batch` and `attend`.

    Sessions and batches of one cache may live in different threads, one thread each at a time; the
    cache itself may be used from any thread.
    """

    _preparation: "Preparation | None" = None
    _release: Callable[[], object] | None = None
    _model: "ModelIdentity | None" = None

    # -- with transformers -------------------------------------------------------------------------

    @classmethod
    def for_model(
        cls,
        model: Any,
        memory: int | str,
        *,
        page_size: int = 64,
        kv_format: str | KVFormat = "auto",
        layout: Layout | None = None,
        backend: Backend | None = None,
        checksums: bool = True,
        prefix_sharing: bool = True,
        namespace: bytes = b"",
        tiers: Sequence[Tier] = (),
        offload: OffloadOptions | None = None,
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
            kv_format: how full pages hold K and V: see the constructor.
            layout, backend, checksums: see `CacheConfig`.
            prefix_sharing: keep full pages for every later session whose prompt begins with the
                same tokens. The model's weights are digested for it, now and when they change, at
                about a second a gigabyte and core.
            namespace: what else the bytes depend on that neither weights nor config show (a
                patched `forward`, say).
            tiers: where pages go from the pool, such as `[HostTier("16GiB"), DiskTier(path,
                "200GiB")]`, and are found again, by other processes with the same model too. The
                cache closes them.
            offload: dials of that.

        Raises:
            UnsupportedModelError: its attention can't be served from pages; the message says which
                layer, and why. Or a weight's bytes can't be digested.
            ConfigError: see the constructor.
        """
        from kvpaged.integrations.transformers import ModelIdentity, prepare

        preparation, groups = prepare(model, page_size)
        try:
            cache = cls(
                groups, memory, kv_format=kv_format, layout=layout, backend=backend,
                checksums=checksums, tiers=tiers, offload=offload,
            )  # fmt: skip
            if prefix_sharing:
                cache._model = ModelIdentity(preparation.model, cache.groups, namespace)
        except BaseException:
            preparation.release()
            raise
        cache._preparation = preparation
        cache._release = weakref.finalize(cache, preparation.release)
        return cache

    def session(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        salt: Salt | Sequence[Salt] = None,
        *,
        salt_from: int | Sequence[int] = 0,
        private: bool = False,
    ) -> "SessionCache":
        """A `transformers.Cache` to hand to `generate(past_key_values=...)`, for these prompts.

        It begins with what the cache has of them: `session.reused` columns, so that `generate()`
        computes only the rest; the full pages it computes, replies too, are there for later
        sessions. `generate()` has to be given the same `input_ids`.

        Args:
            input_ids: int64 `[rows, columns]`, the prompts.
            attention_mask: `[rows, columns]`, 0 where a row is padded; padding on the left only.
            salt: a tenant's secret, for all rows or one for each: pages under a salt are found
                under the same salt only.
            salt_from: the token (pads not counted) from whose page on the salt counts, for all rows
                or for each; the pages before it are everybody's.
            private: search for nothing and keep nothing for others: for forward passes that are
                given more than ids, mask and the tokens' own positions, which nothing found is
                valid for.

        Returns:
            A context manager; its pages go back on exit, on `close`, and when it is forgotten.

        Raises:
            UsageError: the cache is closed or was not made by `for_model`, or shapes, padding or
                salts do not fit.
        """
        if self._preparation is None:
            raise UsageError(
                "session() serves transformers models: make the cache by PagedKVCache.for_model"
            )
        self.check_open()
        from kvpaged.integrations.transformers import open_session

        return open_session(
            self, self._preparation, input_ids, attention_mask,
            salt=salt, salt_from=salt_from, private=private,
        )  # fmt: skip

    def sequence_bytes(self, tokens: int) -> int:
        """Bytes of the pool that a sequence of so many tokens takes, if it shares nothing: in its
        format, the open page and what stays exact included, and what a window leaves behind not.
        """
        self.check_open()
        size, total = self.config.page_size, 0
        for group, pages in zip(self.groups, self.classes, strict=True):
            first = 0
            if group.window is not None:  # a page's worth of rewinding is kept
                first = max(tokens - group.window + 1 - size, 0) // size
            total += pages.sequence_bytes(tokens, first)
        return total

    # -- what its pages are valid for --------------------------------------------------------------

    @property
    def namespace(self) -> bytes:
        """What makes the bytes of its pages valid: given, or the digest of a model as it was when
        last looked at. Empty: nothing is kept for others.
        """
        return self._namespace if self._model is None else self._model.standing.namespace

    @property
    def private(self) -> str | None:
        """Why nothing new is kept for others now, or `None`."""
        if self._model is not None:
            return self._model.standing.private
        return None if self._namespace else "the cache has no namespace"

    def current(self) -> tuple[object, bytes, str | None]:
        """See `CacheBooks`: of a model that is looked at now."""
        if self._model is None:
            return super().current()
        standing = self._model.check()
        return standing.epoch, standing.namespace, standing.private

    def watch(self, identity: object) -> bool:
        """See `CacheBooks`."""
        return self._model is None or self._model.is_epoch(identity)

    def refresh(self, namespace: bytes | None = None) -> None:
        """Look anew at what makes the bytes of pages valid. Sessions that are open stay as they
        are and keep what they compute from now on to themselves, if anything has changed.

        Args:
            namespace: the new one, of a cache that was made with one; not for `for_model`, whose
                weights are digested again.

        Raises:
            UsageError: the argument does not fit the cache.
        """
        self.check_open()
        if self._model is not None:
            if namespace is not None:
                raise UsageError("the namespace of a cache made by for_model is its model's digest")
            self._model.refresh()
        elif namespace is None:
            raise UsageError("a cache of your own geometry is refreshed with a new namespace")
        else:
            with self.lock:
                self._epoch += namespace != self._namespace
                self._namespace = bytes(namespace)

    # -- kept beyond the process -------------------------------------------------------------------

    @property
    def sessions(self) -> "SavedSessions[SessionCache]":
        """Sessions saved under names, which outlive the process: `save`, `restore`, `list`,
        `delete`.
        """
        return SavedSessions(self, None if self._preparation is None else self.session)

    def export_document(
        self, path: str | os.PathLike[str], input_ids: Tensor | Sequence[int],
        salt: Salt = None, *, salt_from: int = 0,
    ) -> int:  # fmt: skip
        """Write the computed pages of a document to one file, which a cache of the same model can
        import, on another machine and in another layout too. It contains the tokens and what was
        computed of them, not the salt.

        Args:
            path: the file; it comes into being at the end, whole.
            input_ids: ints `[tokens]` or `[1, tokens]`: the document. Its full pages are exported.
            salt, salt_from: what it was computed under, see `session`.

        Returns:
            How many tokens the file has: those of full pages.

        Raises:
            UsageError: not all of it is computed, or there no longer (the message says how many
                tokens are), or it is less than a page, or nothing is kept for others now.
            StorageError: the file can't be written, or a tier does not answer.
            IntegrityError: bytes are not what was sealed.
        """
        self._check_documents()
        ids = as_ids(_flat(input_ids), 0)
        extra: bytes | None = b""
        if self._preparation is not None:
            extra = self._preparation.lengths.regime(len(ids))
        if extra is None:
            raise UsageError(
                "the rotary embedding's angles at this length are of one pass only: nothing of it "
                "is kept"
            )
        trail = self.trails(1, salt, salt_from, extra=extra)[0]
        return export_document(self, path, ids, trail, extra)

    def import_document(
        self, path: str | os.PathLike[str], salt: Salt = None, *, salt_from: int = 0
    ) -> int:
        """Take in a document that `export_document` wrote: sessions and batches that begin with its
        tokens begin with its pages. They go into the pool as far as there is room, and into the
        tiers, if there are some: all into the lowest persistent one.

        The whole file is checked before anything is taken from it.

        Args:
            path: the file.
            salt, salt_from: under which it is to be found, see `session`; whoever exported it may
                have used another.

        Returns:
            How many of its tokens are there now.

        Raises:
            UsageError: it is of another model, or of other pages, or nothing is kept for others.
            IntegrityError: it is damaged; the message says where. StorageError: it can't be read.
        """
        self._check_documents()
        return import_document(
            self, path, lambda extra: self.trails(1, salt, salt_from, extra=extra)[0]
        )

    def _check_documents(self) -> None:
        self.check_open()
        if self.compressed:
            raise UsageError(
                f"a document holds exact pages, and this cache's are compressed "
                f"({self.kv_format.name})"
            )

    # -- in a loop of one's own --------------------------------------------------------------------

    def batch(
        self,
        sequences: Sequence[Sequence[int] | Tensor],
        *,
        salt: Salt | Sequence[Salt] = None,
        salt_from: int | Sequence[int] = 0,
    ) -> TokenBatch:
        """Sequences to compute: `batch.tokens`, `.positions` and `.cu_seqlens` say what is to be
        computed next.

        With a namespace, each row begins with the longest prefix that is in the cache
        (`batch.reused`), to the token; its full pages are there for others once they are computed.

        Args:
            sequences: token ids of each row (lists or one-dimensional tensors).
            salt: a tenant's secret, for all rows or one for each: pages under a salt are found
                under the same salt only.
            salt_from: the token from whose page on the salt counts, for all rows or for each; the
                pages before it are everybody's.

        Raises:
            OutOfPagesError: the pool has no room for them; nothing changed.
            UsageError: closed, or ids that are not ints, or salts that do not fit the rows.
        """
        self.check_open()
        if not len(sequences):
            raise UsageError("a batch has at least one sequence")
        return TokenBatch(self, sequences, salt=salt, salt_from=salt_from)

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
        alibi_slopes: Tensor | None = None,
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
            alibi_slopes: `[q_heads]`; a token's score gets `slope * (its position - the query's)`
                after the cap (Press, Smith and Lewis, arXiv:2108.12409).

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
            alibi_slopes=alibi_slopes,
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


def _flat(input_ids: Tensor | Sequence[int]) -> Tensor | Sequence[int]:
    """The tokens of one sequence, given as one row or as a vector."""
    if isinstance(input_ids, Tensor) and input_ids.ndim == 2 and len(input_ids) == 1:
        return input_ids[0]
    return input_ids
