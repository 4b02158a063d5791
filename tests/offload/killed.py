"""A process that computes sequences over a tier on disk until it is killed.

`python -m tests.offload.killed PATH SEED` adds a line `SECONDS KEY` to the file `PATH.said` for
each page as it enters the prefix index (seconds of the system's monotonic clock, the record's key),
and a line `SEED` before each sequence, the one of its `words`.
"""

import os
import sys
import time
from pathlib import Path

import torch

from kvpaged.offload.options import OffloadOptions
from kvpaged.pages.trail import Node
from kvpaged.testing.dense import PAGE
from kvpaged.tiers.record import record_key
from tests.offload.tiered import cache_of, disk, run, words

LENGTH = 6 * PAGE + 1
"""Tokens of a sequence."""
SIZE = "512MiB"
"""Of the tier: with room for all there is."""


def main(path: str, seed: int) -> None:
    torch.set_num_threads(1)
    said = os.open(path + ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with cache_of([disk(Path(path), size=SIZE)], pages=40, options=OffloadOptions()) as cache:
        entered = cache.index.on_enter
        assert entered is not None

        def note(node: Node, group: int, page: int) -> None:
            key = record_key(node.key, group).hex()
            os.write(said, f"{time.monotonic()} {key}\n".encode())
            entered(node, group, page)

        cache.index.on_enter = note
        for number in range(seed, 10**9):
            os.write(said, f"{number}\n".encode())
            run(cache, words(number, LENGTH))
            time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
