"""`kvpaged bench`: it runs tiny, draws its document, and says in one line what is wrong."""

import json
import sys
import tomllib
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from benchmarks import common as tree
from benchmarks import serving as door
from kvpaged import cli
from kvpaged.bench import command, common, plot, serving, systems, vllm_engine
from kvpaged.bench.works import GOALS, Served, Work
from kvpaged.testing import models

ROOT = Path(__file__).resolve().parents[1]


def work(name: str = "batch 2", rounds: int = 3) -> Work:
    return Work(name, [[1], [2]], [4, 4], 2, rounds, GOALS[name.split(maxsplit=1)[0]])


def takes(*seconds: float):
    """A system that takes these seconds, one a call, for the same tokens."""
    left = list(seconds)
    return lambda _: Served(left.pop(0), 0.5, [[1], [2]])


def breaks(_: Work) -> Served:
    raise ValueError("out of order")


def document(*names: str) -> dict:
    """Made by hand: every system served, but that vLLM failed at the last work."""
    failures: serving.Failures = [{"system": "vllm", "work": names[-1], "error": "E: gone"}]
    made = {}
    for name in names:
        runs = {system: takes(n + 1) for n, system in enumerate(systems.SYSTEMS)}
        if name == names[-1]:
            runs["vllm"] = breaks
        made[name] = serving.measure(runs, work(name, rounds=1), [])
    return {
        "benchmark": "serving",
        "environment": common.environment(),
        "dtype": "float32",
        "works": made,
        "failures": failures,
        "left_out": [],
    }


def test_it_runs_tiny_and_ends_with_its_document(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--quick", "--systems", "kvpaged", "generate"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "kvpaged-bench"
    assert sorted(file.name for file in folder.iterdir()) == ["serving.json", "serving.png"]
    assert found == json.loads((folder / "serving.json").read_text())
    assert list(found["works"]) == ["batch 1", "batch 3", "spread", "shared"]
    assert found["failures"] == []
    for entry in found["works"].values():
        assert set(entry["kvpaged"]["over"]) == {"generate"}
        for system in ("kvpaged", "generate"):
            rate = entry[system]["tokens_per_s"]["median"]
            # A first token comes before the last, also of generate(), which streams.
            assert 0 < entry[system]["first_s"]["median"] < entry["generated"] / rate
        if found["dtype"] == "float32":
            assert entry["kvpaged"]["same_tokens_as_generate"] == 1


def test_ratios_are_the_median_over_rounds_of_pairs():
    runs = {"kvpaged": takes(2, 4, 1), "vllm": takes(4, 4, 3)}
    failures: serving.Failures = []
    entry = serving.measure(runs, work(), failures)
    assert failures == []
    assert entry["kvpaged"]["over"] == {"vllm": 2.0}
    assert entry["kvpaged"]["tokens_per_s"] == {"median": 4.0, "min": 2.0, "max": 8.0}
    assert entry["kvpaged"]["same_tokens_as_generate"] is None
    assert entry["goals"] == {"generate": 1.4, "vllm": 1.0}


def test_a_system_that_fails_is_reported_and_the_others_are_measured(capsys):
    calls = []

    def fails_late(asked: Work) -> Served:
        calls.append(asked)
        return breaks(asked) if len(calls) == 2 else takes(1)(asked)

    runs = {"kvpaged": takes(1, 1, 1), "generate": fails_late}
    failures: serving.Failures = []
    entry = serving.measure(runs, work(), failures)
    assert failures == [
        {"system": "generate", "work": "batch 2", "error": "ValueError: out of order"}
    ]
    assert len(calls) == 2
    assert "generate" not in entry
    assert entry["kvpaged"]["over"] == {}
    assert "batch 2, round 2 of 3: generate failed" in capsys.readouterr().out


def test_tables_have_ratios_goals_first_tokens_and_failures():
    text = serving.report({**document("batch 8", "shared"), "left_out": ["vllm"]})
    assert "3.00x, goal 1.4x" in text
    assert "5.00x, goal 1x" in text
    assert "first token, s" in text
    assert "failed: vLLM, shared: E: gone" in text
    assert "not run: vLLM (no interpreter)" in text


@pytest.mark.parametrize(
    "names", [("spread",), ("batch 8", "shared"), ("batch 1", "batch 8", "spread")]
)
def test_a_plot_is_drawn_from_a_document(tmp_path, capsys, names):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(document(*names)))
    assert door.main(["--plot", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "mine.png")
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["mine.json", "mine.png"]


def test_a_panel_says_what_is_missing_and_whether_goals_are_met():
    from matplotlib.figure import Figure

    entry = serving.measure({"kvpaged": takes(4), "generate": takes(6), "vllm": takes(2)},
                            work(rounds=1), [])  # fmt: skip
    axis = Figure().subplots()
    missing = {"compiled": "failed", "continuous": "not run"}
    plot.panel(axis, "batch 2", entry, list(systems.SYSTEMS), missing)
    texts = [text.get_text().strip() for text in axis.texts]
    assert {"1.50x", "1.4x met", "0.50x", "1x missed", "failed", "not run"} <= set(texts)


def test_results_of_the_door_go_into_the_tree(monkeypatch):
    seen: list = []

    def serve(names: list[str], works: list[str], **settings: object) -> dict:
        seen.append(settings)
        return document("spread")

    monkeypatch.setattr(command, "serve", serve)
    monkeypatch.setattr(plot, "draw", lambda made, file: seen.append(file))
    monkeypatch.setattr(common, "publish", lambda name, made, folder: seen.append((name, folder)))
    assert door.main(["--works", "spread", "--dtype", "bfloat16"]) == 0
    wanted = {"vllm": None, "rounds": 3, "quick": False, "dtype": torch.bfloat16}
    assert seen[0] == wanted
    assert seen[1:] == [tree.RESULTS / "serving.png", ("serving", tree.RESULTS)]


@pytest.mark.parametrize("failed", [("kvpaged", 1), ("generate", 0)])
def test_only_a_failure_of_ours_is_a_failure(tmp_path, monkeypatch, capsys, failed):
    made = document("spread")
    made["failures"] = [{"system": failed[0], "work": None, "error": "E: gone"}]
    monkeypatch.setattr(command, "serve", lambda *a, **k: made)
    assert cli.main(["bench", "--out", str(tmp_path)]) == failed[1]


def test_where_nothing_ran_there_is_no_plot(tmp_path, monkeypatch, capsys):
    made = {**document("spread"), "works": {}}
    monkeypatch.setattr(command, "serve", lambda *a, **k: made)
    assert cli.main(["bench", "--out", str(tmp_path)]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["serving.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--systems", "sglang"], "argument --systems: invalid choice: 'sglang'"),
        (["--works", "long"], "argument --works: invalid choice: 'long'"),
        (["--vllm", "/no/such/python"], "nothing that can be executed is at /no/such/python"),
        (["--systems", "vllm"], "vllm needs --vllm PYTHON"),
        (["--rounds", "0"], "argument --rounds: 0 is less than 1"),
    ],
)
def test_arguments_that_make_no_sense_are_named(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--plot", "serving.json"]])
def test_a_missing_extra_is_one_line(monkeypatch, capsys, arguments):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", *arguments]) == 1
    said = capsys.readouterr().err
    assert said == "kvpaged bench: needs matplotlib: pip install 'kvpaged[hf,bench]'\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ('{"benchmark": "prefix"}', "is no document of this benchmark"),
        ('{"benchmark": "serving", "works": {}}', "has no work that was measured"),
    ],
)
def test_a_file_that_is_no_document_is_one_line(tmp_path, capsys, content, said):
    file = tmp_path / "other.json"
    if content is not None:
        file.write_text(content)
    assert cli.main(["bench", "--plot", str(file)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert said in errors[0]


def interpreter(folder: Path, modules: dict[str, str]) -> Path:
    """A Python that has these modules."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


FAKE_VLLM = '''
from types import SimpleNamespace as Of
import common  # not the one beside the runner
print("a line of log")
__version__ = "9.9"

def SamplingParams(max_tokens, **rest):
    return max_tokens

class LLM:
    """Each request answers with its own first token, as often as asked."""
    def __init__(self, **settings):
        cache = Of(block_size=settings["block_size"])
        self.llm_engine, self.waiting = self, {}
        self.vllm_config = Of(cache_config=cache)
    def reset_prefix_cache(self):
        return True
    def add_request(self, name, prompt, new):
        if prompt["prompt_token_ids"] == [13]:
            raise RuntimeError("thirteen")
        self.waiting[name] = [prompt["prompt_token_ids"][0]] * new
    def has_unfinished_requests(self):
        return bool(self.waiting)
    def step(self):
        done, self.waiting = self.waiting, {}
        return [Of(request_id=name, finished=True, num_cached_tokens=0,
                   outputs=[Of(token_ids=ids)]) for name, ids in done.items()]
'''


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr(models, "path", Path)


def test_vllm_is_run_by_path_in_its_own_interpreter(tmp_path, no_model):
    fakes = {"vllm": FAKE_VLLM, "torch": "__version__ = '8'", "common": ""}
    engine = vllm_engine.VLLMEngine(interpreter(tmp_path, fakes), torch.bfloat16, rows=2, length=64)
    assert engine.about == {"vllm": "9.9", "torch": "8", "block_size": common.PAGE_SIZE}
    assert engine.ask([[5, 6], [7]], [2, 3])["tokens"] == [[5, 5], [7, 7, 7]]
    for _ in range(2):  # it ends at the first, and is found gone at the second
        with pytest.raises(RuntimeError, match="exit status 1: RuntimeError: thirteen"):
            engine.ask([[13]], 1)
    engine.close()


def test_vllm_that_cannot_start_is_in_nobodys_way(tmp_path, no_model, monkeypatch):
    model = object()
    monkeypatch.setattr(models, "load", lambda name, dtype: (model, None))
    with ExitStack() as stack:
        opened = systems.open_systems(
            ["vllm", "generate"], stack, torch.float32, interpreter(tmp_path, {})
        )
    assert list(opened.runs) == ["generate"]
    (failure,) = opened.failures
    assert (failure["system"], failure["work"]) == ("vllm", None)
    assert str(failure["error"]).endswith("ModuleNotFoundError: No module named 'vllm'")


def test_the_wheel_has_the_command_and_what_it_runs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"kvpaged": "kvpaged.cli:main"}
    assert "kvpaged" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert (ROOT / "kvpaged" / "bench" / "vllm_runner.py").is_file()
    extras = project["project"]["optional-dependencies"]
    assert {"hf", "bench"} <= set(extras)
    assert not any("matplotlib" in each for each in project["project"]["dependencies"])


def test_an_installed_copy_has_a_version_instead_of_a_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    where = common.environment()
    assert where["commit"] == "unknown"
    assert f"kvpaged {where['kvpaged']}" in common.describe(where)
