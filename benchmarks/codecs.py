"""Codecs of the disk tiers: what they save on real K and V, and what they cost on one thread.

    python -m benchmarks.codecs [--rounds N] [--quick]

The K and V that SmolLM2-135M computes from the standard library's own documentation, as pages of 64
tokens, `[layer, 2, kv_head, slot, head_dim]`, one after another, cut into values of 64 KiB, of one
page (1.4 MiB) and of 2 MiB. GB/s count plain bytes, from encoded ones in memory into a destination
that is there already; the ceiling is a copy of the plain bytes.
"""

import argparse
import functools
import statistics
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.codecs import Bytes, Codec, Lossless, Raw, Zstd
from kvpaged.testing import models

TOKENS = 1024
WAYS: dict[str, Codec] = {
    "copy": Raw(), "lossless": Lossless(), "zstd-1": Zstd(1), "zstd-3": Zstd(3)
}  # fmt: skip
OTHERS = ("copy", "lossless", "zstd-1")
"""Beside what the library stores by default."""


def smollm2_pages(dtype: torch.dtype, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """K and V of a prompt, `[page, layer, 2, kv_head, slot, head_dim]` of `dtype`, and the weights
    of eight of the model's linear layers.

    Args:
        dtype: in which the model runs.
        tokens: a multiple of a page's.
    """
    model, tokenizer = models.load("smollm2", dtype=dtype)
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    with torch.inference_mode():
        layers = model(ids, use_cache=True).past_key_values.layers
    kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
    pages = kv.unflatten(3, (-1, PAGE_SIZE)).permute(3, 0, 1, 2, 4, 5).contiguous()
    weights = torch.stack([layer.mlp.up_proj.weight for layer in model.model.layers[:8]])
    return pages, weights.detach()


def sources(*, quick: bool) -> dict[str, Tensor]:
    """Tensors to be coded, by what they are; the first is what the library stores by default."""
    bf16, weights = smollm2_pages(torch.bfloat16, 128 if quick else TOKENS)
    if quick:
        return {"KV bf16": bf16}
    fp32, _ = smollm2_pages(torch.float32)
    return {
        "KV bf16": bf16,
        "KV fp16": fp32.half(),
        "KV fp32": fp32,
        "KV fp8 e4m3": bf16.to(torch.float8_e4m3fn),
        "weights bf16": weights,
        "random bits": torch.randint(-(2**15), 2**15, bf16.shape, dtype=torch.int16).view(
            torch.bfloat16
        ),
    }


def values_of(tensor: Tensor, size: int) -> list[Bytes]:
    """A tensor's bytes, cut into as many whole values of `size` as there are."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return [data[at : at + size] for at in range(0, len(data) - size + 1, size)]


def measure(codec: Codec, values: list[Bytes], dtype: torch.dtype) -> dict[str, float]:
    """Seconds to encode and to decode all values once; what a codec refuses is copied."""
    places = [np.zeros_like(value) for value in values]
    stored = encoded(codec, values, dtype)

    def decode() -> None:
        for one, value, place in zip(stored, values, places, strict=True):
            if one is None:
                np.copyto(place, value)
            else:
                codec.decode_into(one, place, dtype)

    found = {
        "decode": common.seconds(decode, repeat=3),
        "encode": common.seconds(
            functools.partial(encoded, codec, values, dtype), repeat=1, warmup=0
        ),
    }
    if not all(np.array_equal(*pair) for pair in zip(values, places, strict=True)):
        raise AssertionError(f"{codec.name} gave other bytes back")
    return found


def encoded(codec: Codec, values: list[Bytes], dtype: torch.dtype) -> list[Bytes | None]:
    """All values, coded one by one."""
    return [codec.encode(value, dtype) for value in values]


def rows_of(name: str, tensor: Tensor, size: int, ways: dict[str, Codec], rounds: int) -> list[Any]:
    """One row for each way of coding a source's values of one size."""
    values = values_of(tensor, size)
    total = sum(len(value) for value in values)
    times = common.alternate(
        {
            way: functools.partial(measure, codec, values, tensor.dtype)
            for way, codec in ways.items()
        },
        rounds,
    )
    rows = []
    for way, codec in ways.items():
        stored = encoded(codec, values, tensor.dtype)
        kept = sum(len(v) if s is None else len(s) for s, v in zip(stored, values, strict=True))
        speeds = {
            what: common.summary([total / each[what] / 1e9 for each in times[way]])
            for what in ("decode", "encode")
        }
        row = {"source": name, "bytes": size, "values": len(values), "way": way}
        rows.append({**row, "ratio": round(total / kept, 4), "gb_per_second": speeds})
    return rows


def report(rows: list[Any]) -> str:
    """A line a row; GB/s as medians, and the best round of decoding."""
    lines = []
    for row in rows:
        decode, encode = row["gb_per_second"]["decode"], row["gb_per_second"]["encode"]
        lines.append([
            f"{row['source']}, {row['bytes']:,} bytes", row["way"], f"{row['ratio']:.3f}x",
            f"{decode['median']:.2f}", f"{decode['max']:.2f}",
            "" if row["way"] == "copy" else f"{encode['median']:.2f}",
        ])  # fmt: skip
    heads = ["values", "way", "ratio", "decode GB/s", "best", "encode GB/s"]
    return common.table(heads, lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="results folder")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    rounds = 1 if chosen.quick else chosen.rounds
    tensors = sources(quick=chosen.quick)
    torch.set_num_threads(1)
    where = common.environment()
    rows = []
    for number, (name, tensor) in enumerate(tensors.items()):
        page = tensor[0].nbytes
        sizes = [1 << 16] if chosen.quick else [1 << 16, *([page] if not number else []), 1 << 21]
        ways = WAYS if not number else {way: WAYS[way] for way in OTHERS}
        for size in sizes:
            rows += rows_of(name, tensor, size, ways, rounds)
    ceiling = [r["gb_per_second"]["decode"]["median"] for r in rows if r["way"] == "copy"]
    print(common.describe(where))
    print(f"ceiling: a copy of the plain bytes, {statistics.median(ceiling):.1f} GB/s\n")
    print(report(rows))
    common.publish(
        "codecs", {"benchmark": "codecs", "environment": where, "rows": rows}, chosen.out
    )


if __name__ == "__main__":
    main()
