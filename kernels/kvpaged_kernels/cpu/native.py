"""Native code for the CPU, compiled just in time by the C++ compiler that `torch.compile` uses.

Sources are plain C++ with OpenMP and a C interface, without torch's headers: they compile in one to
three seconds, once a machine. Compiled libraries are kept in a folder under a hash of all that went
into them. A library names OpenMP's runtime as torch's own does, so it is torch's that it gets.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno",
    "-ffp-contract=fast",
)  # fmt: skip

DTYPES = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
"""What native code is compiled for, and the constant that says so to it."""


class NativeError(RuntimeError):
    """There is no C++ compiler, or it failed: what it said."""


def cache_dir(name: str) -> Path:
    """A folder for what is compiled: in `$TORCHINDUCTOR_CACHE_DIR` if somebody has set that, else
    in `$XDG_CACHE_HOME/kvpaged`, ~/.cache by default.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    told = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if told and told != default_cache_dir():  # inductor sets it to its default, in /tmp, by itself
        return Path(told) / "kvpaged" / name
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "kvpaged" / name


class _Threads(threading.local):
    """How many threads torch had before others' code was held to one; 0: it is not."""

    torch = 0


_threads = _Threads()


def native_threads() -> int:
    """How many threads native code is to use: torch's number, within `one_thread` too."""
    return _threads.torch or torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold OpenMP code that asks for no number of threads, torch's and inductor's, to one.

    For kernels of so few numbers that waking a thread takes longer. Holds for the calling thread;
    torch itself is not told, which would change all threads'.

    Raises:
        NativeError: as of `load`.
    """
    with _hold(1, native_threads()):
        yield


@contextmanager
def all_threads() -> Iterator[None]:
    """Within `one_thread`: as if it were not for a while."""
    if not _threads.torch:
        yield
        return
    with _hold(_threads.torch, 0):
        yield


@contextmanager
def _hold(threads: int, torchs: int) -> Iterator[None]:
    before, hidden = torch.get_num_threads(), _threads.torch
    say = _openmp()
    try:
        say(threads)
        _threads.torch = torchs
        yield
    finally:
        say(before)
        _threads.torch = hidden


_loaded: list[ctypes.CDLL] = []


def _openmp() -> Callable[[int], None]:
    """OpenMP's `omp_set_num_threads`, as a library that is loaded here knows it: one without a
    parallel loop is not linked to it.
    """
    known = (each for each in _loaded if hasattr(each, "omp_set_num_threads"))
    library = next(known, None) or load("native_linear", torch.float32)
    say: Callable[[int], None] = library.omp_set_num_threads
    return say


@lru_cache(maxsize=256)
def load(name: str, dtype: torch.dtype, constants: tuple[tuple[str, int], ...] = ()) -> ctypes.CDLL:
    """The library of a source file beside this one, for a dtype and constants (`-D`).

    Raises:
        NativeError: it can't be made here.
    """
    if dtype not in DTYPES:
        raise NativeError(f"no native code for {dtype}")
    source = _SOURCES / f"{name}.cpp"
    defines = [f"-D{DTYPES[dtype]}", *(f"-D{key}={value}" for key, value in constants)]
    compiler, version = _compiler()
    parts = [version, _processor(), *_FLAGS, *defines]
    parts += [file.read_text() for file in (source, *sorted(_SOURCES.glob("*.h")))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    target = cache_dir("native") / f"{name}-{key}.so"
    if not target.exists():
        _compile([compiler, *_FLAGS, *defines, str(source)], target)
    try:
        library = ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeError(f"{target} can't be loaded: {error}") from error
    _loaded.append(library)
    return library


@lru_cache(maxsize=1)
def _compiler() -> tuple[str, str]:
    """The compiler, and what it says of its version."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = str(cpp_builder.get_cpp_compiler())
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (InvalidCxxCompiler, OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"no C++ compiler works here: {error}") from error
    return compiler, done.stdout


@lru_cache(maxsize=1)
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            facts = {x.split(":")[0].strip(): x for x in lines if x.startswith(("flags", "model"))}
        return "".join(facts.values())
    except OSError:
        return platform.platform() + platform.processor()


def _compile(command: list[str], target: Path) -> None:
    """Compile beside the target, then rename: whoever else does the same makes the same file."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    except OSError as error:
        raise NativeError(f"{target.parent} can't be written to: {error}") from error
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NativeError(f"{' '.join(command)} failed: {done.stderr[:2000]}")
        os.chmod(made, 0o755)
        os.replace(made, target)
    except OSError as error:
        raise NativeError(f"{target} could not be made: {error}") from error
    finally:
        Path(made).unlink(missing_ok=True)
