"""A cache that is still there tomorrow: text, numbers, bytes and tensors by key.

For who comes from memcached: `set_key`, `get_key`, `update_key` (only if it is there),
`delete_key`. No server: a directory, bounded in bytes, which any number of runs may open in turn.
"""

import tempfile

import torch

from kvpaged.lsm.key_value import KeyValueCache

with tempfile.TemporaryDirectory() as folder:
    with KeyValueCache(folder, max_bytes="64MiB") as cache:
        cache.set_key("greeting", "hello")
        cache.set_key("visits", 1)
        cache.set_key("embedding", torch.arange(4.0), ttl=3600)
        print("updated what is there:", cache.update_key("visits", cache.get_key("visits") + 1))
        print("updated what is not:", cache.update_key("nobody", 1))

    with KeyValueCache(folder, max_bytes="64MiB") as cache:  # another run
        print(cache.get_key("greeting"), cache.get_key("visits"), cache.get_key("embedding"))
        print("deleted:", cache.delete_key("greeting"), "then:", cache.get_key("greeting", "gone"))
