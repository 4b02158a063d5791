"""Time to first token of a prompt that was computed before, by where its keys and values are.

    cold        computed, in a process that just began
    pool        asked again at once
    lower       asked again when another prompt has driven it out of the pool: from host memory, or
                from the disk where there is no host tier
    restarted   asked again when the process has ended and another has begun over the same folder,
                files read from the disk

    python -m benchmarks.tiers_ttft                                  # 5 rounds, some minutes each
    python -m benchmarks.tiers_ttft --vllm PYTHON --lmcache PYTHON   # and peers, by interpreters
    python -m benchmarks.tiers_ttft --quick                          # tiny: does it run at all

SmolLM2-135M over English text, greedy, one request at a time, in the dtype that benchmarks.prefix
takes; then one round of ours in fp32, in which every reply must be that of the cold run. Each round
has prompts of its own, the same for all systems, and each system an empty folder.

What LMCache's setup needs: lmcache 0.5 in an environment that has vLLM, by `pip install --no-deps`.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, prefix
from benchmarks.systems import load_model
from benchmarks.tiers_common import drop_page_cache, page_bytes, publish_part, read_bandwidth
from benchmarks.tiers_report import report, report_ceiling
from benchmarks.tiers_systems import OURS, SYSTEMS, System, Work, make_systems
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.engine_process import EngineProcess
from kvpaged.bench.systems import failure

CASES = ("cold", "pool", "lower", "restarted")
WARM = 16  # tokens of the first request of a process, which chooses kernels and maps memory


@dataclass(frozen=True, slots=True)
class Setting:
    """Tokens of a prompt, and generated after it."""

    prompt: int = 2000
    new: int = 32

    @property
    def pages(self) -> int:
        """Pages of a pool in which a second prompt leaves next to nothing of the first."""
        return -(-(self.prompt + self.new) // PAGE_SIZE) + 2


QUICK = Setting(prompt=200, new=4)


@dataclass(frozen=True, slots=True)
class Life:
    """One round of one system.

    Attributes:
        answers: for each case what the engine answered.
        start_s: of the second process, from nothing to the end of its first, short request.
        stop_s: of the first process, with what it still had to write.
        about: what the engine said of itself.
        disk_bytes: that the folder held in between.
        total_s: of the round.
    """

    answers: dict[str, dict[str, Any]]
    start_s: float
    stop_s: float
    about: dict[str, Any]
    disk_bytes: int
    total_s: float


@dataclass(frozen=True, slots=True)
class Prompts:
    """Of a round: one that is asked again, one that drives it out, one to begin with."""

    asked: list[int]
    other: list[int]
    warm: list[int]


class Rounds:
    """Prompts of rounds, each with text of its own, made when first asked for."""

    def __init__(self, setting: Setting) -> None:
        self._text = prefix.Text(0)
        self._setting = setting
        self._made: list[Prompts] = []

    def __getitem__(self, number: int) -> Prompts:
        while len(self._made) <= number:
            piece = partial(self._text.pieces, 1)
            sizes = (self._setting.prompt, self._setting.prompt, WARM)
            self._made.append(Prompts(*(piece(size)[0].tolist() for size in sizes)))
        return self._made[number]


def live(system: System, prompts: Prompts, new: int) -> Life:
    """A process, and another one after it, over a new folder."""

    def ask(engine: EngineProcess, prompt: list[int], most: int) -> dict[str, Any]:
        answer: dict[str, Any] = engine.ask([prompt], most)
        return {**answer, "tokens": answer["tokens"][0]}

    begin = common.clock()
    answers = {}
    with tempfile.TemporaryDirectory(prefix="kvpaged-tiers-") as name:
        folder = Path(name)
        with system.running(folder) as engine:
            ask(engine, prompts.warm, 2)
            answers["cold"] = ask(engine, prompts.asked, new)
            answers["pool"] = ask(engine, prompts.asked, new)
            ask(engine, prompts.other, 2)
            if system.lower == "disk":
                drop_page_cache(folder)
            answers["lower"] = ask(engine, prompts.asked, new)
            stopping = common.clock()
        start = common.clock()
        stop_s = start - stopping
        held = drop_page_cache(folder)
        start = common.clock()
        with system.running(folder) as engine:
            ask(engine, prompts.warm, 2)
            start_s = common.clock() - start
            answers["restarted"] = ask(engine, prompts.asked, new)
            about = engine.about
    return Life(answers, start_s, stop_s, about, held, common.clock() - begin)


class Runs:
    """Rounds of systems; one that fails is left out from then on, and said so."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._prompts = Rounds(setting)
        self.failures: list[dict[str, str | None]] = []

    def measure(self, systems: Mapping[str, System], rounds: int) -> dict[str, list[Life]]:
        """For each system that did not fail its rounds, all systems of a round in turn."""
        counts = dict.fromkeys(systems, 0)

        def one(name: str) -> Life | None:
            if any(name == failed["system"] for failed in self.failures):
                return None
            prompts = self._prompts[counts[name]]
            counts[name] += 1
            try:
                return live(systems[name], prompts, self._setting.new)
            except Exception as error:  # whatever it is, the others can still be measured
                if name in OURS:
                    raise
                self.failures.append(failure(name, None, error))
                return None

        def tell(number: int, name: str, life: Life | None) -> None:
            took = "failed" if life is None else f"{life.total_s:8.2f} s"
            print(f"round {number + 1}: {name:<16} {took}", file=sys.stderr)

        runs = common.alternate({name: partial(one, name) for name in systems}, rounds, done=tell)
        return {
            name: whole
            for name, lives in runs.items()
            if len(whole := [life for life in lives if life is not None]) == rounds
        }


# -- the document ----------------------------------------------------------------------------------


def ceiling(setting: Setting, work: Work, folder: Path, *, repeat: int) -> dict[str, float]:
    """What no cache can beat: bytes at the speed of memory and disk, then the matrix products of
    the tokens that are not in full pages.
    """
    pages = (setting.prompt - 1) // PAGE_SIZE
    size = pages * work.page_bytes
    model = load_model(work.dtype)
    timed = partial(prefix.products, model, repeat=repeat)
    rest = timed(setting.prompt - pages * PAGE_SIZE, 1)
    memory = common.copy_bandwidth() / 2  # bytes copied, each read and written
    disk = read_bandwidth(folder, megabytes=max(1, size >> 20), repeat=repeat)
    return {
        "kv_bytes": size,
        "copy_bytes_s": memory,
        **disk,
        "cold_s": timed(setting.prompt, 1),
        "pool_s": rest,
        "host_s": size / memory + rest,
        "disk_s": size / disk["disk_bytes_s"] + rest,
    }


def system_document(lives: Sequence[Life], system: System) -> dict[str, Any]:
    """Times of one system, and whether its replies are those of its cold runs."""
    firsts = {case: [life.answers[case]["first_s"] for life in lives] for case in CASES}
    cases: dict[str, Any] = {}
    for case in CASES:
        same = [life.answers[case]["tokens"] == life.answers["cold"]["tokens"] for life in lives]
        cases[case] = {
            "first_s": common.summary(firsts[case]),
            "of_cold": common.paired_ratio(firsts[case], firsts["cold"]),
            "cached_tokens": lives[-1].answers[case]["cached"],
            "replies_as_cold": sum(same),
        }
    return {
        "lower": system.lower,
        "cases": cases,
        "start_s": common.summary([life.start_s for life in lives]),
        "stop_s": common.summary([life.stop_s for life in lives]),
        "whole_start_s": common.summary(
            [life.start_s + life.answers["restarted"]["first_s"] for life in lives]
        ),
        "disk_bytes": lives[-1].disk_bytes,
        "about": lives[-1].about,
    }


def over_peers(runs: Mapping[str, Sequence[Life]]) -> dict[str, Any]:
    """How many times our time to first token the peers' is, in the same case."""

    def firsts(name: str, case: str) -> list[float]:
        return [life.answers[case]["first_s"] for life in runs[name]]

    return {
        ours: {
            peer: {
                case: common.paired_ratio(firsts(peer, case), firsts(ours, case)) for case in CASES
            }
            for peer in runs
            if peer not in OURS
        }
        for ours in runs
        if ours in OURS
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, end with one JSON document."""
    chosen = parse(arguments)
    setting = QUICK if chosen.quick else Setting()
    rounds = chosen.rounds or (1 if chosen.quick else 5)
    where = common.environment()
    print(common.describe(where))

    def work(dtype: torch.dtype) -> Work:
        return Work(
            dtype=dtype, length=setting.prompt + setting.new, pages=setting.pages,
            page_bytes=page_bytes(dtype), compiled=chosen.compile,
        )  # fmt: skip

    def made(dtype: torch.dtype, names: list[str]) -> dict[str, System]:
        return make_systems(names, work(dtype), vllm=chosen.vllm, lmcache=chosen.lmcache)

    dtype = getattr(torch, chosen.dtype)
    with tempfile.TemporaryDirectory(prefix="kvpaged-tiers-") as folder:
        limits = ceiling(setting, work(dtype), Path(folder), repeat=1 if chosen.quick else 5)
    print(report_ceiling(limits), flush=True)
    systems = made(dtype, chosen.systems)
    measuring = Runs(setting)
    runs = measuring.measure(systems, rounds)
    exact = {name: runs[name] for name in runs if name in OURS}
    ours = [name for name in chosen.systems if name in OURS]
    if ours and dtype != torch.float32:
        exact = Runs(setting).measure(made(torch.float32, ours), 1)
    document = {
        "environment": where,
        "model": "SmolLM2-135M-Instruct",
        "dtype": chosen.dtype,
        "compiled": chosen.compile,
        "rounds": rounds,
        "page_size": PAGE_SIZE,
        "setting": {**asdict(setting), "pages": setting.pages},
        "ceiling": limits,
        "systems": {name: system_document(runs[name], systems[name]) for name in runs},
        "exact_fp32": {name: same_replies(lives) for name, lives in exact.items()},
        "over": over_peers(runs),
        "left_out": [name for name in SYSTEMS if name not in systems],
        "failures": measuring.failures,
    }
    print(report(document))
    publish_part("first_token", document, chosen.out)


def same_replies(lives: Sequence[Life]) -> dict[str, bool]:
    """For each case whether all replies are those of the cold runs."""
    return {
        case: all(life.answers[case]["tokens"] == life.answers["cold"]["tokens"] for life in lives)
        for case in CASES
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiers_ttft")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16" if fast else "float32",
        help="%(default)s on this machine",
    )
    parser.add_argument("--vllm", type=Path, help="a Python interpreter that has vLLM")
    parser.add_argument("--lmcache", type=Path, help="one that has vLLM and LMCache")
    parser.add_argument("--compile", action="store_true", help="Generator's and vLLM's models")
    parser.add_argument(
        "--systems",
        type=lambda names: names.split(","),
        default=list(SYSTEMS),
        help="some of " + ",".join(SYSTEMS),
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.systems) - set(SYSTEMS):
        parser.error(f"no such systems: {', '.join(sorted(unknown))}")
    return chosen


if __name__ == "__main__":
    main()
