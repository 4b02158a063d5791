"""A model's weights in a store and back, beside a safetensors file.

    python examples/weights_cache.py [--path DIRECTORY]

The model is SmolLM2-135M in bf16. A value of the store is a layer, its parts are the layer's
tensors: so a layer comes by its key, and one tensor of every layer by the part's name. They come
as views (the file's own bytes: no memory is taken), read into tensors that are there already, or
decoded into them, and are the same bit for bit. The store looks at each byte, for its checksum,
before it hands it out; safetensors has no checksums and does not. Each loads in one thread, from
files that are in the page cache. These weights were published in 4 bits, which `lossless` profits
from. Without `--path` nothing is left behind.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kvpaged import TensorStore
from kvpaged.bench.common import alternate, paired_ratio, seconds
from kvpaged.lsm.options import StoreOptions
from kvpaged.testing import models

Weights = Mapping[str, Tensor]  # a tensor by its name in the model
Values = dict[bytes, dict[str, Tensor]]  # a layer by its key: its tensors by their names in it
Way = Callable[[], Weights]
OPTIONS = StoreOptions(direct=False, read_threads=1)
"""What is read again and again is to be in the page cache; peers have one thread each."""
PART = "self_attn.q_proj.weight"
"""What is asked for where one tensor of every layer is."""


def by_layer(weights: Weights) -> Values:
    """Each layer is a value, and so is what belongs to none; the tensors are the same ones."""
    values: Values = {}
    for name, tensor in weights.items():
        layer = re.match(r"model\.layers\.\d+", name)
        key = layer.group() if layer else "model"
        values.setdefault(key.encode(), {})[name.removeprefix(f"{key}.")] = tensor
    return values


def by_name(values: Values) -> Weights:
    """What `by_layer` was given."""
    return {
        f"{key.decode()}.{part}": tensor
        for key, value in values.items()
        for part, tensor in value.items()
    }


def put(folder: Path, codec: str, weights: Weights) -> None:
    """Put all layers, and say what they take up."""
    with TensorStore(folder, codec=codec, options=OPTIONS) as store:
        store.put_many(by_layer(weights))
        store.flush()
        stats = store.stats()
    print(f"{codec:>12} {stats.used_bytes:>13,} bytes, {stats.compression:.3f} times smaller")


def load(folder: Path, own: Values, *, view: bool = False) -> Weights:
    """Open a store and take all layers from it: views, or read into the tensors of `own`."""
    keys = list(own)
    with TensorStore(folder, read_only=True, options=OPTIONS) as store:
        found = store.view_many(keys) if view else store.get_many(keys, out=list(own.values()))
    return by_name(dict(zip(keys, found, strict=True)))


def load_part(folder: Path) -> Weights:
    """Open a store and read one tensor of each layer."""
    with TensorStore(folder, read_only=True, options=OPTIONS) as store:
        return by_name(dict(store.items(b"model.layers.", parts=[PART])))


def file_part(file: Path, names: Collection[str]) -> Weights:
    """Read some tensors of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in names}


def same(one: Tensor, other: Tensor) -> bool:
    """Same dtype, shape and bits (by value, NaN would differ from itself, and 0 not from -0)."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def ways(path: Path, own: Values, part: Collection[str]) -> list[dict[str, Way]]:
    """Ways to load, those that give the same side by side, safetensors' first."""
    from safetensors.torch import load_file

    file, raw, lossless = path / "safetensors", path / "raw", path / "lossless"
    flat = by_name(own)
    mapped: Way = partial(load_file, file)
    return [
        {"safetensors, mapped": mapped, "raw, viewed": partial(load, raw, own, view=True)},
        {
            "safetensors, copied": lambda: {k: flat[k].copy_(v) for k, v in mapped().items()},
            "raw, read": partial(load, raw, own),
            "lossless, read": partial(load, lossless, own),
        },
        {
            "safetensors, one tensor a layer": partial(file_part, file, part),
            "raw, one part a layer": partial(load_part, raw),
        },
    ]


@torch.no_grad()
def compare(path: Path, rounds: int) -> None:
    """Put, load in turn, and run a model that was loaded from the store."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model, tokenizer = models.load("smollm2", dtype=torch.bfloat16)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    save_file(weights, path / "safetensors")
    size = (path / "safetensors").stat().st_size
    print(
        f" safetensors {size:>13,} bytes, {len(weights)} tensors in {len(by_layer(weights))} values"
    )
    for codec in ("raw", "lossless"):
        put(path / codec, codec, weights)

    own = by_layer({name: torch.empty_like(tensor) for name, tensor in weights.items()})
    part = [name for name in weights if name.endswith(PART)]
    every = ways(path, own, part)
    compared = different = 0
    for group in every:
        for way in group.values():
            for tensor in by_name(own).values():
                tensor.fill_(torch.nan)  # what a way does not write is seen
            found = way()
            compared += len(found)
            different += sum(not same(tensor, weights[name]) for name, tensor in found.items())
    print(f"{compared} tensors compared, {different} of them differ in any bit\n")

    for group in every:
        timed = {name: partial(seconds, way, repeat=1, warmup=0) for name, way in group.items()}
        times = alternate(timed, rounds)
        theirs = times[next(iter(times))]
        for name, ours in times.items():
            beside = (
                f" {paired_ratio(ours, theirs):6.2f} times as long" if ours is not theirs else ""
            )
            print(f"{name:>31} {median(ours) * 1e3:7.1f} ms{beside}")

    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).eval()
    fresh.load_state_dict(load(path / "raw", own, view=True), strict=False, assign=True)
    fresh.tie_weights()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    here, there = model(ids).logits, fresh(ids).logits
    word = tokenizer.decode(there[0, -1].argmax())
    print(f"\na fresh model on views gives the same logits: {same(here, there)};{word}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Weights in a store, beside safetensors.")
    parser.add_argument("--path", type=Path, help="where to keep the files")
    parser.add_argument("--rounds", type=int, default=7, help="of loading")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.path or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        compare(folder, arguments.rounds)
