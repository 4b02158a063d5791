"""Processes that put until they are killed.

`python -m tests.lsm.crashing` forks one for each line `PATH DURABILITY SEED` that it reads, says
its process id, and `dead` once it is dead. What a put of a child has returned for, the child adds
to the file `PATH.said`: a line `KEY NUMBER`, number 0 for a deletion.
"""

import os
import random
import sys

import torch

from kvpaged.lsm.options import Durability, StoreOptions
from kvpaged.lsm.store import TensorStore
from tests.lsm.small import KIB, value


def put_for_ever(path: str, durability: Durability, seed: int) -> None:
    rng = random.Random(seed)
    said = os.open(path + ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    options = StoreOptions(
        codec="raw", durability=durability, memtable_bytes=512 * KIB, segment_bytes=256 * KIB,
        compact_bytes_per_s=20 << 20,
    )  # fmt: skip
    with TensorStore(path, options=options) as store:
        os.write(said, b"\n")
        for turn in range(1, 10**9):
            key, number = str(rng.randrange(30)), 100_000 * seed + turn
            kind = rng.randrange(100)
            if kind < 70:
                store.put(key.encode(), value(number, rng.choice([50, 3000, 40_000])))
                os.write(said, f"{key} {number}\n".encode())
            elif kind < 80:
                store.delete(key.encode())
                os.write(said, f"{key} 0\n".encode())
            elif kind < 98:
                with store.batch() as batch:
                    batch.put(f"b{key}".encode(), value(number, 2000))
                    batch.put(f"with b{key}".encode(), value(number, 2000))
                os.write(said, f"b{key} {number}\nwith b{key} {number}\n".encode())
            else:
                store.compact()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        path, durability, seed = line.split()
        child = os.fork()
        if not child:
            put_for_ever(path, durability, int(seed))  # type: ignore[arg-type]
            os._exit(1)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)


if __name__ == "__main__":
    main()
