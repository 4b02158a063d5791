"""Attention over sealed pages on a CPU, beside exact ones, and what it costs to seal.

    python -m benchmarks.cpu_sealed [--rounds N] [--quick]

SmolLM2-135M's shape in bf16: 9 query heads on 3 KV heads of 64, pages of 64. Decode: one query a
row after 1,500 tokens, a layer after another, of as many that pages come from memory as they do in
a step, not from a cache; beside native code and stock torch over exact pages that lie layer-major.
Prefill: 512 tokens after 1,500. A page is sealed with all its 30 layers. The last page of a row is
exact in each way.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from kvpaged_kernels.cpu import decode, mixed
from kvpaged_kernels.cpu.native_attend import NativeLayer
from kvpaged_kernels.cpu.native_sealed import NativeSealed
from kvpaged_kernels.cpu.plan import plan_decode, plan_spans
from kvpaged_kernels.cpu.prefill import paged_prefill
from kvpaged_kernels.sealed import Part, SliceLayout

LAYERS, KV_HEADS, GROUP, DIM, PAGE = 30, 3, 3, 64, 64
PAST, NEW = 1500, 512
SCALE = DIM**-0.5
_INT8, _INT4 = Part("int", 8, 32), Part("int", 4, 32)
FORMS = {
    "int4": (_INT4, _INT4),
    "int8": (_INT8, _INT8),
    "fp8": (Part("fp8", 8), Part("fp8", 8)),
    "k8v4": (_INT8, _INT4),
}


def layout_of(name: str) -> SliceLayout:
    """The layout of a form, for SmolLM2."""
    k, v = FORMS[name]
    return SliceLayout.of(
        k, v, kv_heads=KV_HEADS, page_size=PAGE, k_dim=DIM, v_dim=DIM, dtype=torch.bfloat16
    )


class Rows:
    """Pages of rows of one length in all forms, for several layers; the same numbers in each."""

    def __init__(self, rows: int, length: int, layers: int) -> None:
        self.width, self.layers = -(-length // PAGE), layers
        count = rows * self.width
        shape = layers, KV_HEADS, count, PAGE, DIM  # a head's adjacent pages are one run
        self.k, self.v = (torch.randn(shape).bfloat16().transpose(1, 2) for _ in range(2))
        self.table = torch.arange(count, dtype=torch.int32).view(rows, self.width)
        self.lengths = torch.full((rows,), length, dtype=torch.int32)
        self.slices: dict[str, Tensor] = {}
        entries = torch.arange(count)
        for name in FORMS:
            layout = layout_of(name)
            made = torch.empty(count, layers, layout.slice_bytes, dtype=torch.uint8)
            mixed.seal(
                self.k.transpose(0, 1), self.v.transpose(0, 1), entries, made, entries, layout
            )
            self.slices[name] = made

    def exact(self, layer: int) -> NativeLayer:
        """A layer whose pages are all exact."""
        return NativeLayer(
            self.k[layer], self.v[layer], KV_HEADS * GROUP, scale=SCALE, window=None, softcap=None
        )

    def sealed(self, name: str, layer: int) -> NativeSealed:
        """A layer of sealed pages."""
        return NativeSealed(
            self.k[layer], self.v[layer], self.slices[name][:, layer], layout_of(name),
            KV_HEADS * GROUP, keep=0, scale=SCALE, window=None, softcap=None,
        )  # fmt: skip


def decoding(rows: int, layers: int, rounds: int) -> Any:
    """Milliseconds of a layer by each way."""
    pages = Rows(rows, PAST, layers)
    table, lengths = pages.table, pages.lengths
    q = torch.randn(rows, KV_HEADS * GROUP, DIM).bfloat16()
    k, v = (torch.randn(rows, KV_HEADS, DIM).bfloat16() for _ in range(2))
    exact = [pages.exact(layer) for layer in range(layers)]
    step = exact[0].plan(q, k, v, table, lengths, torch.arange(rows + 1, dtype=torch.int32))
    plan = plan_decode(
        table.numpy(), lengths.long().numpy(), joined=True, page_size=PAGE, step=1, dtype=q.dtype
    )

    def stock() -> None:
        for layer in range(layers):
            decode.paged_decode(q, pages.k[layer], pages.v[layer], plan, scale=SCALE)

    def sealed(name: str) -> Callable[[], object]:
        each = [pages.sealed(name, layer) for layer in range(layers)]
        return lambda: [layer.decode(q, table, lengths) for layer in each]

    def checked() -> None:
        for layer in range(layers):
            mixed.mixed_decode(
                q, pages.k[layer], pages.v[layer], pages.slices["int4"][:, layer],
                layout_of("int4"), table, lengths, keep=0, scale=SCALE,
            )  # fmt: skip

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: [layer(step, q, k, v) for layer in exact],
        "stock": stock,
        **{name: sealed(name) for name in FORMS},
        "int4, checked": checked,
    }
    return {"case": f"decode, {rows} rows, {layers} layers", **_figures(ways, layers, rounds)}


def prefilling(new: int, rounds: int) -> Any:
    """Milliseconds of a layer by each way."""
    length = PAST + new
    pages = Rows(1, length, 1)
    cu_q = torch.tensor([0, new], dtype=torch.int32)
    q = torch.randn(new, KV_HEADS * GROUP, DIM).bfloat16()
    k, v = (torch.randn(new, KV_HEADS, DIM).bfloat16() for _ in range(2))
    exact = pages.exact(0)
    step = exact.plan(q, k, v, pages.table, pages.lengths, cu_q)
    plan = plan_spans(
        pages.table.numpy(), pages.lengths.long().numpy(), cu_q.long().numpy(), joined=True,
        page_size=PAGE, step=1,
    )  # fmt: skip
    own = pages.table[0, PAST // PAGE :].long()
    own_k, own_v = pages.k[0][own], pages.v[0][own]
    cu_own = torch.tensor([0, len(own)], dtype=torch.int32)

    def sealed(name: str) -> Callable[[], object]:
        layout = layout_of(name)
        return lambda: mixed.mixed_prefill(
            q, pages.k[0], pages.v[0], pages.slices[name][:, 0], layout, own_k, own_v, cu_own,
            pages.table, cu_q, pages.lengths, keep=0, max_q=new, max_len=length, scale=SCALE,
        )  # fmt: skip

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: exact(step, q, k, v),
        "stock": lambda: paged_prefill(q, pages.k[0], pages.v[0], plan, scale=SCALE),
        **{name: sealed(name) for name in FORMS},
    }
    return {"case": f"prefill, {new} after {PAST}", **_figures(ways, 1, rounds)}


def sealing(layers: int, rounds: int) -> Any:
    """Milliseconds of a page by each form, beside those of a copy of its exact bytes."""
    k, v = (torch.randn(8, layers, KV_HEADS, PAGE, DIM).bfloat16() for _ in range(2))
    entry = torch.tensor([3])
    target = torch.empty_like(k[3]), torch.empty_like(v[3])

    def sealed(name: str) -> Callable[[], object]:
        layout = layout_of(name)
        slices = torch.empty(8, layers, layout.slice_bytes, dtype=torch.uint8)
        return lambda: mixed.seal(k, v, entry, slices, entry, layout)

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: [x.copy_(y[3]) for x, y in zip(target, (k, v), strict=True)],
        **{name: sealed(name) for name in FORMS},
    }
    return {"case": f"seal, {layers} layers (copy)", **_figures(ways, 1, rounds)}


def _figures(ways: Mapping[str, Callable[[], object]], layers: int, rounds: int) -> dict[str, Any]:
    times = common.alternate(
        {name: functools.partial(common.seconds, way, repeat=3) for name, way in ways.items()},
        rounds,
    )
    return {
        "ms": {
            name: common.summary([1e3 * t / layers for t in each]) for name, each in times.items()
        },
        "over": {
            name: round(common.paired_ratio(each, times["native"]), 3)
            for name, each in times.items()
        },
    }


def report(cases: list[Any]) -> str:
    """One line a case: milliseconds over exact pages, and how many times as long others take."""
    names = list(cases[0]["ms"])[1:]
    lines = [
        [case["case"], f"{case['ms']['native']['median']:.3f}",
         *(f"{case['over'][name]:.2f}x" if name in case["over"] else "" for name in names)]
        for case in cases
    ]  # fmt: skip
    return common.table(["case", "native, exact, ms", *names], lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="results folder")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    steps = ((1, 2),) if chosen.quick else ((8, 8), (8, 1), (1, 30), (1, 1))
    with torch.inference_mode():
        cases = [decoding(rows, layers, chosen.rounds) for rows, layers in steps]
        cases.append(prefilling(80 if chosen.quick else NEW, chosen.rounds))
        cases.append(sealing(2 if chosen.quick else LAYERS, chosen.rounds))
    print(report(cases))
    document = {"benchmark": "cpu_sealed", "environment": common.environment()}
    common.publish("cpu_sealed", {**document, "cases": cases}, chosen.out)


if __name__ == "__main__":
    main()
