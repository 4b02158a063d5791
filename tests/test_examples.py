"""The examples run to the end as people run them, and print what they promise."""

import re
import subprocess
import sys

import pytest

from benchmarks import common

EXAMPLES = common.ROOT / "examples"

# File: the arguments that make it short, and what its output must contain, in this order.
EXPECTED = {
    "demo.py": (
        ["--new-tokens", "12", "--questions", "2"],
        [
            r"1/2 .*France",
            r"Paris",
            r"\[0 of \d+ prompt tokens were there",
            r"\[DynamicCache: the same \d+ tokens\]",
            r"\[[1-9]\d+ of \d+ prompt tokens were there",
            r"tokens/s +[\d.]+ +[\d.]+",
            r"a new process found [67]\d\d of \d+ prompt tokens on disk",
            r"times\s+as\s+fast;\s+the\s+same\s+token:\s+True",
        ],
    ),
    "tree.py": (
        ["--questions", "2", "--new-tokens", "3", "--tokens", "70"],
        [
            r"a document of 70 tokens, 4 answers",
            r"Why\? +\d+ tokens computed",
            r"Who is it written for\? +\d+ tokens",
            r"\d+ pages hold them all",
        ],
    ),
    "plain_loop.py": (
        [],
        [r"\d+ pages, [\d,]+ bytes", r"the same tokens without a cache: True"],
    ),
    "key_value.py": (
        [],
        [
            r"is there: True",
            r"is not: False",
            r"hello 2 tensor\(\[0., 1., 2., 3.\]\)",
            r"deleted: True then: gone",
        ],
    ),
    "weights_cache.py": (
        ["--rounds", "2"],
        [
            r"safetensors +269,\d+,\d+ bytes, 272 tensors in 31 values",
            r"raw +269,\d+,\d+ bytes, 1\.000 times",
            r"lossless +1[78]\d,\d+,\d+ bytes, 1\.[45]\d+ times",
            r"1420 tensors compared, 0 of them differ",  # 5 ways to load all, 2 to load one a layer
            r"safetensors, mapped +[\d.]+ ms\n +raw, viewed +[\d.]+ ms +[\d.]+ times",
            r"raw, read +[\d.]+ ms +[\d.]+ times",
            r"lossless, read +[\d.]+ ms +[\d.]+ times",
            r"raw, one part a layer +[\d.]+ ms +[\d.]+ times",
            r"the same logits: True; Paris",
        ],
    ),
    "embeddings.py": (
        ["--documents", "24"],
        [
            r"24 documents: 0 found, 24 computed",
            r"opened again: 0 computed, in 0\.\d+ of the time",
            r"48 tensors compared, 0 differ",
            r"See: manual/\w+, manual/\w+",
            r"asked again: found; 3600 s later: computed",
            r"24 documents: [1-9]\d* evicted, 1\d are there",
            r"asked for all the time is there: True",
        ],
    ),
    "hf_generate.py": ([], [r"Paris", r"\d+ pages, [\d,]+ bytes of K and V"]),
}

# Those that need something to work on; tests/lsm/test_format.py and the demo run them.
ELSEWHERE = {"read_segment.py", "restart.py"}


def run(name: str, arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=common.tree_env(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_listed():
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(EXPECTED) | ELSEWHERE


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs_and_prints_what_it_promises(name):
    arguments, patterns = EXPECTED[name]
    out = run(name, arguments)
    assert re.search(".*".join(patterns), out, re.DOTALL), out


def test_embeddings_are_found_by_the_next_run_and_only_what_is_new_is_computed(tmp_path):
    folder = str(tmp_path / "documents")
    few = ["--documents", "3", "--ask", "What is a small anonymous function?"]
    assert "3 documents: 0 found, 3 computed" in run("embeddings.py", [folder, *few])
    out = run("embeddings.py", [folder, *few, "--documents", "5"])
    assert "5 documents: 3 found, 2 computed" in out


@pytest.mark.notebook
@pytest.mark.parametrize("name", sorted(file.name for file in EXAMPLES.glob("*.ipynb")))
def test_a_notebook_executes_and_keeps_its_outputs(name, tmp_path):
    import nbformat

    kept = nbformat.read(EXAMPLES / name, as_version=4)
    code = [cell for cell in kept.cells if cell.cell_type == "code" and cell.source.strip()]
    assert any(cell.outputs for cell in code), f"{name} was committed without its outputs"
    machine = re.search(r"/(home|root|tmp|Users|site-packages)/", str([c.outputs for c in code]))
    assert machine is None, f"an output of {name} names somebody's paths"

    # A process of its own: the kernel's event loop and its warnings stay out of this one.
    target = tmp_path / name
    command = [sys.executable, "-m", "jupyter", "execute", f"--output={target}"]
    done = subprocess.run(
        [*command, str(EXAMPLES / name)],
        check=False,
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=common.tree_env(),
    )
    assert done.returncode == 0, done.stderr
    made = nbformat.read(target, as_version=4)
    kinds = [
        [output.output_type for output in cell.outputs] for cell in made.cells if "outputs" in cell
    ]
    assert not any("error" in outputs for outputs in kinds)
    assert sum(map(len, kinds)) > 0
