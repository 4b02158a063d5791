"""The logic of `make gpu`, tiny, under the interpreter: what it writes, what it calls wrong."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import common, gpu, gpu_correctness, gpu_report
from benchmarks.gpu_common import Record, Setting
from benchmarks.gpu_correctness import KERNELS
from benchmarks.gpu_peers import PEERS
from benchmarks.gpu_sealed import SEALED
from kvpaged.formats.kv import NAMED
from kvpaged_kernels.gpu import decode_configs

CPU = torch.device("cpu")
FIELDS = {
    "report": {"copy_gb_s", "matrix_tflop_s"},
    "correctness": {"kernel", "dtype", "head_dim", "page_size", "layout", "options", "error",
                    "bound", "passed", "raised"},
    "tune": {"head_dim", "rows", "page_size", "best", "seconds", "candidates", "refused"},
    "decode": {"kind", "seconds", "over_floor"},
    "prefill": {"batch", "length", "seconds", "of_ceiling", "over_floor", "over_peers",
                "difference", "skipped"},
    "sealed": {"case"},
    "pages": {"case", "seconds", "floor_bytes", "over_floor"},
    "transfer": {"kind", "seconds", "goal"},
    "layout": {"page_size", "pool_bytes", "seconds", "of_ceiling", "page_major_over_layer_major"},
    "end_to_end": {"batch", "prompt_tokens", "new_tokens", "systems", "paged_over"},
    "serving": {"model", "system", "batch", "tokens_s", "first_s", "step_s", "same_tokens",
                "failures", "over", "of_roofline", "step_floor_s", "capture_s", "compile_s"},
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The documents of a quick run of all parts, each of which ran in a process of its own."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(folder)],
        check=False, cwd=common.ROOT, capture_output=True, text=True,
        env={**common.tree_env(), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document["parts"]) == list(gpu.PARTS)
    for name, part in document["parts"].items():
        assert part == {**json.loads((folder / f"{name}.json").read_text()), "ended": part["ended"]}
    return document["parts"]


@pytest.mark.parametrize("name", gpu.PARTS)
def test_each_part_writes_its_rows(parts, name):
    part = parts[name]
    assert part["complete"]
    assert part["left_out"] == 0
    assert part["ended"] == "exit status 0"
    assert {"torch", "triton", "transformers", "kvpaged", "driver", "commit", "multiprocessors"} < (
        set(part["environment"])
    )
    for row in part["rows"]:
        assert set(row) >= FIELDS[name]


def test_every_kernel_was_right_in_both_layouts(parts):
    rows = parts["correctness"]["rows"]
    found = {(row["kernel"], row["layout"]) for row in rows}
    assert found == {(kernel, layout) for kernel in KERNELS for layout in gpu_correctness.LAYOUTS}
    assert all(row["passed"] and row["error"] <= row["bound"] for row in rows)
    assert parts["correctness"]["counts"] == {"passed": len(rows), "failed": 0}


def test_peers_did_the_same_work_and_the_missing_ones_say_why(parts):
    (decode,) = (row for row in parts["decode"]["rows"] if row["kind"] == "grid")
    (prefill,) = parts["prefill"]["rows"]
    for row, names in ((decode, {"paged-16", "paged-64"}), (prefill, {"paged-16"})):
        assert row["difference"]["sdpa"] < 4e-3  # a few roundings of fp16 at 1
        assert row["over_peers"]["paged-16"]["sdpa"] > 0
        assert set(row["seconds"]) | set(row["skipped"]) == names | set(PEERS) | {"vllm", "sglang"}
        assert "CUDA" in row["skipped"]["flex"]
        assert all(each > 0 for each in row["over_floor"].values())
    assert "--vllm" in decode["skipped"]["vllm"]
    assert "decode" in prefill["skipped"]["vllm"]
    assert parts["decode"]["geometric_mean_over"]["paged-16"]["sdpa"] > 0


def test_decode_is_measured_in_all_its_ways(parts):
    kinds = [row["kind"] for row in parts["decode"]["rows"]]
    assert kinds == ["mixed", "queries", "options", "planner", "grid"]


def test_compressed_pages_are_right_and_measured_in_every_format(parts):
    rows = parts["sealed"]["rows"]
    correct = [row for row in rows if row["case"] == "correct"]
    assert [row["format"] for row in correct] == [*SEALED]
    assert all(row["passed"] and row["error"] <= row["bound"] for row in correct)
    for case in ("decode", "prefill"):
        (row,) = (row for row in rows if row["case"] == case)
        assert set(row["over_exact"]) == set(NAMED)
    assert [row["format"] for row in rows if row["case"] == "seal"] == [*SEALED]


def test_transfers_are_measured_in_all_their_ways(parts):
    copies, beside, layerwise = parts["transfer"]["rows"]
    assert [row["kind"] for row in (copies, beside, layerwise)] == ["pieces", "beside", "layerwise"]
    assert set(copies["plain_over"]) == {"out", "in, dma", "in, kernel", "in, chosen"}
    assert all(share > 0 for share in copies["plain_over"].values())
    assert [timed["piece_bytes"] for timed in copies["calibration"]] == [copies["piece_bytes"]]
    assert beside["streaming_over_alone"] > 0
    assert layerwise["seconds"]["transfer"] > 0


def test_tuning_leaves_a_table_that_the_kernel_can_read(parts):
    (row,) = parts["tune"]["rows"]
    assert row["best"] in [
        {k: v for k, v in each.items() if k != "seconds"} for each in row["candidates"]
    ]
    assert not row["refused"]
    # Quick runs leave the tree's own table as it is.
    entries = [decode_configs.Entry(**entry) for entry in parts["tune"]["table"]]
    assert tuple(entries) == tuple(sorted(decode_configs.table()))


def test_generate_had_the_tokens_of_dynamic_cache(parts):
    # fp32 at this size, so rounding makes no difference.
    (row,) = parts["end_to_end"]["rows"]
    assert row["systems"]["paged"]["tokens_as_dynamic"] == 1.0


def test_the_generator_had_the_tokens_of_generate(parts):
    rows = parts["serving"]["rows"]
    ways = ("eager", "no graphs", "no lookahead")
    assert [(row["system"], row["batch"]) for row in rows] == [(w, n) for w in ways for n in (1, 3)]
    for row in rows:
        assert row["same_tokens"][row["system"]] == 1.0
    for row in rows[:2]:
        assert set(row["tokens_s"]) >= {"eager", "generate"}
        assert row["over"]["generate"] > 0


def damaged(name):
    """The kernel `name` with one element of its result, or of what it writes, changed."""
    kernel = KERNELS[name]

    def returns(*arguments, **options):
        out = kernel(*arguments, **options).clone()
        out.view(-1)[-1] += 1
        return out

    def writes(*arguments, **options):
        kernel(*arguments, **options)
        pages = arguments[{"append": 2, "fill_pages": 1}.get(name, 0)]
        pages.select(0, 0).view(-1)[0] += 1

    return writes if name in ("append", "copy_pages", "fill_pages") else returns


@pytest.mark.parametrize("name", KERNELS)
def test_a_damaged_result_fails_its_rows_and_the_part(name, tmp_path):
    setting = Setting(device=CPU, quick=True, out=tmp_path)
    record = Record(part="correctness", folder=tmp_path)
    part = gpu_correctness.run(record, setting, {**KERNELS, name: damaged(name)})
    assert {row["kernel"] for row in part["rows"] if not row["passed"]} == {name}
    assert part["counts"] == {"passed": 10, "failed": 2}
    assert part["complete"]
    assert not gpu.is_good(part)


def test_what_is_not_a_number_is_wrong():
    exact = torch.ones(3, dtype=torch.float64)
    got = torch.tensor([1.0, torch.nan, 1.0])
    verdict = gpu_correctness.judge(got, exact, exact.float())
    assert verdict.error is None
    assert verdict.bound == pytest.approx(2**-21)
    assert not verdict.passed


def test_a_kernel_that_raises_fails_its_row_only(tmp_path):
    def broken(*arguments, **options):
        raise RuntimeError("no such luck")

    record = Record(part="correctness", folder=tmp_path)
    setting = Setting(device=CPU, quick=True, out=tmp_path)
    part = gpu_correctness.run(record, setting, {**KERNELS, "checksum": broken})
    raised = [row["raised"] for row in part["rows"] if not row["passed"]]
    assert raised == ["RuntimeError: no such luck"] * 2
    assert len(part["rows"]) == 12
    assert not part["device_lost"]


def test_a_run_cut_off_leaves_its_rows(tmp_path):
    record = Record(part="layout", folder=tmp_path)
    record.add({"a": 1}, "a row")
    document = json.loads((tmp_path / "layout.json").read_text())
    assert document["rows"] == [{"a": 1}]
    assert not document["complete"]


def test_a_late_part_says_what_it_left_out(tmp_path):
    record = Record(part="correctness", folder=tmp_path, limit_s=0.0)
    part = gpu_correctness.run(record, Setting(device=CPU, quick=True, out=tmp_path))
    assert (part["rows"], part["left_out"], part["complete"]) == ([], 12, False)
    assert not gpu.is_good(part)


def test_a_part_that_dies_fails_the_run():
    row = {"copy_gb_s": 1.0}
    part = {"part": "report", "complete": True, "rows": [row], "ended": "exit status 0"}
    assert gpu.is_good(part)
    assert not gpu.is_good({**part, "ended": "exit status -11"})
    assert not gpu.is_good({**part, "rows": []})


def test_the_grid_has_every_shape_and_option():
    cases = list(gpu_correctness.cases(quick=False))
    only_decode = 2 * (3 + 2 + 2)  # layouts, and dtypes of each: fp8 is not read by fp32 queries
    assert len(cases) == len(set(cases)) == 6 * 3 * 5 * 3 * 2 + 2 * 3 * 2 * 5 + only_decode
    for kernel in KERNELS:
        mine = [case for case in cases if case.kernel == kernel]
        shapes = {(case.dtype, case.dim, case.page_size, case.layout) for case in mine}
        assert len(shapes) == 3 * 5 * 3 * 2
        assert all({0, 1} <= set(case.lengths) for case in mine)
    options = {case.options for case in cases if case.kernel == "paged_decode"}
    assert options == {*gpu_correctness.OPTIONS, *gpu_correctness.DECODE_OPTIONS}


def test_a_machine_without_the_driver_tool_has_no_driver(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert gpu_report.driver_version() is None


def test_without_a_gpu_it_says_what_to_run_instead(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert "no CUDA device here" in capsys.readouterr().err
