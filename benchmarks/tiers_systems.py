"""The systems that benchmarks.tiers_ttft runs, each as a process that ends and begins again.

A system runs over a folder, which is all that it may find again after its process has ended. Pools
have room for one prompt and little else, so that a second prompt drives the first one out.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from kvpaged.bench.common import PAGE_SIZE
from kvpaged.bench.engine_process import EngineProcess
from kvpaged.bench.vllm_engine import VLLMEngine

# What each system is called on the command line, in tables and in documents.
SYSTEMS = {
    "generate": "kvpaged, generate(), host and disk",
    "generate-disk": "kvpaged, generate(), disk",
    "generator": "kvpaged, Generator, host and disk",
    "generator-disk": "kvpaged, Generator, disk",
    "none": "kvpaged, generate(), no tiers",
    "vllm": "vLLM prefix caching",
    "vllm-disk": "vLLM ExampleConnector, disk",
    "lmcache": "vLLM with LMCache, host and disk",
}
OURS = ("generate", "generate-disk", "generator", "generator-disk", "none")
HOST_GIB = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What systems are made for.

    Attributes:
        dtype: of weights and cache.
        length: tokens of a request at its end.
        pages: of the pool.
        page_bytes: of one.
        compiled: whether engines compile the model, which takes a minute or two a start.
    """

    dtype: torch.dtype
    length: int
    pages: int
    page_bytes: int
    compiled: bool


class System(ABC):
    """Something that serves over a folder.

    Attributes:
        lower: where a prompt is that was driven out of the pool: `"host"`, `"disk"`, or `None`.
    """

    lower: str | None

    @abstractmethod
    def running(self, folder: Path) -> AbstractContextManager[EngineProcess]:
        """Its process, ready to be asked; it has ended when the context has."""


class Ours(System):
    """A `tiers_worker`."""

    def __init__(self, work: Work, loop: str, *, host: bool, disk: bool) -> None:
        self._work, self._loop = work, loop
        self._host, self._disk = host, disk
        self.lower = "host" if host else "disk" if disk else None

    @contextmanager
    def running(self, folder: Path) -> Iterator[EngineProcess]:
        """See `System.running`."""
        work = self._work
        options = {
            "loop": self._loop,
            "dtype": str(work.dtype).removeprefix("torch."),
            "memory": work.pages * work.page_bytes,
            "host": HOST_GIB << 30 if self._host else None,
            "disk": str(folder) if self._disk else None,
            "compile": work.compiled,
        }
        command = [sys.executable, "-m", "benchmarks.tiers_worker", json.dumps(options)]
        engine = EngineProcess("kvpaged", command, {**common.tree_env(), "PYTHONSAFEPATH": "1"})
        try:
            yield engine
        finally:
            engine.close()


class VLLM(System):
    """vLLM, of which nothing outlives the process; a connector may add that."""

    lower: str | None = None

    def __init__(self, work: Work, python: Path) -> None:
        self._work, self._python = work, python

    @contextmanager
    def running(self, folder: Path) -> Iterator[EngineProcess]:
        """See `System.running`."""
        yield from self._engine(None)

    def _engine(self, transfer: Mapping[str, Any] | None) -> Iterator[EngineProcess]:
        """One block more: vLLM keeps the first for itself."""
        work = self._work
        options: dict[str, Any] = {
            "num_gpu_blocks_override": work.pages + 1,
            "enforce_eager": not work.compiled,
        }
        if transfer is not None:
            options["kv_transfer_config"] = {"kv_role": "kv_both", **transfer}
        engine = VLLMEngine(self._python, work.dtype, rows=2, length=work.length, options=options)
        try:
            yield engine
        finally:
            engine.close()


class VLLMDisk(VLLM):
    """vLLM with its `ExampleConnector`: one file a layer of each prompt, found if all of the prompt
    is there (vLLM calls it a simple debug implementation; its own offloading connectors refuse to
    run on a CPU).
    """

    lower = "disk"

    @contextmanager
    def running(self, folder: Path) -> Iterator[EngineProcess]:
        """See `System.running`."""
        where = {"shared_storage_path": str(folder)}
        yield from self._engine(
            {"kv_connector": "ExampleConnector", "kv_connector_extra_config": where}
        )


class LMCache(VLLM):
    """vLLM with LMCache's server beside it, which is the form of it that runs on a CPU: host memory
    and its `fs` adapter, chunks as large as pages. Its server ends and begins with vLLM.
    """

    lower = "host"

    @contextmanager
    def running(self, folder: Path) -> Iterator[EngineProcess]:
        """See `System.running`."""
        port = free_port()
        where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        with lmcache_server(self._python, folder, port):
            yield from self._engine(
                {"kv_connector": "LMCacheMPConnector", "kv_connector_extra_config": where}
            )


@contextmanager
def lmcache_server(python: Path, folder: Path, port: int) -> Iterator[None]:
    """LMCache's server, listening; it has 30 seconds to end."""
    http = free_port()
    adapter = json.dumps({"type": "fs", "base_path": str(folder)})
    command = [
        python.with_name("lmcache"), "server", "--host", "127.0.0.1", "--port", port,
        "--http-host", "127.0.0.1", "--http-port", http, "--chunk-size", PAGE_SIZE,
        "--supported-transfer-mode", "auto", "--shm-name", f"kvpaged-{os.getpid()}-{port}",
        "--l1-size-gb", HOST_GIB, "--no-l1-use-lazy", "--eviction-policy", "LRU",
        "--l2-adapter", adapter, "--disable-observability",
    ]  # fmt: skip
    env = {**os.environ, "LMCACHE_TRACK_USAGE": "false"}
    env.pop("PYTHONPATH", None)
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        server = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=subprocess.STDOUT, env=env
        )
        try:
            for listening in (port, http):
                await_port(server, listening)
            yield
        except EarlyEnd:
            log.seek(0)
            words = [line.strip() for line in log if line.strip()] or ["it said nothing"]
            raise RuntimeError(f"LMCache's server ended: {words[-1]}") from None
        finally:
            server.terminate()
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


class EarlyEnd(Exception):
    """A server ended before it listened."""


def await_port(server: subprocess.Popen[bytes], port: int, *, timeout_s: float = 120) -> None:
    """Wait until something listens at a port of this machine.

    Raises:
        EarlyEnd: the server has ended.
        TimeoutError: nothing did in time.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if server.poll() is not None:
            raise EarlyEnd
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens at port {port} after {timeout_s} s")


def free_port() -> int:
    """A port of this machine nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def make_systems(
    names: list[str], work: Work, *, vllm: Path | None, lmcache: Path | None
) -> dict[str, System]:
    """The named systems, in the order of `SYSTEMS`; peers without an interpreter are left out."""
    made: dict[str, System] = {
        "generate": Ours(work, "generate", host=True, disk=True),
        "generate-disk": Ours(work, "generate", host=False, disk=True),
        "generator": Ours(work, "generator", host=True, disk=True),
        "generator-disk": Ours(work, "generator", host=False, disk=True),
        "none": Ours(work, "generate", host=False, disk=False),
    }
    if vllm is not None:
        made |= {"vllm": VLLM(work, vllm), "vllm-disk": VLLMDisk(work, vllm)}
    if lmcache is not None:
        made["lmcache"] = LMCache(work, lmcache)
    return {name: made[name] for name in SYSTEMS if name in names and name in made}
