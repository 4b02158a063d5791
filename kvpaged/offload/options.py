"""Dials of moving pages between the pool and its tiers."""

from dataclasses import dataclass, fields

from kvpaged.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadOptions:
    """How pages are moved.

    Attributes:
        staging_bytes: of host memory that pages go through between pool and tiers (pinned on a
            GPU), at most. At least a page of every layer group.
        call_bytes: of the records of one call of a tier, about. A drive has fewer requests in
            flight at the end of each.
        deadline_s: a load is given up when it is later by more than this than computing the same
            tokens would have been, or makes no progress for so long; where no pass over a prompt
            was measured yet, when it takes longer than this. What has come is used.
        open_deadline_s: what a cache that begins waits for a tier to say what it holds, at most.
            One that says so later is used from then on.
        write_deadline_s: of a call that writes.
        close_s: what `close` waits for pages to be written, at most.
        linger_s: how long full pages are gathered before they are demoted together.
    """

    staging_bytes: int = 128 << 20
    call_bytes: int = 32 << 20
    deadline_s: float = 1.0
    open_deadline_s: float = 10.0
    write_deadline_s: float = 10.0
    close_s: float = 10.0
    linger_s: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"{field.name} must be positive, got {value}")
