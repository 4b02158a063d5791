"""The tables of benchmarks.tiers_ttft, from its document."""

from collections.abc import Mapping
from typing import Any

from benchmarks import common
from benchmarks.tiers_systems import OURS, SYSTEMS

GOALS = {"host": 0.12, "restarted": 0.2}
"""Of the time to first token of a cold prompt: found in host memory, found after a restart."""


def report_ceiling(limits: Mapping[str, float]) -> str:
    """What is printed first."""
    ms = {name: f"{limits[f'{name}_s'] * 1e3:.0f}" for name in ("cold", "pool", "host", "disk")}
    memory, disk, cached = (
        f"{limits[f'{name}_bytes_s'] / 1e9:.1f}" for name in ("copy", "disk", "page_cache")
    )
    return (
        f"ceiling: {limits['kv_bytes'] / 1e6:.1f} MB of K and V at {memory} GB/s of memory, {disk} "
        f"of disk ({cached} from the page cache), then torch's matrix products: first token "
        f"{ms['cold']} ms cold, {ms['pool']} from the pool, {ms['host']} from host memory, "
        f"{ms['disk']} from disk"
    )


def report(document: Mapping[str, Any]) -> str:
    """All tables."""
    parts = [_times(document), _peers(document), "\n".join(_verdicts(document))]
    parts += [
        f"failed: {SYSTEMS[each['system']]}: {each['error']}" for each in document["failures"]
    ]
    left_out = ", ".join(SYSTEMS[name] for name in document["left_out"])
    if left_out:
        parts.append(f"not run: {left_out}")
    return "\n\n".join(part for part in parts if part)


def _times(document: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in document["systems"].items():
        row = [SYSTEMS[name]]
        for case, figures in entry["cases"].items():
            text = f"{figures['first_s']['median'] * 1e3:.0f}"
            row.append(text if case == "cold" else f"{text} ({figures['of_cold']:.3f}x)")
        start, whole = entry["start_s"]["median"], entry["whole_start_s"]["median"]
        row += [f"{start:.1f}", f"{whole:.1f}"]
        row.append(str(entry["cases"]["restarted"]["cached_tokens"]))
        rows.append(row)
    setting = document["setting"]
    head = [f"first token, {setting['prompt']} tokens, ms (of cold)"]
    return common.table(
        [*head, "cold", "pool", "lower", "restarted", "start s", "to token s", "found"], rows
    )


def _peers(document: Mapping[str, Any]) -> str:
    rows = [
        [f"{SYSTEMS[peer]} over {SYSTEMS[ours]}", *(f"{ratio:.2f}x" for ratio in cases.values())]
        for ours, peers in document["over"].items()
        for peer, cases in peers.items()
    ]
    return common.table(["their time over ours", *_cases(document)], rows) if rows else ""


def _cases(document: Mapping[str, Any]) -> list[str]:
    return list(next(iter(document["systems"].values()))["cases"])


def _verdicts(document: Mapping[str, Any]) -> list[str]:
    """Goals held or missed, and replies that are not those of cold runs."""
    lines = []
    for name, entry in document["systems"].items():
        if name not in OURS or entry["lower"] is None:
            continue
        named = {
            "restarted": "restarted",
            **({"host": "lower"} if entry["lower"] == "host" else {}),
        }
        for goal, case in sorted(named.items()):
            ratio = entry["cases"][case]["of_cold"]
            held = "held" if ratio <= GOALS[goal] else "MISSED"
            lines.append(f"goal of {GOALS[goal]}x, {goal}, {SYSTEMS[name]}: {held}, {ratio:.3f}x")
    for name, cases in document["exact_fp32"].items():
        wrong = [case for case, same in cases.items() if not same]
        text = "OTHER THAN COLD: " + ", ".join(wrong) if wrong else "as the cold run's in all cases"
        lines.append(f"replies in fp32, {SYSTEMS[name]}: {text}")
    return lines
