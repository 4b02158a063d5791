"""Tokens/s of unmodified `generate()` over our pages and over DynamicCache, with random weights.

The model has the shape of a Llama of 1.2 billion parameters; nothing is downloaded, and the tokens
are the same for both but where bf16 rounding makes them part ways.
"""

import functools
from typing import Any, NamedTuple

import torch

from benchmarks import common, generate
from benchmarks.generate import Point
from benchmarks.gpu_common import Record, Setting, ceilings
from benchmarks.systems import Run, run_dynamic, run_paged
from kvpaged import PagedKVCache
from kvpaged.bench.common import PAGE_SIZE

POINTS = (Point(1, 512, 128), Point(8, 512, 128), Point(32, 512, 128), Point(8, 4096, 64))
QUICK_POINTS = (Point(2, 20, 3),)


class Shape(NamedTuple):
    """A Llama's sizes; the tiny one runs under Triton's interpreter."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = {
    "tiny": Shape(512, 64, 128, 2, 4, 2, 16),
    "1B": Shape(32_000, 2048, 8192, 16, 32, 8, 64),
    "8B": Shape(128_256, 4096, 14_336, 32, 32, 8, 128),
}


def make_model(setting: Setting, name: str) -> Any:
    """The same random weights at each call, in bf16 (fp32 at the tiny size)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden,
        intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=8192, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if name == "tiny" else torch.bfloat16)
    try:
        with torch.device(setting.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


def bytes_read(model: Any) -> tuple[int, int]:
    """Bytes of weights that a step reads, and of K and V for each token a sequence holds."""
    config = model.config
    weights = sum(x.nbytes for x in model.parameters()) - model.get_input_embeddings().weight.nbytes
    per_layer = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return weights, config.num_hidden_layers * per_layer


def limit(point: Point, weights: int, token_bytes: int, copy_gb_s: float) -> float:
    """Tokens/s of a decode that only reads weights and, at the middle of the run, K and V."""
    held = point.batch * (point.prompt + point.new // 2) * token_bytes
    return point.batch * copy_gb_s * 1e9 / (weights + held)


def run(record: Record, setting: Setting) -> dict[str, Any]:
    """One row a point."""
    limits = ceilings(setting)
    record.document["ceilings"] = limits
    name = "tiny" if setting.quick else "1B"
    plain, prepared = make_model(setting, name), make_model(setting, name)
    weights, token_bytes = bytes_read(plain)
    memory = "4MiB" if setting.quick else "4GiB"
    with PagedKVCache.for_model(
        prepared, memory=memory, page_size=PAGE_SIZE, backend="triton"
    ) as cache:
        systems = {
            "paged": functools.partial(run_paged, cache, prepared),
            "dynamic": functools.partial(run_dynamic, plain),
        }
        for point in QUICK_POINTS if setting.quick else POINTS:
            if record.late():
                continue
            ids = generate.prompts_of(point, plain.config.vocab_size).to(setting.device)
            for system in systems.values():
                system(ids, 2)
            cases = {
                name: functools.partial(system, ids, point.new) for name, system in systems.items()
            }
            runs: dict[str, list[Run]] = common.alternate(cases, 1 if setting.quick else 5)
            top = limit(point, weights, token_bytes, limits["copy_gb_s"])
            row = generate.point_document(point, runs, top, token_bytes)
            rate = row["systems"]["paged"]["decode_tokens_s"]["median"]
            record.add(
                row,
                f"{point}: decode {rate:.1f} tokens/s "
                f"({row['systems']['paged']['decode_of_ceiling']:.0%} of reading the weights and "
                f"K and V), {row['paged_over']['dynamic']['tokens_s']:.2f}x DynamicCache",
            )
    return record.finish(weight_bytes=weights)
