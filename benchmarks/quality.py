"""Quality of compressed formats: predictions, needles and long replies beside exact K and V.

    python -m benchmarks.quality [--models smollm2,gemma3] [--formats ...] [--windows N] [--quick]

Each window of a text (1,024 tokens at once, then 256 that are scored, 64 at a time, teacher-forced,
fp32) runs through a cache of each format: perplexity, KL(exact || format) a token, how often the
most likely token is the exact model's. transformers' `QuantizedCache` gets the same tokens the same
way, if hqq and optimum-quanto are there (`make quality` puts them into build/peers); what could not
be measured is said. Then numbers hidden in text and asked for, and the first token at which greedy
replies of 500 tokens differ.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks import quality_measures as measures
from benchmarks.quality_report import report
from benchmarks.quality_systems import PEERS, System, dynamic, paged, peer
from kvpaged.calibration import calibrate
from kvpaged.config import Backend
from kvpaged.formats.kv import NAMED, KVFormat
from kvpaged.likeness import Likeness
from kvpaged.testing import models
from kvpaged.tuning import tune

MODELS = ("smollm2", "gemma3")
TUNED = "int4-tuned"
"""int4 with what the model's queries are like (`kvpaged.tune`)."""
CALIBRATED, BUDGET = "calibrated", 0.003
"""A format by layer for that budget (`kvpaged.calibrate`), which takes minutes to find; only where
it is asked for.
"""
FORMATS = ("exact", *NAMED, TUNED)
MORE = {
    "k4v8": KVFormat(name="k4v8", k="int4", v="int8"),
    "k16v4": KVFormat(name="k16v4", v="int4"),
    "int4-keep0": KVFormat(name="int4-keep0", k="int4", v="int4", keep=0),
}
FURTHER_FORMATS = (*MORE, CALIBRATED)
"""Formats beside the named ones that can be asked for."""

PARTS = ("needles", "replies")

DIVERGES_AFTER = 320
"""Tokens of the prompts whose replies are followed."""

FURTHER = 25
"""Windows that needles and replies take as long as."""

OWN, PEER = "exact", "hf-exact"
"""What ours, and what peers, are compared with: computed by the same code, but for the format."""


def measure_windows(
    model: Any, systems: Mapping[str, System], rows: Tensor, prefill: int, most: int,
    said: Callable[[str], None],
) -> dict[str, list[Likeness]]:  # fmt: skip
    """Each window under each cache, beside the exact one of its kind."""
    found: dict[str, list[Likeness]] = {name: [] for name in systems}
    total = 0.0
    for number, group in enumerate(rows.split(most)):
        exact: dict[str, list[Tensor]] = {}
        for name, system in systems.items():
            start = common.clock()
            with system.open(group[:, :prefill]) as past:
                logits = measures.logits_of(model, past, group, prefill=prefill)
            if name in (OWN, PEER):
                exact[name] = logits
            beside = exact[PEER if name in PEERS else OWN]
            found[name] += measures.compare(beside, logits, group)
            if not number:
                each = (common.clock() - start) / len(group)
                said(f"{name}: {each:.1f} s a window")
                total += each
        if not number:  # needles are as long, replies a third of a window each
            said(
                f"all windows will take about {total * len(rows) / 60:.0f} minutes, needles and "
                f"replies {total * FURTHER / 60:.0f}"
            )
    return found


def measure_needles(
    model: Any, tokenizer: Any, systems: Mapping[str, System], prompts: list[measures.Needle],
    most: int,
) -> dict[str, Any]:  # fmt: skip
    """How many numbers each cache finds, and how many replies are the exact cache's."""
    rows = torch.tensor([needle.ids for needle in prompts])
    replies: dict[str, list[Tensor]] = {}
    for name, system in systems.items():
        made: list[Tensor] = []
        for group in rows.split(most):
            with system.open(group) as past:
                made += measures.answers(model, past, group)
        replies[name] = made
    found: dict[str, Any] = {"prompts": len(prompts), "tokens": rows.shape[1]}
    for name, made in replies.items():
        pairs = zip(made, prompts, strict=True)
        exact = replies[PEER if name in PEERS else OWN]
        found[name] = {
            "hits": sum(measures.is_hit(tokenizer, reply, n.secret) for reply, n in pairs),
            "as_exact": sum(torch.equal(a, b) for a, b in zip(made, exact, strict=True)),
        }
    return found


def measure_divergence(
    model: Any, systems: Mapping[str, System], prompts: Tensor, count: int
) -> dict[str, Any]:
    """The first token at which each cache's greedy reply differs from the exact one's."""
    with systems[OWN].open(prompts) as past:
        reply = measures.greedy(model, past, prompts, count)
    found: dict[str, Any] = {"new_tokens": count}
    for name, system in systems.items():
        with system.open(prompts) as past:
            found[name] = measures.diverges(model, past, prompts, reply)
    return found


def open_systems(
    model: Any, tokenizer: Any, formats: list[str], *, peers: bool, memory: int,
    backend: Backend | None,
) -> tuple[dict[str, System], dict[str, str]]:  # fmt: skip
    """What is measured, the exact caches first, and why some peers are not."""
    systems, left_out = {}, {}
    for name in formats:
        given: str | KVFormat = "auto" if name == OWN else MORE.get(name, name)
        code = [inspect.getsource(argparse)]  # not of the kind that windows are of
        if name == TUNED:
            given = tune(model, code, tokenizer=tokenizer)
        if name == CALIBRATED:
            given = calibrate(model, code, tokenizer=tokenizer, budget=BUDGET).format
        systems[name] = paged(model, name, given, memory=memory, backend=backend)
    if peers:
        systems[PEER] = dynamic(model)
        for name in PEERS:
            made = peer(model, name)
            if isinstance(made, str):
                left_out[name] = made
            else:
                systems[name] = made
    return systems, left_out


def measure(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """All of one model."""
    model, tokenizer = models.load(name, torch.float32)
    ids = tokenizer(measures.text_of_topics(), verbose=False)["input_ids"]
    prefill, scored = (128, 64) if chosen.quick else (measures.PREFILL, measures.SCORED)
    most = max(1, 2 * 49_152 // model.config.vocab_size)  # logits of a window are 50 or 270 MB
    systems, left_out = open_systems(
        model,
        tokenizer,
        chosen.formats,
        peers=chosen.peers,
        memory=chosen.memory,
        backend=chosen.backend,
    )
    rows = measures.windows(ids, chosen.windows, prefill + scored + 1)
    print(f"\n{name}: {len(rows)} windows of {prefill} + {scored} tokens", file=sys.stderr)
    begun = common.clock()

    def said(line: str) -> None:
        print(f"  {line}, {common.clock() - begun:.0f} s so far", file=sys.stderr, flush=True)

    try:
        found = measure_windows(model, systems, rows, prefill, most, said)
        said(f"{len(rows)} windows done")
        document: dict[str, Any] = {"windows": len(rows), "left_out": left_out, "systems": {}}
        for each, system in systems.items():
            exact = found[PEER if each in PEERS else OWN]
            entry = {**measures.summarise(exact, found[each]), "bits": system.bits()}
            document["systems"][each] = entry
        if "needles" in chosen.parts:
            size, count = (160, 1) if chosen.quick else (1_400, 15)
            prompts = measures.needles(tokenizer, ids, tokens=size, count=chosen.needles or count)
            document["needles"] = measure_needles(model, tokenizer, systems, prompts, 5)
            said(f"{len(prompts)} needles done")
        if "replies" in chosen.parts:
            start, new = (64, 10) if chosen.quick else (DIVERGES_AFTER, 500)
            begins = measures.windows(ids, 1 if chosen.quick else 4, start)
            document["divergence"] = measure_divergence(model, systems, begins, new)
            said("replies done")
    finally:
        for system in systems.values():
            system.close()
    document["seconds"] = round(common.clock() - begun)
    return document


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help=f"of {FORMATS} {FURTHER_FORMATS}"
    )
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--parts", default=",".join(PARTS), help="beside windows: of " + str(PARTS))
    parser.add_argument("--needles", type=int, default=0, help="prompts; 0: as many as usual")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--backend", choices=("cpu", "reference"), help="of our caches")
    parser.add_argument("--memory", type=int, default=1 << 30, help="bytes of each of our pools")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="results folder")
    chosen = parser.parse_args(arguments)
    named, chosen.formats = chosen.models.split(","), chosen.formats.split(",")
    chosen.parts = [part for part in chosen.parts.split(",") if part]
    for kind, given, known in (
        ("model", named, MODELS), ("format", chosen.formats, (*FORMATS, *FURTHER_FORMATS)),
        ("part", chosen.parts, PARTS),
    ):  # fmt: skip
        if unknown := set(given) - set(known):
            parser.error(f"no {kind} is called {', '.join(sorted(unknown))}")
    chosen.formats = [OWN, *(each for each in chosen.formats if each != OWN)]
    chosen.windows = min(chosen.windows, 2) if chosen.quick else chosen.windows
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    where = common.environment()
    print(common.describe(where))
    document: dict[str, Any] = {"benchmark": "quality", "environment": where, "models": {}}
    for name in named:
        document["models"][name] = measure(name, chosen)
    print(report(document["models"]))
    common.publish("quality", document, chosen.out)


if __name__ == "__main__":
    main()
