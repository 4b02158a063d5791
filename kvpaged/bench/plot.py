"""The picture of a serving document: a panel for each work, in it a row for each system.

    system | bar: tokens/s, from 0 | tokens/s   kvpaged over it   goal

A bar is the median of the rounds, with the least and the greatest. A dotted line goes through all
rows at the better of kvpaged's; a mark in another system's row is where that line has to be, or
right of it, for the goal over that system.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpaged.bench import common
from kvpaged.bench.serving import best_of_ours, measured
from kvpaged.bench.systems import OURS, SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the palette of Okabe and Ito, which colour-blind people can tell apart.
COLORS = {
    "kvpaged": "#56b4e9",
    "compiled": "#0072b2",
    "generate": "#999999",
    "continuous": "#cc79a7",
    "vllm": "#e69f00",
}
MET, MISSED, QUIET = "#0072b2", "#d55e00", "#666666"

# Inches: names and bars of a cell, its columns of text by where they end, and around them.
NAMES, BARS, CELL, ROW, HEAD, TITLE, MARGIN = 1.8, 2.9, 7.8, 0.27, 0.62, 0.5, 0.2
COLUMNS = {"tokens/s": 0.75, "kvpaged over it": 1.85, "goal": 2.8}


def draw(document: Mapping[str, Any], file: Path) -> None:
    """Write the picture of `document`, in which a work was measured, as a PNG to `file`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    works: Mapping[str, Any] = document["works"]
    failures: Sequence[Mapping[str, Any]] = document.get("failures", ())
    shown = {*measured(document), *(failure["system"] for failure in failures)}
    names = [name for name in SYSTEMS if name in shown]
    across = min(len(works), 2)
    cell = HEAD + ROW * len(names)
    # Where the number of works is odd, the explanation stands in the last cell, else below.
    odd = len(works) % 2 == 1 and across == 2
    width = MARGIN + across * CELL
    height = TITLE + -(-len(works) // across) * cell + MARGIN + (0 if odd else HEAD + MARGIN)
    figure = plt.figure(figsize=(width, height))
    for number, (work, entry) in enumerate(works.items()):
        left = MARGIN + number % across * CELL + NAMES
        bottom = height - TITLE - (number // across + 1) * cell
        place = [left / width, bottom / height, BARS / width, ROW * len(names) / height]
        axis = figure.add_axes((place[0], place[1], place[2], place[3]))
        missing = {name: _why_missing(name, work, failures) for name in names if name not in entry}
        panel(axis, work, entry, names, missing)
    _title(figure, document, width, height)
    x = (MARGIN + CELL if odd else MARGIN) / width
    y = (cell - HEAD + MARGIN if odd else HEAD + MARGIN) / height
    _explain(figure, x, y, goals=any(entry.get("goals") for entry in works.values()))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def panel(
    axis: "Axes",
    work: str,
    entry: Mapping[str, Any],
    names: Sequence[str],
    missing: Mapping[str, str],
) -> None:
    """One work: a row for each of `names`, in which `missing` says why there is no bar."""
    best = best_of_ours(entry)
    over = {n: ratio for n, ratio in entry[best]["over"].items() if n not in OURS} if best else {}
    goals = {name: goal for name, goal in entry.get("goals", {}).items() if name in over}
    for row, name in enumerate(names):
        if name in missing:
            axis.text(0, row, f" {missing[name]}", va="center", color=QUIET, style="italic")
            continue
        rate = entry[name]["tokens_per_s"]
        axis.barh(row, rate["median"], 0.72, color=COLORS[name])
        axis.hlines(row, rate["min"], rate["max"], color="#222222", linewidth=1.2)
        _cell(axis, row, "tokens/s", f"{rate['median']:,.1f}")
        if name in over:
            goal = goals.get(name)
            color = "black" if goal is None else MET if over[name] >= goal else MISSED
            _cell(axis, row, "kvpaged over it", f"{over[name]:.2f}x", color=color, weight="bold")
            if goal is not None:
                word = "met" if over[name] >= goal else "missed"
                _cell(axis, row, "goal", f"{goal:g}x {word}", color=color)
                at = goal * rate["median"]
                axis.vlines(at, row - 0.46, row + 0.46, color="black", linewidth=2.4)
    if best:
        line = entry[best]["tokens_per_s"]["median"]
        axis.axvline(line, color=MET, linestyle=":", linewidth=1.4)
    _frame(axis, work, entry, names)


def _frame(axis: "Axes", work: str, entry: Mapping[str, Any], names: Sequence[str]) -> None:
    """Names of rows, the head, and nothing else."""
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, axis.get_xlim()[1])
    axis.set_yticks(range(len(names)), [SYSTEMS[name] for name in names])
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name in OURS else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    count = "1 request" if entry["requests"] == 1 else f"{entry['requests']:,} requests"
    said = f"{work}: {count}, {entry['generated']:,} new tokens"
    axis.annotate(
        said, (0, 1), (-NAMES * 72, 6), "axes fraction", textcoords="offset points", weight="bold"
    )
    for column in COLUMNS if entry.get("goals") else [c for c in COLUMNS if c != "goal"]:
        _cell(axis, -0.81, column, column, color=QUIET, size=9, va="baseline")


def _cell(axis: "Axes", row: float, column: str, text: str, **style: Any) -> None:
    """Text that ends where the column does, right of the bars."""
    x = 1 + COLUMNS[column] / BARS
    where = axis.get_yaxis_transform()
    axis.text(x, row, text, transform=where, **{"ha": "right", "va": "center", **style})


def _why_missing(name: str, work: str, failures: Sequence[Mapping[str, Any]]) -> str:
    failed = any(f["system"] == name and f["work"] in (None, work) for f in failures)
    return "failed" if failed else "not run"


def _title(figure: "Figure", document: Mapping[str, Any], width: float, height: float) -> None:
    """What was run, and on what."""
    vllm = document.get("about", {}).get("vllm")
    versions = common.describe(document["environment"]) + (f"; vLLM {vllm['vllm']}" if vllm else "")
    model = document.get("model", "SmolLM2-135M-Instruct")
    title = f"Requests served together: {model}, {document['dtype']}, greedy"
    title += " (tiny: no measurement)" if document.get("quick") else ""
    x = MARGIN / width
    figure.text(x, 1 - 0.18 / height, title, va="top", size=13, weight="bold")
    figure.text(x, 1 - 0.45 / height, versions, va="top", size=9, color=QUIET)


def _explain(figure: "Figure", x: float, y: float, *, goals: bool) -> None:
    lines = [
        "bar: tokens/s from 0, to each panel's own scale; median, least and greatest of rounds",
        "dotted line: the better of kvpaged's; over others: of that one, median of paired rounds",
    ]
    if goals:
        lines.append("black mark: where the dotted line has to be, or right of it, for the goal")
    figure.text(x, y, "\n".join(lines), va="top", size=9, color=QUIET, linespacing=1.5)
