"""How packed passes are compiled: once, for any number of tokens, and without guards.

Guards would ask some thousand questions before each pass (1.2 ms for SmolLM2), whose answers change
between requests, if at all. `shape_of` asks them then; a model that has changed is compiled again.
"""

import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from kvpaged.integrations.angles import KeepAngles
from kvpaged.integrations.attention import compiling_packed
from kvpaged.integrations.products import JoinProducts
from kvpaged_kernels.cpu.native import cache_dir

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def compile_run(run: Run, device: torch.device, *, one_thread: bool) -> Run:
    """A function that is compiled at its first call, which is to be within `any_size`.

    On a CPU inductor's own kernels run in one thread, which for few tokens takes less time than
    waking another; or, without `one_thread`, in as many as OpenMP gives when they run.
    """
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if device.type == "cpu":
        options |= {
            "cpp.threads": 1 if one_thread else -1,
            "cpp.dynamic_threads": not one_thread,
            "post_grad_custom_pre_pass": _Passes(),
        }
    # What dynamo has compiled belongs to a code object, and without guards to any call of it.
    own = types.FunctionType(
        run.__code__.replace(), run.__globals__, run.__name__, run.__defaults__, run.__closure__
    )
    result: Run = torch.compile(own, dynamic=True, fullgraph=True, options=options)
    return result


class _Passes(CustomGraphPass):
    """Inductor takes one."""

    def __init__(self) -> None:
        self._passes: tuple[CustomGraphPass, ...] = (JoinProducts(), KeepAngles())

    def __call__(self, graph: fx.Graph) -> None:
        """Each in turn."""
        for each in self._passes:
            each(graph)

    def uuid(self) -> tuple[Any, ...]:
        """What a graph made with them depends on."""
        return tuple(each.uuid() for each in self._passes)


def shape_of(model: nn.Module) -> list[Any]:
    """What a graph of a model depends on and tensors' values are not."""
    return [
        (
            id(module), module.training, id(vars(module).get("forward")),
            [(x.shape, x.dtype, x.device) for x in module._parameters.values() if x is not None],
            [(x.shape, x.dtype, x.device) for x in module._buffers.values() if x is not None],
            len(module._forward_hooks), len(module._forward_pre_hooks),
        )
        for module in model.modules()
    ]  # fmt: skip


@contextmanager
def any_size() -> Iterator[None]:
    """Compile for one token as for many: sizes of 1 are not made a case of their own."""
    config: Any = torch.fx.experimental._config
    with compiling_packed(), config.patch(backed_size_oblivious=True):
        yield


@contextmanager
def kept_on_disk() -> Iterator[None]:
    """What inductor compiles meanwhile is kept where it lasts: see `cache_dir`."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(cache_dir("inductor"))
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
