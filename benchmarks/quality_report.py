"""What `benchmarks.quality` found, for people."""

from collections.abc import Mapping
from typing import Any

from benchmarks import common


def report(found: Mapping[str, Any]) -> str:
    """Tables of all models."""
    return "\n\n".join(of_model(name, each) for name, each in found.items())


def of_model(name: str, found: Mapping[str, Any]) -> str:
    """The table of one model, and what is not in it."""
    needles, replies = found["needles"], found["divergence"]
    heads = [
        name, "bits", "at 1500", "at 8000", "perplexity", "change %", "1000 KL a token",
        "top-1 as exact", "needles", "as exact", f"{replies['new_tokens']} greedy tokens differ at",
    ]  # fmt: skip
    lines = []
    for system, entry in found["systems"].items():
        bits = entry["bits"]
        needle = needles[system]
        change = _with_error(entry["change_percent"], entry["change_error"], 2)
        lines.append([
            system, f"{bits['page']:.2f}", *(_bits(bits, f"{n} tokens") for n in (1500, 8000)),
            f"{entry['perplexity']:.4f}", change,
            _with_error(1e3 * entry["kl"], 1e3 * entry["kl_error"], 3),
            f"{100 * entry['agree']:.1f} %", f"{needle['hits']}/{needles['prompts']}",
            f"{needle['as_exact']}/{needles['prompts']}",
            ", ".join("-" if at is None else str(at) for at in replies[system]),
        ])  # fmt: skip
    notes = [
        f"{found['windows']} windows, +- the standard error over them; needles in "
        f"{needles['tokens']} tokens; bits as of a 16-bit model, all in: a full page (of peers: "
        "what is quantised), a whole sequence",
    ]
    for system, entry in found["systems"].items():
        bits = entry["bits"]
        if "exact tokens" in bits:
            added = bits["1280 tokens"] - bits["page"]
            notes.append(
                f"{system}: {bits['exact tokens']:g} exact tokens at its end on average, "
                f"{added:.2f} bits at 1,280; its prompt is attended to exactly"
            )
    notes += [f"{system}: not measured: {why}" for system, why in found["left_out"].items()]
    return "\n".join([common.table(heads, lines), *notes])


def _bits(bits: Mapping[str, float], which: str) -> str:
    return f"{bits[which]:.2f}" if which in bits else ""


def _with_error(value: float, error: float, digits: int) -> str:
    return f"{value:+.{digits}f} +-{error:.{digits}f}"
