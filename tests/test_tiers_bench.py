"""The benchmarks of tiers run, tiny, and say what they found; their arithmetic is right."""

import json
import subprocess
import sys
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import common, prefix, tiers_systems, tiers_ttft, tiers_working_set
from benchmarks.tiers_common import drop_page_cache, page_bytes, publish_part, read_bandwidth
from benchmarks.tiers_report import report


def run(module: str, tmp_path, *options: str) -> tuple[str, dict[str, Any]]:
    """What it printed, and the document that ends it."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--dtype", "float32", *options], check=False, cwd=common.ROOT,
        capture_output=True, text=True, env=common.tree_env(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_first_tokens_come_from_host_disk_and_after_a_restart(tmp_path):
    out, document = run("tiers_ttft", tmp_path, "--systems", "generate,generator-disk")
    assert document == json.loads((tmp_path / "tiers.json").read_text())["first_token"]
    assert out.index("ceiling") < out.index("restarted") < out.index("not run")
    found = {
        name: [entry["cases"][case]["cached_tokens"] for case in tiers_ttft.CASES]
        for name, entry in document["systems"].items()
    }
    # Of 200 tokens three pages are full.
    assert found["generate"][0] == found["generator-disk"][0] == 0
    assert found["generate"][2:] == found["generator-disk"][2:] == [192, 192]
    assert [entry["lower"] for entry in document["systems"].values()] == ["host", "disk"]
    assert document["systems"]["generator-disk"]["disk_bytes"] >= 6 * page_bytes(torch.float32)
    assert all(all(cases.values()) for cases in document["exact_fp32"].values())


def test_the_working_set_runs_tiny_and_every_reply_is_the_same(tmp_path):
    (tmp_path / "tiers.json").write_text('{"first_token": 1}')
    out, document = run("tiers_working_set", tmp_path)
    kept = json.loads((tmp_path / "tiers.json").read_text())
    assert kept == {"first_token": 1, "working_set": document}
    assert out.index("ceiling") < out.index("working set")
    assert all(document["exact_fp32"].values())
    found = {name: entry["found"] for name, entry in document["working_set"].items()}
    assert found["tiers"] == found["whole"] > found["none"]
    assert {name: entry["found"] for name, entry in document["no_hits"].items()} == {
        "tiers": 0, "none": 0
    }  # fmt: skip


@pytest.mark.parametrize("option", ["--quick", "--systems"])
def test_a_system_nobody_knows_is_an_error(option, capsys):
    arguments = ["--systems", "lmdeploy"] if option == "--systems" else ["--quick", "--dtype", "x"]
    with pytest.raises(SystemExit):
        tiers_ttft.parse(arguments)
    assert ("lmdeploy" if option == "--systems" else "invalid choice") in capsys.readouterr().err


def test_conversations_keep_the_order_of_their_turns():
    order = [3, 1, 3, 3, 2, 1, 0]
    made = tiers_working_set.batches(order, 2)
    assert made == [[3, 1], [3, 2], [3, 1], [0]]
    assert all(len(set(batch)) == len(batch) <= 2 for batch in made)
    assert sorted(chain(*made)) == sorted(order)
    assert tiers_working_set.batches([], 2) == []


def test_the_working_set_is_four_pools():
    setting = tiers_working_set.Setting()
    assert setting.pages == 60 * 24
    assert setting.pool_pages * setting.share == setting.pages
    longest = setting.history + setting.turns * (setting.user + setting.reply)
    assert setting.pool_pages >= setting.width * -(-longest // 64)


def test_what_is_measured_of_a_disk_is_there_and_goes_again(tmp_path):
    speeds = read_bandwidth(tmp_path / "new", megabytes=1, repeat=1)
    assert all(speed > 0 for speed in speeds.values())
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "file").write_bytes(b"12345")
    assert drop_page_cache(tmp_path) == 5


def test_parts_of_the_document_stay_as_they_are(tmp_path, capsys):
    publish_part("one", {"a": 1}, tmp_path)
    publish_part("two", {"b": 2}, tmp_path)
    publish_part("one", {"a": 3}, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == '{"a":3}'
    assert json.loads((tmp_path / "tiers.json").read_text()) == {
        "benchmark": "tiers", "one": {"a": 3}, "two": {"b": 2}
    }  # fmt: skip


class Answers:
    """An engine that answers every prompt at once; `odd` is the call whose reply is another."""

    def __init__(self, odd: int | None = None, *, fails: bool = False) -> None:
        self.about = {"of": "test"}
        self.calls, self.odd, self.fails = 0, odd, fails

    def ask(self, prompts: list[list[int]], new: int) -> Any:
        if self.fails:
            raise RuntimeError("gone")
        self.calls += 1
        tokens = [[7 + (self.calls == self.odd)] * new]
        return {"first_s": 2.0 / self.calls, "total_s": 3.0, "cached": 0, "tokens": tokens}

    def close(self) -> None:
        pass


class Fake(tiers_systems.System):
    """All lives of it are one engine's."""

    lower = "host"

    def __init__(self, engine: Answers) -> None:
        self.engine = engine

    def running(self, folder):
        return SimpleContext(self.engine)


class SimpleContext:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __enter__(self) -> Any:
        return self.value

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture
def no_text(monkeypatch):
    text = SimpleNamespace(pieces=lambda rows, size: torch.zeros((rows, size), dtype=torch.int64))
    monkeypatch.setattr(prefix, "Text", lambda prefix: text)


def test_a_peer_that_fails_is_left_out_and_a_reply_that_differs_is_told(no_text):
    setting = tiers_ttft.Setting(prompt=8, new=2)
    runs = tiers_ttft.Runs(setting)
    systems = {"generate": Fake(Answers(odd=5)), "vllm": Fake(Answers(fails=True))}
    lives = runs.measure(systems, 2)
    assert list(lives) == ["generate"]
    assert [failed["system"] for failed in runs.failures] == ["vllm"]
    # Calls: warm, cold, pool, other, lower, then warm and restarted: the fifth is `lower`.
    assert tiers_ttft.same_replies(lives["generate"]) == {
        "cold": True, "pool": True, "lower": False, "restarted": True
    }  # fmt: skip
    entry = tiers_ttft.system_document(lives["generate"], systems["generate"])
    assert entry["cases"]["lower"]["replies_as_cold"] == 1
    assert entry["cases"]["pool"]["of_cold"] == pytest.approx((2 / 3 + 9 / 10) / 2)
    document = {
        "setting": {"prompt": 8}, "systems": {"generate": entry}, "over": {},
        "exact_fp32": {"generate": tiers_ttft.same_replies(lives["generate"])},
        "failures": runs.failures, "left_out": ["lmcache"],
    }  # fmt: skip
    text = report(document)
    assert "goal of 0.12x, host, kvpaged, generate(), host and disk: MISSED" in text
    assert "OTHER THAN COLD: lower" in text
    assert "failed: vLLM prefix caching: RuntimeError: gone" in text


def test_our_own_failure_ends_it(no_text):
    with pytest.raises(RuntimeError, match="gone"):
        tiers_ttft.Runs(tiers_ttft.QUICK).measure({"generate": Fake(Answers(fails=True))}, 1)


def test_a_server_that_ends_early_says_why(tmp_path):
    python = tmp_path / "python"
    program = tmp_path / "lmcache"
    program.write_text("#!/bin/sh\necho no such option\nexit 2\n")
    program.chmod(0o755)
    with (
        pytest.raises(RuntimeError, match="LMCache's server ended: no such option"),
        tiers_systems.lmcache_server(python, tmp_path, tiers_systems.free_port()),
    ):
        pass
