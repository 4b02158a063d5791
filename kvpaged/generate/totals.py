"""What a generator has done so far."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvpaged.generate.requests import Line
from kvpaged.generate.rows import Rows


@dataclass(slots=True)
class EngineStats:
    """Running totals.

    Attributes:
        steps: forward passes.
        tokens: computed in them, prompts' too.
        generated: tokens of replies.
        preemptions: rows set back because pages ran out.
        running, waiting: replies that have a row now, and that have none yet.
        host_s: seconds of steps that were not the forward pass and the choice of tokens.
        device_s: seconds of those, and of waiting for the device.
    """

    steps: int = 0
    tokens: int = 0
    generated: int = 0
    preemptions: int = 0
    running: int = 0
    waiting: int = 0
    host_s: float = 0.0
    device_s: float = 0.0


def now(stats: EngineStats, rows: Rows, line: Sequence[Line]) -> EngineStats:
    """The figures, with who runs and who waits now."""
    running = sum(reply is not None for reply in rows.replies)
    kept = int(rows.taken.sum()) - running
    return replace(stats, running=running, waiting=kept + sum(each.slots for each in line))
