"""Sessions saved under a name, to be gone on with by another process."""

import os
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import IntegrityError, StorageError, UsageError
from kvpaged.given import one_each
from kvpaged.keys import KEY_BYTES, Salt, encode_salt, encode_tokens, namespace_digest
from kvpaged.offload.gather import Gathering, Piece, ask, locate, put
from kvpaged.offload.mover import Mover
from kvpaged.pages.trail import Trail
from kvpaged.tiers.base import KEPT, MOST_KEY, Record, Tier
from kvpaged.tiers.record import record_key
from kvpaged.tiers.rows import SavedRow, SavedRows, salt_digest
from kvpaged.tokens import Ids

S = TypeVar("S")

MOST_NAME = MOST_KEY - len(KEPT) - KEY_BYTES - 1
"""Bytes of a name, in UTF-8."""
MOST_BYTES = 64 << 20
"""Of the record of a saved session: 16 million tokens."""


class Restored(NamedTuple, Generic[S]):
    """A session to go on with.

    Attributes:
        session: to be given to `generate()` with the ids below and those that follow.
        input_ids: int64 `[rows, columns]`, what had been computed, 0 where a row is padded.
        attention_mask: int64 `[rows, columns]`, 0 there, else 1.
    """

    session: S
    input_ids: Tensor
    attention_mask: Tensor


class RestoredRows(NamedTuple):
    """Sequences to go on with.

    Attributes:
        sequences: token ids of each row, to be given to `cache.batch` with those that follow.
        salt_from: of each row, see `cache.batch`.
    """

    sequences: list[list[int]]
    salt_from: list[int]


class Source(Protocol):
    """A session: a batch whose rows stand behind pads."""

    batch: Batch
    pads: Ids

    def tokens(self, row: int) -> Ids | None:
        """Token ids a row holds."""


class SavedSessions(Generic[S]):
    """Sessions of a cache's model under names, in the lowest of its tiers that is persistent.

    What is saved: the token ids that were computed, pads, where salts begin; the full pages are
    brought to that tier, where they may be given up later, as any: what is not found any more is
    computed again. A salt is never saved. Names of other models (and adapters, and namespaces) are
    not seen. Callable from any thread; a session is saved by the thread that uses it.
    """

    def __init__(self, cache: CacheBooks, open_session: Callable[..., S] | None = None) -> None:
        """`open_session`: as `PagedKVCache.session`, of a cache that serves a model."""
        self._cache, self._open = cache, open_session

    # -- for its user ------------------------------------------------------------------------------

    def save(self, name: str, of: Batch | Source) -> None:
        """Save a session or a batch, in place of what was saved under the name.

        When this returns, all of it is in the tier: a `DiskTier` as it is by default loses nothing
        of it to kill -9. The session goes on as before. Of a reply of `generate()` the last token
        was not computed, and is not saved.

        Raises:
            UsageError: the name is none, the cache has no persistent tier, or the session is
                private, closed, empty, in a forward pass, or holds tokens whose ids are not known.
            StorageError: the tier does not take it; what was saved before is there still.
        """
        key = self._key(name)
        mover, number = self._tier()
        batch = of if isinstance(of, Batch) else of.batch
        if not batch.is_of(self._cache):
            raise UsageError("the session is of another cache")
        batch.check_open()
        _check_public(batch)
        batch.settle_computed()
        ids = [batch.logs[n].ids if of is batch else of.tokens(n) for n in range(batch.rows)]  # type: ignore[union-attr]
        known = _check_known(ids, batch)
        batch.publish()
        _check_public(batch)
        trails = [batch.trail_of(row) for row in range(batch.rows)]
        self._bring_down(mover, number, trails, known)
        pads = np.zeros(batch.rows, np.int64) if isinstance(of, Batch) else of.pads
        if isinstance(of, Batch):
            columns = max(len(tokens) for tokens in known)
            pads = np.array([columns - len(tokens) for tokens in known])
        columns = max(int(pad) + len(row) for pad, row in zip(pads, known, strict=True) if len(row))
        rows = self._rows(trails, known, np.minimum(pads, columns))
        with self._cache.saving:
            self._write(mover, number, key, rows)

    def restore(self, name: str, salt: Salt | Sequence[Salt] = None) -> Restored[S]:
        """A session that holds what is found of the saved one, with the ids to give to `generate()`
        (more may follow them):

            session, input_ids, mask = cache.sessions.restore("chat")
            prompt = torch.cat([input_ids, new], dim=1)
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)
            out = model.generate(prompt, attention_mask=mask, past_key_values=session)

        Args:
            name: as it was saved.
            salt: the salt of all rows, or of each, as they were saved.

        Raises:
            UsageError: nothing is saved under the name for this model, or under another salt; the
                cache serves no model (`restore_rows`).
            IntegrityError: what is saved is damaged. StorageError: the tier does not answer.
        """
        if self._open is None:
            raise UsageError("this cache serves no model: restore_rows gives the token ids")
        saved, salts = self._find(name, salt)
        columns = max(row.pads + len(row.tokens) for row in saved.rows)
        input_ids = torch.zeros(len(saved.rows), columns, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for number, row in enumerate(saved.rows):
            if len(row.tokens):
                input_ids[number, row.pads :] = torch.from_numpy(row.tokens)
                mask[number, row.pads :] = 1
        device = self._cache.groups[0].device
        input_ids, mask = input_ids.to(device), mask.to(device)
        starts = [row.salt_from for row in saved.rows]
        return Restored(self._open(input_ids, mask, salts, salt_from=starts), input_ids, mask)

    def restore_rows(self, name: str, salt: Salt | Sequence[Salt] = None) -> RestoredRows:
        """The token ids of what is saved, for loops of one's own:

            rows, salt_from = cache.sessions.restore_rows("chat")
            batch = cache.batch([rows[0] + new], salt_from=salt_from)

        Args, Raises: see `restore`.
        """
        saved, _ = self._find(name, salt)
        rows = saved.rows
        return RestoredRows([row.tokens.tolist() for row in rows], [row.salt_from for row in rows])

    def list(self) -> tuple[str, ...]:
        """The names that something is saved under for this model, sorted.

        Raises:
            UsageError: the cache has no persistent tier. StorageError: it does not answer.
        """
        prefix = self._prefix()
        mover, number = self._tier()

        def scan(tier: Tier) -> set[bytes]:
            return {one.key for one in tier.scan() if one.key.startswith(prefix)}

        found = ask(mover.stack, number, scan, mover.options.open_deadline_s)
        return tuple(sorted({key[len(prefix) : -1].decode() for key in found}))

    def delete(self, name: str) -> None:
        """Forget what is saved under a name; its pages stay as long as others of their age.

        Raises:
            UsageError: nothing is saved under it. StorageError: the tier does not delete it.
        """
        key = self._key(name)
        mover, number = self._tier()
        with self._cache.saving:
            there = self._read(mover, number, key)
            if not there:
                raise UsageError(f"no session {name!r} is saved for this model")
            self._delete(mover, number, [key + slot for slot in there])
            if self._read(mover, number, key):
                raise StorageError(f"tier {mover.stack.tiers[number].name} deletes nothing")

    # -- names and the tier ------------------------------------------------------------------------

    def _prefix(self) -> bytes:
        self._cache.check_open()
        _, namespace, private = self._cache.current()
        if private is not None:
            raise UsageError(f"sessions are saved for a model as it is, but {private}")
        return KEPT + namespace_digest(namespace)

    def _key(self, name: str) -> bytes:
        """What the keys of a name begin with: one byte follows, so that a name can be saved anew
        before what it stood for is forgotten.
        """
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UsageError(f"a session's name is text of printable characters, not {name!r}")
        try:
            text = name.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the name {name!r} is no text: {error}") from None
        if len(text) > MOST_NAME:
            raise UsageError(
                f"a session's name has up to {MOST_NAME} bytes in UTF-8, not {len(text)}"
            )
        return self._prefix() + text

    def _tier(self) -> tuple[Mover, int]:
        mover = self._cache.mover
        found = [n for n, t in enumerate(mover.stack.tiers) if t.persistent] if mover else []
        if mover is None or not found:
            raise UsageError(
                "sessions are saved in a persistent tier, and this cache has none: make it with "
                "tiers=[..., DiskTier(path, bytes)]"
            )
        return mover, found[-1]

    # -- records -----------------------------------------------------------------------------------

    def _find(
        self, name: str, salt: Salt | Sequence[Salt]
    ) -> tuple[SavedRows, Sequence[Salt] | None]:
        """What is saved under a name, and the salt of each row, which is the one it had."""
        key = self._key(name)
        found = self._read(*self._tier(), key)
        if not found:
            raise UsageError(f"no session {name!r} is saved for this model")
        for saved in found.values():
            if isinstance(saved, IntegrityError):
                raise IntegrityError(f"session {name!r}: {saved}") from saved
        saved = max((s for s in found.values() if isinstance(s, SavedRows)), key=lambda s: s.times)
        if KEPT + saved.namespace != self._prefix():
            raise IntegrityError(f"session {name!r} is of another model than its key says")
        salts = one_each("salt", salt, len(saved.rows), (bytes, str, type(None)))
        for number, (row, given) in enumerate(zip(saved.rows, salts, strict=True)):
            _check_salt(name, number, row.salt, encode_salt(given), saved.random)
        return saved, salts if any(row.salt for row in saved.rows) else None

    def _read(
        self, mover: Mover, number: int, key: bytes
    ) -> "dict[bytes, SavedRows | IntegrityError]":
        """What is under a name, by the last byte of the keys; or why it can't be read."""
        keys = [key + slot for slot in _SLOTS]

        def read(tier: Tier) -> dict[bytes, SavedRows | IntegrityError]:
            room = [torch.empty(MOST_BYTES, dtype=torch.uint8) for _ in keys]  # touched as needed
            found: dict[bytes, SavedRows | IntegrityError] = {}
            with tier.read(keys, room) as records:
                for slot, record in zip(_SLOTS, records, strict=True):
                    if record is not None:
                        try:
                            found[slot] = SavedRows.decode(record.head, record.body)
                        except IntegrityError as error:
                            found[slot] = error
            return found

        return ask(mover.stack, number, read)

    def _delete(self, mover: Mover, number: int, keys: Sequence[bytes]) -> None:
        ask(mover.stack, number, lambda tier: tier.delete(keys), kind="delete")
        with mover.stack.lock:
            mover.stack.directory.remove(number, keys)

    def _rows(
        self, trails: Sequence[Trail | None], ids: Sequence[Ids], pads: Ids
    ) -> tuple[bytes, tuple[SavedRow, ...]]:
        """Random bytes, and the rows to save, with digests by them."""
        random, size = os.urandom(16), self._cache.config.page_size
        rows = []
        for trail, tokens, pad in zip(trails, ids, pads.tolist(), strict=True):
            assert trail is not None
            salt = None if trail.salt is None else salt_digest(trail.salt, random)
            rows.append(SavedRow(tokens, pad, trail.salt_page * size, salt))
        return random, tuple(rows)

    def _write(
        self, mover: Mover, number: int, key: bytes, what: tuple[bytes, tuple[SavedRow, ...]]
    ) -> None:
        """Put the record under the key of the name that is free, then forget the other."""
        found = self._read(mover, number, key)
        times = {
            slot: saved.times if isinstance(saved, SavedRows) else 0
            for slot, saved in found.items()
        }
        old = max(times, key=lambda slot: times[slot], default=_SLOTS[1])
        new = _SLOTS[old == _SLOTS[0]]
        random, rows = what
        saved = SavedRows(
            namespace=key[len(KEPT) : len(KEPT) + KEY_BYTES], random=random, rows=rows,
            times=max(times.values(), default=0) + 1,
        )  # fmt: skip
        record = Record(key + new, *saved.encode())
        if record.body.numel() > MOST_BYTES:
            raise UsageError(f"a session of {record.body.numel():,} bytes of token ids is too long")
        if new in found:
            self._delete(mover, number, [key + new])
        kept = ask(mover.stack, number, lambda tier: tier.put([record]), kind="put")
        if not kept[0]:
            raise StorageError(f"tier {mover.stack.tiers[number].name} does not take the session")
        with mover.stack.lock:
            size = len(record.head) + record.body.numel()
            mover.stack.directory.add(number, record.key, size)
        if old in found:
            self._delete(mover, number, [key + old])

    # -- pages -------------------------------------------------------------------------------------

    def _bring_down(
        self, mover: Mover, number: int, trails: Sequence[Trail | None], ids: Sequence[Ids]
    ) -> None:
        """Have the tier hold the full pages of rows, as far as a sequence that goes on needs them;
        `StorageError` if it does not afterwards.
        """
        view, stack = mover.pool, mover.stack
        held = stack.directory.held[number]
        needed: list[bytes] = []
        lacking: dict[bytes, Piece] = {}
        with self._cache.lock:
            for trail, tokens in zip(trails, ids, strict=True):
                assert trail is not None
                for piece, strict in self._needed(mover, trail, tokens):
                    key = record_key(piece.key, piece.group)
                    if strict:
                        needed.append(key)
                    if key not in held and (piece.page is not None or piece.tier is not None):
                        lacking[key] = piece
            gathering = Gathering(view, stack, list(lacking.values()))
        with gathering:
            for pages in gathering:
                if not put(view, stack, number, pages):
                    break
        stack.settle()
        with stack.lock:
            missing = sum(key not in held for key in needed)
        if missing:
            raise StorageError(
                f"{missing} of the session's {len(needed)} pages are not in tier "
                f"{stack.tiers[number].name}: it failed, was too slow, or has no room for them all"
            )

    def _needed(self, mover: Mover, trail: Trail, ids: Ids) -> Sequence[tuple[Piece, bool]]:
        """The full pages of a row that whoever goes on with it reads, and whether it must: of a
        group with a window some more are of use, to rows that begin at another's column.
        """
        size = self._cache.config.page_size
        tokens = len(ids) // size * size
        windows = [group.window for group in self._cache.groups]
        firsts = [0 if w is None else max(tokens - w + 1, 0) // size for w in windows]
        loose = [max(first - self._cache.spare, 0) for first in firsts]
        found = locate(mover.pool, mover.stack, trail, encode_tokens(ids[:tokens]), loose)
        return [(p, p.place >= firsts[p.group]) for p in (*found.here, *found.missing)]


_SLOTS = (b"\0", b"\1")


def _check_public(batch: Batch) -> None:
    if batch.private is None and not batch.is_current():
        raise UsageError("the model has changed since the session began: it can't be saved")
    if batch.private is not None:
        raise UsageError(f"the session is private, and can't be saved: {batch.private}")
    for row in range(batch.rows):
        if batch.trail_of(row) is None:
            raise UsageError(f"row {row} can't be saved: a page it follows is in no index any more")


def _check_known(ids: list[Ids | None], batch: Batch) -> list[Ids]:
    """The ids of rows, whose length they must have."""
    known = []
    for row, (tokens, length) in enumerate(zip(ids, batch.lengths.tolist(), strict=True)):
        if tokens is None or len(tokens) != length:
            raise UsageError(f"row {row} can't be saved: not all ids of its tokens are known")
        known.append(tokens.copy())
    if not any(len(tokens) for tokens in known):
        raise UsageError("nothing is computed yet: there is nothing to save")
    return known


def _check_salt(
    name: str, row: int, digest: bytes | None, salt: bytes | None, random: bytes
) -> None:
    if (digest is None) == (salt is None):
        if salt is None or salt_digest(salt, random) == digest:
            return
        raise UsageError(f"session {name!r}: row {row} was saved under another salt")
    raise UsageError(
        f"session {name!r}: row {row} was saved {'without a' if digest is None else 'under a'} "
        f"salt, which restoring it needs to be told"
    )
