"""Records between the tiers of a stack: down when one fills, up ahead of their use."""

from kvpaged.offload.options import OffloadOptions
from kvpaged.offload.stack import Stack, log
from kvpaged.offload.staging import Countdown, Staging
from kvpaged.tiers.base import KEPT, Record

LOOKED_AT = 256
"""Records looked at in one go, of a tier that fills."""
FULL = 0.9
"""Of its capacity: from there on a tier's records go down to the next."""


class Levels:
    """Moves records from tier to tier. One thread at a time: the mover's."""

    def __init__(self, stack: Stack, staging: Staging, options: OffloadOptions) -> None:
        self._stack, self._staging, self._options = stack, staging, options

    def spill(self) -> bool:
        """Move what a tier that fills would give up next to the one below it.

        It does not stay: having been read it would be the last to be given up, and what has no copy
        below the first.
        """
        for number in range(len(self._stack.levels) - 1):
            workers, below = self._stack.workers, self._stack.tiers[number + 1]
            up = workers[number].takes and workers[number + 1].takes
            if below.policy != "write-back" or not up or not self._fills(number):
                continue
            with self._stack.lock:
                sizes = self._stack.directory.held[number]
                keys, size = [], 0
                for key in self._stack.directory.missing_below(number, LOOKED_AT):
                    if key.startswith(KEPT):
                        continue
                    keys.append(key)
                    size += sizes[key]
                    if size >= self._options.call_bytes:
                        break
            if keys and (moved := self._move(number, keys, number + 1)):
                return self._drop(number, moved)
        return False

    def _drop(self, number: int, keys: list[bytes]) -> bool:
        """Have a tier forget records; whether it did."""
        try:
            timeout = self._options.write_deadline_s
            self._stack.call(number, lambda tier: tier.delete(keys), timeout, kind="delete")
        except Exception as error:  # whatever a tier raises: it gives them up when it has to
            log.debug("tier %s: %r", self._stack.tiers[number].name, error)
            return False
        with self._stack.lock:
            self._stack.directory.remove(number, keys)
        return True

    def _fills(self, number: int) -> bool:
        """Whether a tier may soon give something up: the next call may come with `call_bytes`."""
        try:
            _, size, capacity = self._stack.tiers[number].usage()
        except Exception:  # a tier's own: whoever calls it next will see
            return False
        if capacity is None:
            return False
        return size >= min(FULL * capacity, max(capacity - self._options.call_bytes, capacity // 2))

    def bring_up(self, keys: list[bytes]) -> None:
        """Copy records to the first tier from the tiers that have them."""
        by_tier: dict[int, list[bytes]] = {}
        if not self._stack.workers[0].takes:
            return
        with self._stack.lock:
            up = self._stack.levels_up()
            for key in keys:
                at = self._stack.where(key, up)
                if at is not None and at[0]:
                    by_tier.setdefault(at[0], []).append(key)
        for number, some in by_tier.items():
            self._move(number, some, 0)

    def _move(self, number: int, keys: list[bytes], to: int) -> list[bytes]:
        """Copy records of a tier to another; the keys that the other has now."""
        with self._stack.lock:
            sizes = [self._stack.directory.held[number].get(key, 0) for key in keys]
        keys = keys[: max(1, self._staging.size // 2 // max(*sizes, 1))]
        taken = self._staging.take(len(keys), max(sizes))
        if taken is None:
            return []
        rooms, give_back = taken
        records: list[Record] = []

        def read(tier: object) -> None:
            with self._stack.tiers[number].read(keys, list(rooms)) as found:
                for record, room in zip(found, rooms, strict=True):
                    if record is not None:
                        body = room[: record.body.numel()]
                        if body.data_ptr() != record.body.data_ptr():
                            body.copy_(record.body)
                        records.append(record._replace(body=body))

        done = Countdown(2, give_back)  # the call, and what is done with what it read
        try:
            self._stack.call(number, read, self._options.write_deadline_s, done)
        except Exception:  # whatever a tier raises; a call that hangs keeps the room
            done()
            return []
        there = [record.key for record in records]
        with self._stack.lock:
            self._stack.directory.remove(number, [key for key in keys if key not in there])
            for key in there:  # for the tier they were read, and go last
                self._stack.directory.touch(number, key)
        self._stack.put_to((to,), records, done)
        with self._stack.lock:
            return [key for key in there if key in self._stack.directory.held[to]]
