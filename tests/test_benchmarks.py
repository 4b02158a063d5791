"""Each benchmark runs, tiny, and ends with a JSON document; the arithmetic they share is right."""

import json
import shutil
import subprocess
import sys
from functools import partial

import pytest

from benchmarks import (
    common,
    cpu_decode,
    cpu_native,
    cpu_sealed,
    generate,
    host,
    prefix,
    store,
    tiers,
)
from benchmarks.store_peers import SYSTEMS as SYSTEMS_ON_DISK
from benchmarks.systems import SYSTEMS


def test_generate_runs_tiny_and_ends_with_its_document(tmp_path):
    command = [sys.executable, "-m", "benchmarks.generate", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        command, check=False, cwd=common.ROOT, capture_output=True, text=True, env=common.tree_env()
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / "generate.json").read_text())
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.index("ceiling") < done.stdout.index("of needed")
    assert [(p["batch"], p["prompt_tokens"]) for p in document["points"]] == [(1, 16), (2, 16)]
    for point in document["points"]:
        assert set(point["systems"]) == set(SYSTEMS)
        assert set(point["paged_over"]) == set(SYSTEMS) - {"paged"}
        assert point["systems"]["dynamic"]["kv_bytes"] == point["kv_bytes_needed"]
        # One page a sequence: 64 slots, 30 layers, K and V, 3 heads of 64 numbers in bf16.
        assert point["systems"]["paged"]["kv_bytes"] == point["batch"] * 64 * 30 * 2 * 3 * 64 * 2


def test_cpu_decode_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    cpu_decode.main(["--quick", "--rounds", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "cpu_decode.json").read_text())
    found = {(row["runs"], row["option"]) for row in document["rows"]}
    options = ("", *cpu_decode.OPTIONS)
    assert found == {(runs, option) for runs in (True, False) for option in options}
    assert "gather_over_ours float32 anywhere" in document["geometric_means"]


@pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")
def test_cpu_native_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    cpu_native.main(["--quick", "--rounds", "1", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "cpu_native.json").read_text())
    assert [row["rows"] for row in document["products"]] == [1, 4] * 2
    assert all(row["over"]["stock"] > 0 for row in document["attention"])


@pytest.mark.skipif(not shutil.which("g++"), reason="native code needs g++")
def test_cpu_sealed_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    cpu_sealed.main(["--quick", "--rounds", "1", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "cpu_sealed.json").read_text())
    assert len(document["cases"]) == 3
    for case in document["cases"]:
        assert all(case["over"][name] > 0 for name in cpu_sealed.FORMS)


def test_prefix_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    ours = "paged,dynamic,copied"
    prefix.main(["--quick", "--systems", ours, "--dtype", "float32", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "prefix.json").read_text())
    assert document["left_out"] == ["continuous", "vllm"]
    assert out.index("ceiling") < out.index("warm / cold") < out.index("not run: HF continuous")
    # Pages of 64: of a prefix of 100 tokens one is full, so 36 + 8 tokens a row are computed.
    assert document["first_token"]["paged"]["computed_warm"] == 44
    cases = document["shared"]["cases"]
    assert {name: case["computed_tokens"] for name, case in cases.items()} == {
        "paged": 88, "dynamic": 216, "copied": 16
    }  # fmt: skip
    assert all(case["tokens_as_dynamic"] == 1.0 for case in cases.values())
    # Three pages for two rows: the shared one once.
    assert cases["paged"]["kv_bytes"] == 3 * 64 * 30 * 2 * 3 * 64 * 4
    assert cases["dynamic"]["kv_bytes"] == document["shared"]["kv_bytes_dense"]
    assert document["chat"]["dynamic"]["computed_tokens"] == [10, 26]
    assert document["chat"]["copied"]["computed_tokens"] == [10, 11]


def test_host_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    host.main(["--quick", "--out", str(tmp_path)])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["allocator"]) == {"1", "1024"}
    assert set(document["step"]) == {"1", "32", "256"}
    assert set(document["prompt"]) == {"64", "16"}
    assert all(
        time > 0
        for part in ("allocator", "step", "prompt")
        for t in document[part].values()
        for time in t.values()
    )


def test_engine_steps_are_measured_without_a_model():
    assert host.engine_times(5, steps=8)["step_us"] > 0


def test_alternate_starts_each_round_with_another_case():
    calls: list[str] = []

    def call(name: str) -> int:
        calls.append(name)
        return len(calls)

    results = common.alternate({name: partial(call, name) for name in "abc"}, 4)
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert results == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_ratios_are_taken_round_by_round():
    # Both twice as slow in the second round: the pairs say 2, medians of either side would too,
    # but not after the third round, where only one of them was disturbed.
    assert common.paired_ratio([2.0, 4.0, 9.0], [1.0, 2.0, 1.0]) == 2.0


def test_a_table_lines_up():
    lines = common.table(["name", "n"], [["a", 1], ["long", 20]]).splitlines()
    assert lines == ["name   n", "----  --", "a      1", "long  20"]


@pytest.mark.parametrize(
    ("point", "tokens"), [(generate.Point(1, 64, 64), 127), (generate.Point(8, 1500, 32), 12248)]
)
def test_the_last_token_needs_no_kv(point, tokens):
    assert point.kv_tokens == tokens


def test_the_environment_names_machine_and_versions():
    where = common.environment()
    assert where["torch"].startswith("2.")
    assert {"cpu", "cores", "commit", "date", "python", "transformers"} <= set(where)
    assert where["commit"] in common.describe(where)


def test_tiers_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    tiers.main(["--quick", "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "tiers_copy.json").read_text())
    phases = ["host put", "host read"]
    phases += [] if document["left_out"] else ["disk put", "disk cold read"]
    assert [row["phase"] for row in document["rows"]] == 2 * phases
    assert all(row["ours_over_ceiling"] > 0 for row in document["rows"])
    assert out.index("ceilings") < out.index("ours/ceiling")
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_store_runs_tiny_and_ends_with_its_document(tmp_path, capsys):
    arguments = ["--quick", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]
    store.main(arguments)
    out = capsys.readouterr().out
    document = json.loads(out.splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "store.json").read_text())
    assert [row["phase"] for row in document["rows"]] == list(store.PHASES)
    assert out.index("ceiling") < out.index("ours/best peer") < out.index("a missing key")
    systems = {name for name in SYSTEMS_ON_DISK if name not in document["left_out"]}
    for row in document["rows"]:
        assert set(row["space"]) == systems <= set(row["gb_per_second"])
        assert set(row["ours_over"]) == set(row["gb_per_second"]) - {"ours", "ours, lossless"}
    # Nothing is left where it was measured.
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
