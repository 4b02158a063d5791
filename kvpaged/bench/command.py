"""`kvpaged bench`: its arguments, what it needs, where its results go."""

import argparse
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kvpaged.bench import common, plot
from kvpaged.bench.serving import report, serve
from kvpaged.bench.systems import OURS, SYSTEMS
from kvpaged.bench.works import GOALS
from kvpaged.errors import KVPagedError

DESCRIPTION = """\
Serve requests to SmolLM2-135M (93 MB, fetched once), greedily, by kvpaged's generator and by
others, in turn:

  batch 1, 8, 32   short prompts, all at once
  spread           64 requests of 10 to 1,500 tokens, 16 to 256 new ones
  shared           32 requests that begin with the same 2,000 tokens

in bf16 where the CPU multiplies it, else in fp32. kvpaged runs with packed weights, as it is and
compiled; Hugging Face's generate() in batches of 8, padded, each as long as its longest, and its
continuous batching; vLLM by an interpreter of its own. Tables go to standard output, whose last
line is one JSON document; that goes to a file, too, with a plot beside it."""

EPILOG = """\
Exit status: 0, measured, though others may have failed (it is said which); 1, one of kvpaged's own
failed, or nothing could be measured; 2, the arguments."""

FOLDER = Path("kvpaged-bench")
"""Where results go unless told otherwise."""


class BenchError(KVPagedError, RuntimeError):
    """The benchmark cannot run here, or a document is not one of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`, and have what it parses `run`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("--quick", action="store_true", help="tiny works, to see that it runs")
    parser.add_argument(
        "--rounds", type=_positive, metavar="N",
        help="how often each batch is measured (3; quick: 1); spread and shared a third of it, "
        "at least once",
    )  # fmt: skip
    parser.add_argument(
        "--works", nargs="+", choices=GOALS, default=list(GOALS), metavar="WORK",
        help=f"only these: {', '.join(GOALS)}",
    )  # fmt: skip
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM",
        help=f"only these: {', '.join(SYSTEMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"),
        help="of weights and keys (bfloat16 where the CPU multiplies it, else float32)",
    )  # fmt: skip
    parser.add_argument(
        "--vllm", type=_interpreter, metavar="PYTHON", help="an interpreter that has vLLM"
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, metavar="FOLDER",
        help="where serving.json and serving.png go (%(default)s/ in the current directory)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.json",
        help="measure nothing: draw the plot of this document anew, beside it",
    )  # fmt: skip
    parser.set_defaults(run=run, fail=parser.error)


def run(chosen: argparse.Namespace) -> int:
    """Measure, or draw anew, as `chosen`; the exit status.

    Raises:
        BenchError: an extra is missing, or the file to draw is no document of this benchmark.
        ModelError: the model could not be fetched.
    """
    if chosen.plot is not None:
        require("matplotlib")
        picture = chosen.plot.with_suffix(".png")
        plot.draw(read(chosen.plot), picture)
        print(picture)
        return 0
    names = chosen.systems or list(SYSTEMS)
    if chosen.systems and "vllm" in names and chosen.vllm is None:
        chosen.fail("argument --systems: vllm needs --vllm PYTHON")
    require("transformers", "matplotlib")
    rounds = chosen.rounds or (1 if chosen.quick else 3)
    document = serve(
        names, chosen.works, vllm=chosen.vllm, rounds=rounds, quick=chosen.quick,
        dtype=getattr(torch, chosen.dtype) if chosen.dtype else None,
    )  # fmt: skip
    print(f"{document['dtype']}; {common.describe(document['environment'])}")
    print(report(document))
    chosen.out.mkdir(parents=True, exist_ok=True)
    if document["works"]:
        plot.draw(document, chosen.out / "serving.png")
    common.publish("serving", document, chosen.out)
    failed = {failure["system"] for failure in document["failures"]}
    return int(not document["works"] or bool(failed & set(OURS)))


def read(file: Path) -> dict[str, Any]:
    """A document of this benchmark that has something to draw.

    Raises:
        BenchError: `file` is none, or cannot be read.
    """
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict) or document.get("benchmark") != "serving":
        raise BenchError(f"{file} is no document of this benchmark")
    if not document.get("works"):
        raise BenchError(f"{file} has no work that was measured")
    return document


def require(*modules: str) -> None:
    """Check that these can be imported, before anything takes time.

    Raises:
        BenchError: naming those that are missing and what to install.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise BenchError(f"needs {' and '.join(missing)}: pip install 'kvpaged[hf,bench]'")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _interpreter(text: str) -> Path:
    """A path, or a name on PATH, of something that can be executed."""
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"nothing that can be executed is at {text}")
    return Path(found)
