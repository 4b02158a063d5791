"""Reading a log as it was left, or as it grows."""

from collections.abc import Iterator
from typing import NamedTuple

from kvpaged.errors import IntegrityError
from kvpaged.lsm.files import Bytes
from kvpaged.lsm.groups import Group
from kvpaged.lsm.index import INDEX_MAGIC
from kvpaged.lsm.layout import DELETE, VALUE, VOID, pack_entry
from kvpaged.lsm.log import Log
from kvpaged.lsm.segment import Row, check_payload, scan


class Replayed(NamedTuple):
    """What became of a log's groups.

    Attributes:
        touched: keys that values, deletions and damage of this log replace elsewhere.
        lost: what was left out, and why.
    """

    touched: list[bytes]
    lost: list[str]


def replay(log: Log, data: Bytes, now: int, *, growing: bool = False) -> Replayed:
    """Take in the groups of a log from `log.end` on: `rows`, `live`, `end`.

    What is not whole before the largest `settled` of all groups is damage: such a value is left
    out, with the rest of its group if that is atomic, and what it replaced is gone as well. From
    there on it is a write that was never acknowledged: there the log ends, and what was to be
    replaced stays.

    Args:
        log: opened, at its `end`.
        data: uint8 [bytes], the file.
        now: milliseconds since 1970: when values count as last asked for.
        growing: another process is writing it, so an unfinished write is nothing to speak of.
    """
    touched: dict[bytes, None] = {}
    lost: list[str] = []
    found = list(_groups(log, data))
    log.settled = max([log.settled, *(group.settled for _, group, _ in found)])
    for at, group, bad in found:
        if (bad and at >= log.settled) or (at != log.end and log.end >= log.settled):
            break
        if at != log.end:
            lost.append(f"{log.where}: no whole group in bytes {log.end} to {at}")
        lost += bad.values()
        _take(log, group, set(bad), touched, now)
        log.end = at + group.size
    rest = data[log.end :]
    if len(rest) and bytes(rest[:4]) != INDEX_MAGIC and not growing:
        lost.append(f"{log.where}: the last {len(rest):,} bytes are no whole write")
    return Replayed(list(touched), lost)


def _take(log: Log, group: Group, bad: set[int], touched: dict[bytes, None], now: int) -> None:
    log.entries += len(group.entries)
    if bad and group.atomic:
        bad = set(range(len(group.entries)))
    for number, entry in enumerate(group.entries):
        log.last_sequence = max(log.last_sequence, entry.sequence)
        counted, log.written = log.written, log.written + (entry.kind != DELETE)
        row = Row(entry, pack_entry(entry), counted)
        log.packed_bytes += len(row.packed)
        if entry.kind == VOID:
            continue
        log.kill(entry.key)
        touched[entry.key] = None
        if entry.kind == VALUE and number not in bad:
            log.add_live(row, now)


def _groups(log: Log, data: Bytes) -> Iterator[tuple[int, Group, dict[int, str]]]:
    """Each group from `log.end` on, where it begins, and which of its values are not whole."""
    for at, group in scan(data, log.number, log.where, log.end):
        bad = {}
        for number, entry in enumerate(group.entries):
            try:
                if entry.kind == VALUE:
                    payload = data[entry.offset : entry.offset + entry.stored]
                    check_payload(entry, payload, log.where)
            except IntegrityError as error:
                bad[number] = str(error)
        yield at, group, bad
