"""A session: prompts and what is generated after them, as a `transformers.Cache` over pages."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpaged.batch import Batch
from kvpaged.books import CacheBooks
from kvpaged.errors import OutOfPagesError, UnsupportedModelError, UsageError
from kvpaged.integrations.again import Owed
from kvpaged.integrations.attention import TAG, Preparation, ServedCache, Tag
from kvpaged.integrations.layer import SessionLayer
from kvpaged.integrations.passes import is_whole_prompt, what_is_unusual
from kvpaged.integrations.passlog import PassLog
from kvpaged.integrations.prompts import (
    check_mask,
    check_not_again,
    check_prompt,
    own_positions,
)
from kvpaged.integrations.session_rows import SessionRows
from kvpaged.offload.clock import PassClock
from kvpaged.saved import SavedSessions
from kvpaged.sequences import NOTHING
from kvpaged.tokens import Ids
from kvpaged_kernels.cpu.lane import Lane, fits_lane, write_lane


class SessionCache(SessionRows, ServedCache):
    """Some prompts and what is generated after them, as a `transformers.Cache` over pages.

    A context manager; one thread at a time. A session that holds the whole of a prompt must not be
    given to `generate()` with that prompt again: transformers then feeds all of it once more (a
    `UsageError` says so where positions show it); crop its last token first. Rows are padded on the
    left only, and pads take no pages: row `r` holds tokens `columns - pads[r]` once its prompt has
    begun. Beams and several returned sequences multiply its rows by themselves: a step with `n`
    times as many rows shares each row's pages `n` ways.

    Attributes:
        columns: token columns held, pads included: what transformers calls the sequence length.
        reused: columns that were in the cache when the session began. transformers computes the
            same columns for all rows, so it is the least of (pads + tokens found) over the rows,
            and at most the columns of the prompt but one.
        batch: the rows and their pages.
    """

    def __init__(
        self,
        cache: CacheBooks,
        preparation: Preparation,
        batch: Batch,
        *,
        prompt: Ids,
        pads: Ids,
        columns: int,
        regime: bytes | None,
    ) -> None:
        """See `open_session`. `prompt`: ids `[rows, columns]`; `columns`: those the batch holds
        already; `regime`: of its passes (`LengthRule`).
        """
        self._cache = cache
        self._of = preparation
        self._prompt = prompt
        self.pads = pads
        self.columns = self.reused = columns
        self._regime = regime
        self._device_type = cache.groups[0].device.type
        self._begun = False
        self._pads_known = True
        self.batch = batch
        self._width = 0
        self._again: Owed | None = None  # in the pass that computes what rows owe
        self._take: Tensor | None = None
        self._ids: Tensor | None = None
        self._positions: Tensor | None = None
        self._passes = PassLog()
        self._clock = PassClock(cache.groups[0].device, cache.note_pass)
        self._lanes: dict[int, Lane] | None = None
        self._windows = {layer: group.window for group in cache.groups for layer in group.layers}
        layers = [SessionLayer(self, i, self._windows.get(i)) for i in range(max(cache.layers) + 1)]
        super().__init__(layers=layers)

    # -- for its user ------------------------------------------------------------------------------

    def __enter__(self) -> "SessionCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def preparation(self) -> Preparation:
        """Of the model whose passes it takes part in."""
        return self._of

    @property
    def private(self) -> str | None:
        """Why nothing more of it is kept for others, or `None`."""
        return self.batch.private

    def branch(self, n: int) -> "list[SessionCache]":
        """`n` new sessions that go on from where this one is, each by itself, sharing its pages.

        Raises:
            UsageError: `n` is below 1, or a forward pass is running.
        """
        if n < 1:
            raise UsageError(f"a session branches into at least 1 more, got {n}")
        self._write_logs()
        return [self._branched() for _ in range(n)]

    def fork(self) -> "SessionCache":
        """`branch(1)`, the one session."""
        return self.branch(1)[0]

    def _branched(self) -> "SessionCache":
        other = SessionCache(
            self._cache,
            self.preparation,
            self.batch.spawn(range(self.batch.rows)),
            prompt=self._prompt[:, : self.columns],
            pads=self.pads.copy(),
            columns=self.columns,
            regime=self._regime,
        )
        other.reused = self.reused
        other._begun, other._pads_known = self._begun, self._pads_known
        return other

    def rewind(self, to: int) -> None:
        """Forget the columns from `to` on.

        Raises:
            ValueError, UsageError: see `crop`.
        """
        self.crop(to - self.columns)

    def save(self, name: str) -> None:
        """Save it under a name: see `kvpaged.saved.SavedSessions`, which restores it."""
        SavedSessions[SessionCache](self._cache).save(name, self)

    # -- a forward pass ----------------------------------------------------------------------------

    def enter(self, module: torch.nn.Module, given: dict[str, Any]) -> None:
        """Begin a step for a forward pass: check it, multiply rows for beams, find pages.

        Raises:
            UsageError, UnsupportedModelError: this pass can't be served; nothing changed.
            OutOfPagesError: no room; nothing changed.
        """
        self.batch.check_open()
        self._check_model(module)
        ids = given.get("input_ids")
        source = ids if ids is not None else given.get("inputs_embeds")
        if source is None:
            raise UsageError("a forward pass with a session needs input_ids or inputs_embeds")
        if self._again is not None:
            self._enter_again(self._again, source.device)
            return
        rows, width = source.shape[:2]
        if not self._pads_known and rows != self.batch.rows:  # after a reset
            self.batch.close()
            self.batch = Batch(self._cache, rows)
            self._prompt = np.zeros((rows, 0), np.int64)
        if rows % self.batch.rows or rows < self.batch.rows:
            raise UsageError(f"the session has {self.batch.rows} rows, the forward pass {rows}")
        times = rows // self.batch.rows
        mask = given.get("attention_mask")
        if (
            self.reused
            and not self._begun
            and ids is not None
            and is_whole_prompt(ids, given, self._prompt, self.pads)
        ):
            self.rewind(0)
            self.reused = 0
        pads = self.pads if self._pads_known else self._pads_of(mask, width)
        check_mask(mask, np.repeat(pads, times), self.columns, width)
        positions = given.get("position_ids")
        if self.reused and not self._begun:
            self._check_found(given, np.repeat(pads, times), width)
        if ids is not None:
            if self.columns < self._prompt.shape[1]:
                check_prompt(ids, np.repeat(self._prompt, times, axis=0), pads, self.columns)
            check_not_again(positions, self.columns - pads, width)
        if self.batch.owes():
            self._compute_owed(source.device)
        self._begin(pads, times, width, source.device)
        self._clock.begin(rows * width)
        self._begun = True
        self._watch(given)
        self._ids = None if ids is None else ids.detach().clone()
        self._positions = None if positions is None else positions.detach().clone()

    def _compute_owed(self, device: torch.device) -> None:
        """Have the tokens that rows owe computed, before the pass that was asked for."""
        self._write_logs()
        self._again = Owed(self.batch)
        try:
            self._again.compute(self.preparation, self, device)
        finally:
            self._again = None

    def _enter_again(self, owed: Owed, device: torch.device) -> None:
        self.batch.begin(owed.counts)
        self._take, self._lanes, self._width = owed.taken(device), None, owed.width
        if self.batch.private is None and not self.batch.watch():
            self.batch.keep_private("the model has changed since the session began")

    def _check_found(self, given: dict[str, Any], pads: Ids, width: int) -> None:
        """Raise unless the first pass goes on from what was found as a plain pass would: with
        nothing but ids and mask, at the tokens' own positions, in the same regime.
        """
        starts = np.maximum(self.columns - pads, 0)
        counts = np.clip(self.columns + width - pads, 0, width)
        padded = bool(self.pads.any())
        what = self._unusual(given, int((starts + counts).max()))
        if given.get("input_ids") is None:
            what = "comes without token ids"
        elif not all(own_positions(given.get("position_ids"), starts, counts, padded=padded)):
            what = "has other positions than the tokens' own"
        if what is not None:
            raise UsageError(
                f"the session found {self.reused} columns of its prompts in the cache, and the "
                f"forward pass {what}: what was found is not valid for it; open the session with "
                "private=True"
            )

    def _begin(self, pads: Ids, times: int, width: int, device: torch.device) -> None:
        """Take a step's pages, `times` rows for each row; as before if there is no room."""
        before = self.batch.rows
        if times > 1:
            self.batch_repeat_interleave(times)
        many = np.repeat(pads, times)
        counts = np.clip(self.columns + width - many, 0, width).astype(np.int64)
        try:
            self.batch.begin(counts)
        except OutOfPagesError:
            if times > 1:
                self._select([row * times for row in range(before)])
            raise
        self.pads, self._pads_known = many, True
        self._take = None
        if (counts < width).any():
            seen = np.arange(width) >= (width - counts)[:, None]
            self._take = torch.from_numpy(np.flatnonzero(seen)).to(device)
        self._lanes = self.batch.lanes() if self._take is None else None
        self._width = width

    def _watch(self, given: dict[str, Any]) -> None:
        """Keep to itself what a pass computes that others could not reproduce."""
        if self.batch.private is not None or self.batch.step is None:
            return
        length = int((self.batch.step.starts + self.batch.step.counts).max())
        what = self._unusual(given, length)
        if what is not None:
            self.batch.keep_private(f"a forward pass {what}")
        elif not self.batch.watch():
            self.batch.keep_private("the model has changed since the session began")

    def _unusual(self, given: dict[str, Any], length: int) -> str | None:
        rule = self.preparation.lengths
        return what_is_unusual(given, length, rule, self._regime, self._device_type)

    def _check_model(self, module: torch.nn.Module) -> None:
        self.preparation.check_ready(module)
        if self.reused and not self._begun and not self.batch.is_current():
            raise UsageError(
                f"the model has changed since the session found {self.reused} columns of its "
                "prompts in the cache: begin another session"
            )

    def leave(self) -> None:
        """Count the step's tokens, if every layer attended over its pages.

        Raises:
            UnsupportedModelError: a layer's keys went to another attention than ours; the step does
                not count.
        """
        step = self.batch.step
        if step is None:
            return
        if len(step.attended) < len(self._cache.layers):
            missing = set(self._cache.layers) - step.attended
            self.batch.drop_step()
            raise UnsupportedModelError(
                f"layers {sorted(missing)[:8]} did not attend over their pages in this forward pass"
            )
        if self._again is not None:
            self.batch.commit(self._again.ids)
            self.batch.owed = [NOTHING] * self.batch.rows
            self.batch.publish()
            return
        self._clock.end()
        self.batch.commit()
        self._passes.add(self._ids, self._positions, step.starts, step.counts)
        self.columns += self._width
        # On a GPU the ids of this step may still be on their way; those of the step before are not.
        self._write_logs(but=0 if self._ids is None or self._ids.device.type == "cpu" else 1)
        self.batch.publish()

    def note_attended(self, layer: int) -> None:
        """See `ServedCache`."""
        if self.batch.step is not None:
            self.batch.step.attended.add(layer)

    def has_written(self, layer: int) -> bool:
        """Whether the running step put this layer's keys into pages."""
        return self.batch.step is not None and layer in self.batch.step.written

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values (`[rows, kv_heads, columns, width]`) into pages.

        Returns them as they came, the keys tagged: attention over them is attention over the pages.
        """
        step = self.batch.step
        if self._lanes is not None and step is not None and layer_idx in self._lanes:
            lane = self._lanes[layer_idx]
            graded = key_states.requires_grad or value_states.requires_grad
            if fits_lane(lane, key_states, value_states) and not graded:
                write_lane(lane, key_states, value_states)
                step.written.add(layer_idx)
                setattr(key_states, TAG, Tag(self, layer_idx, lane, self._windows[layer_idx]))
                return key_states, value_states
        if step is None:
            self.batch.check_open()
            raise UsageError("keys came outside a forward pass of the model given to for_model")
        if key_states.shape[0] != self.batch.rows or key_states.shape[2] != self._width:
            raise UsageError(
                f"layer {layer_idx}: keys of {key_states.shape[0]} rows and {key_states.shape[2]} "
                f"columns in a pass of {self.batch.rows} and {self._width}"
            )
        graded = key_states.requires_grad or value_states.requires_grad
        if graded and torch.is_grad_enabled():
            raise UsageError("keys that require gradients can't be cached: use torch.no_grad()")
        self.batch.write(layer_idx, self._flat(key_states), self._flat(value_states))
        setattr(key_states, TAG, Tag(self, layer_idx))
        return key_states, value_states

    def attend(
        self,
        layer: int,
        query: Tensor,
        scale: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of `query` (`[rows, q_heads, columns, width]`) over the pages.

        Returns `[rows, columns, q_heads, width]`, zeros where a row is padded.
        """
        expected = self._cache.groups[self._cache.place_of(layer)[0]].window
        if window != expected:
            raise UnsupportedModelError(
                f"layer {layer} attends with a window of {window}; its pages were made for "
                f"{expected}"
            )
        rows, heads, columns, width = query.shape
        scale = width**-0.5 if scale is None else scale
        out = self.batch.attend(layer, self._flat(query), scale=scale, softcap=softcap, sinks=sinks)
        if self._take is not None:
            padded = out.new_zeros(rows * columns, heads, out.shape[-1])
            padded[self._take] = out
            out = padded
        return out.view(rows, columns, heads, -1)

    def _flat(self, states: Tensor) -> Tensor:
        """`[rows, heads, columns, width]` as the step's tokens, `[tokens, heads, width]`, without
        pads.
        """
        single = states.shape[2] == 1
        flat = states.squeeze(2) if single else states.transpose(1, 2).flatten(0, 1)
        return flat if self._take is None else flat[self._take]
