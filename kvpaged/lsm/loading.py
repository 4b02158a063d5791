"""Opening a store: from a manifest and files to a tree."""

from kvpaged.errors import IntegrityError
from kvpaged.lsm import manifest as manifests
from kvpaged.lsm.files import Bytes, Files
from kvpaged.lsm.log import Log, SlabPool
from kvpaged.lsm.manifest import Manifest, SegmentRecord
from kvpaged.lsm.replay import replay
from kvpaged.lsm.segment import Segment, file_name
from kvpaged.lsm.tree import Tree


def load(files: Files, pool: SlabPool, now: int, *, writable: bool) -> Tree:
    """The tree as it was left; `tree.damage` names what of it is lost.

    A writable one removes files that no manifest names, unless a copy of the manifest is damaged.

    Args:
        files: where it lies.
        pool: memory for logs.
        now: milliseconds since 1970.
        writable: it will be written to; the caller holds the lock.

    Raises:
        IntegrityError: there are manifests and none is whole.
        OSError: writable, and a file that is there cannot be opened.
        FileNotFoundError: not writable, and a writer removed a file meanwhile: try again.
    """
    tree = Tree(files, pool, writable=writable)
    saved, damage = manifests.load(files)
    _take(tree, saved, damage, {}, now)
    if writable and not damage:
        listed = {file_name(n) for n in (*saved.logs, *(s.id for s in saved.segments))}
        for name in set(files.list()) - listed:
            if name.endswith(".seg") or name == manifests.NEW:
                files.remove(name)
    return tree


def follow(tree: Tree, now: int) -> Tree:
    """What a reader's tree has become since; segments it knows are not read again.

    Raises:
        IntegrityError, FileNotFoundError: see `load`.
    """
    saved, damage = manifests.load(tree.files)
    if saved.generation == tree.generation and not _grew(tree, saved):
        return tree
    newer = Tree(tree.files, tree.pool, writable=False)
    _take(newer, saved, damage, tree.segments, now)
    return newer


def _take(
    tree: Tree, saved: Manifest, damage: list[str], known: dict[int, Segment], now: int
) -> None:
    tree.damage += damage
    tree.generation, tree.next_id = saved.generation, saved.next_id
    tree.next_sequence = saved.next_sequence
    opened = [(record, _open_segment(tree, record, known)) for record in saved.segments]
    logs = [
        Log(tree.files, number, tree.pool, write=tree.writable) for number in _present(tree, saved)
    ]
    # A log's bytes are all written before those of a newer one: looked at newest first, none of
    # them is taken to be older than what it was replaced by.
    datas = [log.file.map() for log in reversed(logs)]
    # Everything is open, so segments that a reader's older tree has as well may change now.
    tree.add_segments(
        [segment for record, segment in opened if segment and _revive(tree, record, segment, known)]
    )
    for log, data in zip(logs, reversed(datas), strict=True):
        _replay(tree, log, data, now)


def _present(tree: Tree, saved: Manifest) -> list[int]:
    names = set(tree.files.list())
    return [number for number in saved.logs if file_name(number) in names]


def _grew(tree: Tree, saved: Manifest) -> bool:
    known = {log.number: log for log in tree.sealing}
    return any(
        number not in known or known[number].file.size() > known[number].end
        for number in _present(tree, saved)
    )


def _open_segment(tree: Tree, record: SegmentRecord, known: dict[int, Segment]) -> Segment | None:
    try:
        return known.get(record.id) or Segment(tree.files, record.id)
    except FileNotFoundError:
        if not tree.writable:
            raise
        tree.damage.append(f"{tree.files}: {file_name(record.id)} is not there")
    except (OSError, IntegrityError) as error:
        if tree.writable and isinstance(error, OSError):
            raise  # too many open files, say: a manifest without it would be saved, it removed
        tree.damage.append(f"{file_name(record.id)} is lost: {error}")
    return None


def _revive(tree: Tree, record: SegmentRecord, segment: Segment, known: dict[int, Segment]) -> bool:
    """What of a segment lives; whether that can be said."""
    try:
        lost = segment.take_live(record.live)
    except IntegrityError as error:
        tree.damage.append(f"{file_name(record.id)} is lost: {error}")
        return False
    segment.level = record.level
    if record.id not in known:
        segment.stamps[:] = record.touched
    if segment.repaired:
        tree.damage.append(segment.repaired)
    if lost:
        tree.damage.append(f"{segment.where}: {lost} values are lost")
    return True


def _replay(tree: Tree, log: Log, data: Bytes, now: int) -> None:
    """What a log says takes the place of what older files have."""
    replayed = replay(log, data, now, growing=not tree.writable)
    tree.damage += replayed.lost
    for key in replayed.touched:
        tree.kill(key)
    tree.sealing.append(log)
    tree.live_values += len(log.live)
    tree.live_bytes += log.live_bytes
    tree.next_sequence = max(tree.next_sequence, log.last_sequence + 1)
