"""Any history of a cache whose prefixes are shared, beside plain dense arrays.

`Histories` has a method for each thing that may happen (`RULES` names their int arguments); `run`
does one of them and then compares everything (`witness`). `drive` runs seeded random ones; a state
machine of hypothesis does the same from `RULES`.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random

import numpy as np
import torch

from kvpaged.errors import OutOfPagesError, UsageError
from kvpaged.keys import encode_salt
from kvpaged.testing.dense import DIM, LAYERS, NAMESPACES, PAGE, Origin, Row, token
from kvpaged.testing.shapes import Shape
from kvpaged.testing.witness import Held, Witness
from kvpaged.token_batch import TokenBatch

BATCHES, ROWS, TOKENS = 5, 4, 120
"""What a history has at most: batches, rows of one, tokens of a row."""
LENGTHS = (1, 5, 15, 16, 17, 24, 30, 31, 32, 33, 40, 47, 48, 49, 55, 64, 65, 72, 81, 97)
PATHS = (0, 1, 2, 4, 8, 16, 32, 64, 6, 40)
SALTS = (None, None, None, b"a", "b")
SALT_FROM = (0, 5, 16, 20, 32, 50)

RULES: dict[str, tuple[int, dict[str, int]]] = {
    "open": (10, {"path": 9, "length": 19, "rows": 2, "salt": 4, "start": 5, "how": 7}),
    "extend": (12, {"pick": 4, "count": 60, "path": 9, "how": 15}),
    "decode": (30, {"pick": 4, "path": 9, "how": 15}),
    "fork": (6, {"pick": 4, "row": 3}),
    "branch": (3, {"pick": 4, "row": 3, "n": 2}),
    "spawn": (6, {"pick": 4, "row": 3, "more": 1}),
    "rewind": (14, {"pick": 4, "row": 3, "back": 60}),
    "select": (8, {"pick": 4, "count": 3, "rows": 255}),
    "drop": (4, {"pick": 4, "count": 40, "how": 3}),
    "close": (7, {"pick": 4}),
    "forget": (3, {"pick": 4}),
    "clear": (1, {"sure": 3}),
    "refresh": (1, {"name": 1}),
    "flood": (2, {"pick": 4}),
}
"""Of each rule: its weight in a random history, and the greatest value of each argument."""


class Histories(Witness):
    """One history. Rules that need a batch do nothing while there is none."""

    def run(self, rule: str, **arguments: int) -> None:
        """One step: a rule by name, and the checks after it."""
        self._step += 1
        self.counts["steps"] += 1
        self.counts[rule] += 1
        getattr(self, rule)(**arguments)
        self.check()

    # -- rules -------------------------------------------------------------------------------------

    def open(self, *, path: int, length: int, rows: int, salt: int, start: int, how: int) -> None:
        """Begin a batch. `how`: rows part from each other, have their own salts, are computed."""
        if len(self._held) == BATCHES:
            self.close(pick=path)
        each = range(rows + 1)
        ways = [PATHS[(path + 3 * r * (how & 1)) % len(PATHS)] for r in each]
        sizes = [LENGTHS[(length + 3 * r) % len(LENGTHS)] for r in each]
        prompts = [[token(way, i) for i in range(n)] for way, n in zip(ways, sizes, strict=True)]
        own = how >> 1 & 1
        salts = [SALTS[(salt + r * own) % len(SALTS)] for r in each]
        starts = [SALT_FROM[(start + r * own) % len(SALT_FROM)] for r in each]
        origins = [
            Origin(self._namespace, encode_salt(s), n // PAGE)
            for s, n in zip(salts, starts, strict=True)
        ]
        self._read_tree()
        now = [
            self._offers.find(o, p[:-1], self._there) for o, p in zip(origins, prompts, strict=True)
        ]
        try:
            batch = self.cache.batch(
                prompts,
                salt=salts if own else salts[0],
                salt_from=starts if own else starts[0],
            )
        except OutOfPagesError as error:
            self._refused(error, now)
            return
        held = Held(batch, [], self._epoch)
        self._held.append(held)
        for row, (origin, prompt, found) in enumerate(zip(origins, prompts, now, strict=True)):
            reused = int(batch.reused[row])
            self._check_reused(reused, origin, prompt, found)
            self._reuse[origin.salt] += reused
            self._asked += len(prompt)
            fresh = Row(origin)
            fresh.add(prompt[:reused], fresh.next(prompt[:reused], origin.namespace))
            ever = self._offers.find(origin, prompt, self._offers.dense) if self._tiered else found
            fresh.keys = ever.path[: reused // PAGE]
            held.rows.append(fresh)
            for key in found.nearest:  # taken up and let go again, if one was in part of use
                self._waits.pop(key, None)
        held.waiting = [p[len(row.tokens) :] for p, row in zip(prompts, held.rows, strict=True)]
        if how & 4:
            self._compute(held, attend=path % 5 == 1)

    def extend(self, *, pick: int, count: int, path: int, how: int) -> None:
        """A ragged step. `how`: rows differ, attention is checked, the step is counted at once, it
        is left waiting.
        """
        if (held := self._picked(pick)) is not None:
            counts = [(count + 9 * r * (how & 1)) % 61 for r in range(len(held.rows))]
            begun = self._begin(held, self._ids(held, counts, path))
            if begun and (how < 14 or not isinstance(held.batch, TokenBatch)):
                self._compute(held, attend=how % 4 == 3, count=bool(how & 4))

    def decode(self, *, pick: int, path: int, how: int) -> None:
        """One more token a row. `how`: attention is checked, the step is counted at once."""
        held = self._picked(pick)
        if held is not None and self._begin(held, self._ids(held, [1] * len(held.rows), path)):
            self._compute(held, attend=how == 15, count=bool(how & 1))

    def fork(self, *, pick: int, row: int) -> None:
        """A row once more."""
        self.branch(pick=pick, row=row, n=0)

    def branch(self, *, pick: int, row: int, n: int) -> None:
        """A row several times more."""
        held = self._picked(pick)
        if held is None or len(held.rows) + n >= ROWS:
            return
        batch, rows = held.batch, len(held.rows)
        row %= rows
        new = range(rows, rows + n + 1)
        if not isinstance(batch, TokenBatch):
            batch.select([*range(rows), *[row] * len(new)])
        elif held.waiting is not None and held.new is None:
            self._refuses(lambda: batch.fork(row))
            return
        else:
            assert (batch.branch(row, n + 1) if n else [batch.fork(row)]) == [*new]
        self._count(held)
        held.rows += [held.rows[row].copy() for _ in new]
        held.dropped = False

    def spawn(self, *, pick: int, row: int, more: int) -> None:
        """A batch of rows of another."""
        held = self._picked(pick)
        if held is None or len(self._held) == BATCHES:
            return
        chosen = [row % len(held.rows)] * (1 + more)
        if held.waiting is not None:
            self._refuses(lambda: held.batch.spawn(chosen))
            return
        rows = [held.rows[r].copy() for r in chosen]
        self._held.append(Held(held.batch.spawn(chosen), rows, held.epoch))
        held.dropped = False

    def rewind(self, *, pick: int, row: int, back: int) -> None:
        """Forget the last tokens of a row, or all (`back` 60)."""
        if (held := self._picked(pick)) is None:
            return
        row %= len(held.rows)
        if held.new is not None:
            size = len(held.rows[row].tokens) + len(held.new[row][0])
        else:
            size = len(held.rows[row].tokens) + len(held.rows[row].owed)
        to = 0 if back == 60 else max(size - back, 0)
        try:
            if isinstance(held.batch, TokenBatch):
                held.batch.rewind(row, to=to)
            else:
                lengths = held.batch.whole()
                lengths[row] = to
                held.batch.rewind_all(lengths)
        except UsageError:
            assert any(window is not None for window in self._windows), "a rewind was refused"
            self.counts["refused rewinds"] += 1
            if held.new is not None:
                self._count(held)
            return
        self._count(held)
        self.counts["rewinds into compressed pages"] += self._keep is not None and (
            self._keep * PAGE <= to < len(held.rows[row].tokens) // PAGE * PAGE and to % PAGE > 0
        )
        held.rows[row].rewind(to, self._keep)
        held.dropped = False

    def select(self, *, pick: int, count: int, rows: int) -> None:
        """Rows in another order, some twice, some not; `rows` names them in base 4."""
        if (held := self._picked(pick)) is not None:
            chosen = [(rows >> 2 * i & 3) % len(held.rows) for i in range(count + 1)]
            held.batch.select(chosen)
            self._count(held)
            held.rows = [held.rows[row].copy() for row in chosen]
            held.dropped = False

    def drop(self, *, pick: int, count: int, how: int) -> None:
        """A step that is begun, in part written to (NaN), and dropped."""
        if (held := self._picked(pick)) is None:
            return
        counts = [(count + 7 * r) % 41 for r in range(len(held.rows))]
        if self._begin(held, self._ids(held, counts, 0)):
            assert held.waiting is not None
            nan = torch.full((sum(map(len, held.waiting)), 1, DIM), torch.nan)
            for layer in range(min(how, LAYERS)):
                held.batch.write(layer, nan, nan)
            held.batch.drop_step()
            held.waiting, held.dropped = None, True

    def close(self, *, pick: int) -> None:
        """Give a batch's pages back."""
        if (held := self._picked(pick)) is not None:
            held.batch.close()
            self._count(held)
            self._held.remove(held)

    def forget(self, *, pick: int) -> None:
        """Lose a batch without closing it; what was not counted does not count."""
        if (held := self._picked(pick)) is not None:
            self._held.remove(held)

    def clear(self, *, sure: int) -> None:
        """Free what waits for reuse (one time in four: it empties the tree)."""
        if sure == 0:
            self.cache.clear()
            assert not any(c.allocator.cached_pages() for c in self.cache.classes)

    def refresh(self, *, name: int) -> None:
        """Another namespace, or the same again."""
        self.cache.refresh(NAMESPACES[name])
        self._epoch += self._namespace != NAMESPACES[name]
        self._namespace = NAMESPACES[name]

    def flood(self, *, pick: int) -> None:
        """More tokens than the pool has slots."""
        slots = max(c.allocator.capacity for c in self.cache.classes) * PAGE
        if pick == 0 or (held := self._picked(pick)) is None:
            try:
                self.cache.batch([[2**20] * (slots + 1)])
            except OutOfPagesError as error:
                self._refused(error, [])
                return
            raise AssertionError("more tokens than slots")
        counts = [0] * len(held.rows)
        counts[0] = slots + 1
        assert not self._begin(held, self._ids(held, counts, 0)), "more tokens than slots"

    # -- parts of rules ----------------------------------------------------------------------------

    def _picked(self, pick: int) -> Held | None:
        return self._held[pick % len(self._held)] if self._held else None

    def _ids(self, held: Held, counts: Sequence[int], path: int) -> list[list[int]]:
        """Next tokens of each row, at most `TOKENS` in all unless it is to be too many."""
        ids = []
        for number, (row, count) in enumerate(zip(held.rows, counts, strict=True)):
            size = len(row.tokens)
            size += len(row.owed if held.waiting is None else held.waiting[number])
            stop = size + count if count > TOKENS else min(size + count, TOKENS)
            ids.append([token(PATHS[path], i) for i in range(size, stop)])
        return ids

    def _begin(self, held: Held, ids: list[list[int]]) -> bool:
        """Begin a step; false if there is no room."""
        batch = held.batch
        owed = [[] if held.waiting is not None else row.owed for row in held.rows]
        if held.waiting is not None and held.new is None:
            assert isinstance(batch, TokenBatch)
            self._refuses(lambda: batch.extend(ids))
            self._compute(held)
        try:
            if isinstance(batch, TokenBatch):
                batch.extend(ids)
            else:
                whole = [first + row for first, row in zip(owed, ids, strict=True)]
                flat = np.array([x for row in whole for x in row], np.int32)
                batch.begin(np.array([len(row) for row in whole], np.int64), flat)
        except OutOfPagesError as error:
            self._count(held)
            held.dropped = False
            self._refused(error, [])
            return False
        self._count(held)
        held.waiting = [first + row for first, row in zip(owed, ids, strict=True)]
        held.dropped = False
        return True

    @staticmethod
    def _refuses(call: Callable[[], object]) -> None:
        """The call is no use now, and says so."""
        try:
            call()
        except UsageError:
            return
        raise AssertionError("it was not refused")


def drive(shape: Shape, steps: int, seed: int, counts: Counter[str] | None = None) -> Histories:
    """A random history of so many steps; an error says by which rules it came about."""
    history = Histories(shape, counts)
    run_rules(history, RULES, steps, seed, str(shape))
    return history


def run_rules(
    history: Histories, rules: Mapping[str, tuple[int, dict[str, int]]], steps: int, seed: int,
    name: str,
) -> None:  # fmt: skip
    """So many random steps of a history by rules as `RULES`; `name` is what an error calls it."""
    random = Random(seed)
    weights = [weight for weight, _ in rules.values()]
    for number, rule in enumerate(random.choices(list(rules), weights, k=steps), 1):
        arguments = {key: random.randint(0, most) for key, most in rules[rule][1].items()}
        try:
            history.run(rule, **arguments)
        except Exception as error:  # goes on, with how it came about
            error.add_note(f"{name}, seed {seed}, step {number} of {steps}: {rule} {arguments}")
            raise
