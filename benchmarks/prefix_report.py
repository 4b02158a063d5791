"""The tables of benchmarks.prefix, from its document."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.prefix_systems import SYSTEMS

FIRST_TOKEN_GOAL = 0.1  # of the time to first token with an empty cache


def report_ceiling(limits: Mapping[str, float]) -> str:
    """What is printed first."""
    return (
        "ceiling, torch's matrix products alone: first token "
        f"{limits['cold_s'] * 1e3:.0f} ms cold, {limits['warm_s'] * 1e3:.0f} ms warm "
        f"({limits['warm_s'] / limits['cold_s']:.3f}x); shared batch {limits['shared_s']:.2f} s, "
        f"{limits['shared_tokens_s']:.0f} tokens/s; turn of a chat {limits['turn_s'] * 1e3:.0f} ms"
    )


def report(document: Mapping[str, Any]) -> str:
    """All tables."""
    parts = [_first(document), _shared(document), _chat(document)]
    left_out = ", ".join(SYSTEMS[name] for name in document["left_out"])
    if left_out:
        hint = " (vLLM runs with --vllm)" if "vllm" in document["left_out"] else ""
        parts.append(f"not run: {left_out}{hint}")
    return "\n\n".join(parts)


def _title(case: str) -> str:
    name, _, how = case.partition(" ")
    return f"{SYSTEMS[name]}, {how}" if how else SYSTEMS[name]


def _ms(figures: Mapping[str, float] | None) -> str:
    return "" if figures is None else f"{figures['median'] * 1e3:.0f}"


def _first(document: Mapping[str, Any]) -> str:
    setting, times = document["setting"], document["first_token"]
    rows = []
    for name, figures in times.items():
        ratio = figures.get("warm_of_cold")
        rows.append(
            [
                SYSTEMS[name],
                _ms(figures["cold_s"]),
                _ms(figures.get("warm_s")),
                "" if ratio is None else f"{ratio:.3f}x",
                "" if ratio is None else _number(figures["computed_warm"]),
            ]
        )
    head = [f"first token, {setting['prefix']} + {setting['rest']}", "cold ms", "warm ms"]
    lines = [common.table([*head, "warm / cold", "computed"], rows)]
    if "paged" in times:
        ratio = times["paged"]["warm_of_cold"]
        held = "held" if ratio <= FIRST_TOKEN_GOAL else "MISSED"
        lines.append(f"goal of {FIRST_TOKEN_GOAL}x for kvpaged: {held}, {ratio:.3f}x")
    return "\n".join(lines)


def _shared(document: Mapping[str, Any]) -> str:
    setting, part = document["setting"], document["shared"]
    rows = []
    for case, figures in part["cases"].items():
        over = figures.get("paged_over")
        same = figures.get("rows_as_dynamic")
        rows.append(
            [
                _title(case),
                f"{figures['total_s']['median']:.2f}",
                _seconds(figures.get("prefix_s")),
                _seconds(figures.get("batch_s")),
                f"{figures['tokens_s']['median']:.1f}",
                f"{figures['of_ceiling']:.0%}",
                "" if over is None else f"{over:.2f}x",
                _number(figures["computed_tokens"]),
                "" if same is None else f"{same} of {setting['rows']}",
                "" if figures["kv_bytes"] is None else f"{figures['kv_bytes'] / 1e6:.1f}",
            ]
        )
    head = f"{setting['rows']} x ({setting['prefix']} + {setting['rest']}) + {setting['new']}"
    columns = ["total s", "prefix s", "batch s", "tokens/s", "of ceiling", "ours", "computed"]
    table = common.table([head, *columns, "same rows", "KV MB"], rows)
    return (
        f"{table}\nours: how many times sooner kvpaged is done from an empty cache, median of "
        "paired rounds; same rows: all tokens as DynamicCache's\n"
        f"KV needed: {part['kv_bytes_dense'] / 1e6:.1f} MB dense, "
        f"{part['kv_bytes_shared'] / 1e6:.1f} MB with the prefix once"
    )


def _chat(document: Mapping[str, Any]) -> str:
    setting = document["setting"]
    rows = []
    for name, figures in document["chat"].items():
        times = [_ms(turn) for turn in figures["first_token_s"]]
        rows.append([SYSTEMS[name], *times, f"{figures['total_s']['median']:.2f}"])
        rows.append(["  tokens computed", *map(_number, figures["computed_tokens"]), ""])
        if over := figures.get("paged_over_first_token"):
            rows.append(["  kvpaged sooner", *(f"{ratio:.2f}x" for ratio in over), ""])
    turns = [f"turn {turn + 1}" for turn in range(setting["turns"])]
    head = f"chat, {setting['user']} + {setting['reply']} a turn; first token, ms"
    return common.table([head, *turns, "total s"], _dashes(rows))


def _seconds(figures: Mapping[str, float] | None) -> str:
    return "" if figures is None else f"{figures['median']:.2f}"


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _dashes(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows without those in which nothing is known."""
    return [list(row) for row in rows if set(row[1:]) - {"?", ""}]
