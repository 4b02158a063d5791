"""A segment of a TensorStore, read with numpy alone: `python examples/read_segment.py FILE.seg`.

docs/format.md draws what is read here. Raw tensors are shown; of others the codec is named.
"""

import struct
import sys
from collections.abc import Iterator

import numpy as np

# By id, from 1 on; fp8 and others follow.
DTYPES = ["", "u1", "i1", "i2", "i4", "i8", "f2", "bf16", "f4", "f8", "c8", "c16", "?"]
CODECS = {0: "raw", 1: "zstd", 2: "lossless"}
COLUMNS, ENTRY = 6, struct.Struct("<IBBHHHIIIQQqQ")


def entries(raw: np.ndarray) -> Iterator[tuple]:
    """Key, parent, offset, parts and forms of each value, by ascending keys."""
    magic, version, _, segment, at, size, _, _ = struct.unpack("<8sIIQQQQQ", raw[-56:].tobytes())
    if (magic, version) != (b"KVSEGEND", 1):
        sys.exit(f"no segment, or one of another version: {magic!r} {version}")
    index = raw[at : at + size].tobytes()
    _, _, keys, _, _, _, heap, _ = struct.unpack_from("<4sIQQQQQQ", index)
    print(f"segment {segment}: {keys} values")
    place = 56 + 8 * COLUMNS * keys
    end = place + heap
    while place < end:
        head = ENTRY.unpack_from(index, place)
        size, _, _, key, parent, count, forms, metadata, _, _, offset, _, _ = head
        at = place + ENTRY.size + 24 * count
        parts = list(struct.iter_unpack("<QQQ", index[place + ENTRY.size : at]))
        names = index[at : at + key], index[at + key : at + key + parent]
        at += key + parent + metadata
        yield *names, offset, parts, index[at : at + forms]
        place += size


def tensors(raw: np.ndarray, at: int, parts: list, forms: bytes) -> Iterator[tuple]:
    """Name, dtype, shape, codec and elements (of a raw one, else bytes) of a value's tensors."""
    place = 0
    for stored, _, codec in parts:
        number, dims, name = struct.unpack_from("<BBH", forms, place)
        shape = struct.unpack_from(f"<{dims}Q", forms, place + 4)
        place += 4 + 8 * dims + name
        dtype = DTYPES[number] if number < len(DTYPES) else f"dtype {number}"
        data = raw[at : at + stored]
        if codec == 0 and dtype == "bf16":  # the upper half of a float32
            data = (data.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        elif codec == 0 and number < len(DTYPES):
            data = data.view(dtype).reshape(shape)
        yield forms[place - name : place].decode(), dtype, shape, codec, data
        at += -(-stored // 64) * 64


if __name__ == "__main__":
    file = np.fromfile(sys.argv[1], np.uint8)
    for key, parent, *where in entries(file):
        print(key, "after", parent or "nothing")
        for name, dtype, shape, codec, data in tensors(file, *where):
            shown = data.reshape(-1)[:4] if codec == 0 else f"{len(data)} bytes"
            print(f"  {name or 'tensor'} {dtype} {list(shape)} {CODECS.get(codec, codec)}: {shown}")
