"""A segment of a TensorStore, read with numpy alone: `python examples/read_segment.py FILE.seg`.

docs/format.md draws what is read here. Raw tensors are shown; of others the codec is named.
"""

import struct
import sys
from collections.abc import Iterator

import numpy as np

# Ids 1 to 12; fp8 and others follow.
DTYPES = ["u1", "i1", "i2", "i4", "i8", "f2", "bf16", "f4", "f8", "c8", "c16", "?"]
CODECS = {0: "raw", 1: "zstd", 2: "lossless"}
COLUMNS, PREFIX = 6, struct.Struct("<IBBHHHIIIQQqQ")


def entries(raw: np.ndarray) -> Iterator[dict]:
    """What the index says of each value, by ascending keys."""
    magic, version, _, segment, at, size, _, _ = struct.unpack("<8sIIQQQQQ", raw[-56:].tobytes())
    if (magic, version) != (b"KVSEGEND", 1):
        sys.exit(f"no segment, or one of another version: {magic!r} {version}")
    index = raw[at : at + size].tobytes()
    _, _, keys, _, _, _, heap, _ = struct.unpack_from("<4sIQQQQQQ", index)
    print(f"segment {segment}: {keys} values")
    place = 56 + 8 * COLUMNS * keys
    end = place + heap
    while place < end:
        size, _, _, key, parent, parts, forms, metadata, _, _, offset, _, _ = PREFIX.unpack_from(
            index, place
        )
        at = place + PREFIX.size
        stored = list(struct.iter_unpack("<QQQ", index[at : at + 24 * parts]))
        at += 24 * parts
        texts = [index[at : at + key], index[at + key : at + key + parent]]
        at += key + parent + metadata
        yield {"key": texts[0], "parent": texts[1], "offset": offset, "parts": stored,
               "forms": index[at : at + forms]}  # fmt: skip
        place += size


def tensors(raw: np.ndarray, entry: dict) -> Iterator[tuple]:
    """Name, dtype, shape, codec and, of raw ones, elements of each tensor of a value."""
    at, place = entry["offset"], 0
    for stored, _, codec in entry["parts"]:
        number, dims, name = struct.unpack_from("<BBH", entry["forms"], place)
        shape = struct.unpack_from(f"<{dims}Q", entry["forms"], place + 4)
        place += 4 + 8 * dims + name
        text = entry["forms"][place - name : place].decode()
        dtype = DTYPES[number - 1] if number <= len(DTYPES) else f"dtype {number}"
        data = raw[at : at + stored]
        if codec == 0 and dtype == "bf16":  # the upper half of a float32
            data = (data.view("<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        elif codec == 0 and number <= len(DTYPES):
            data = data.view(dtype).reshape(shape)
        yield text, dtype, shape, CODECS.get(codec, f"codec {codec}"), data
        at += -(-stored // 64) * 64


if __name__ == "__main__":
    data = np.fromfile(sys.argv[1], np.uint8)
    for entry in entries(data):
        print(entry["key"], "after", entry["parent"] or "nothing")
        for name, dtype, shape, codec, values in tensors(data, entry):
            shown = values.reshape(-1)[:4] if codec == "raw" else f"{len(values)} bytes"
            print(f"  {name or 'tensor'} {dtype} {list(shape)} {codec}: {shown}")
