"""One line on stderr for whatever takes longer than a second."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def phase(what: str, *, stream: TextIO | None = None) -> Iterator[None]:
    """Show `what` and the seconds it has taken, until the block ends.

    On a terminal the line is rewritten in place; the first time after one second, so that short
    phases leave nothing behind. Elsewhere (a log, a pipe) the phase is one line, at its start.

    Args:
        what: a short present participle with its object, such as "fetching SmolLM2 (93 MB)".
        stream: where to write; standard error by default.
    """
    out = sys.stderr if stream is None else stream
    if not out.isatty():
        print(what, file=out, flush=True)
        yield
        return

    started = time.monotonic()
    done = threading.Event()

    def show() -> None:
        shown = False
        while not done.wait(1.0 if not shown else 0.2):
            shown = True
            out.write(f"\r{what} ... {time.monotonic() - started:.0f} s")
            out.flush()
        if shown:
            out.write(f"\r{what} ... {time.monotonic() - started:.0f} s, done\n")
            out.flush()

    ticker = threading.Thread(target=show, name="kvpaged-progress", daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
