"""A process that puts until it is killed: `python -m tests.lsm.crashing PATH DURABILITY SEED`.

It says each key on stdout once its put has returned.
"""

import random
import sys

from kvpaged.lsm.options import StoreOptions
from kvpaged.lsm.store import TensorStore
from tests.lsm.small import KIB, value


def main(path: str, durability: str, seed: int) -> None:
    rng = random.Random(seed)
    options = StoreOptions(
        codec="raw", memtable_bytes=512 * KIB, segment_bytes=256 * KIB, durability=durability,  # type: ignore[arg-type]
        compact_bytes_per_s=20 << 20,
    )  # fmt: skip
    with TensorStore(path, options=options) as store:
        for turn in range(1, 10**9):
            key, number = b"%d" % rng.randrange(30), 1000 * seed + turn
            kind = rng.randrange(10)
            if kind < 7:
                store.put(key, value(number, rng.choice([50, 3000, 40_000])))
                print(key.decode(), number, flush=True)
            elif kind < 8:
                store.delete(key)
                print(key.decode(), 0, flush=True)
            elif kind < 9:
                other = b"%d" % rng.randrange(30, 40)
                with store.batch() as batch:
                    batch.put(other, value(number, 2000))
                    batch.put(b"with " + other, value(number, 2000))
                print(other.decode(), number, flush=True)
                print("with " + other.decode(), number, flush=True)
            elif rng.random() < 0.1:
                store.compact()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
