"""Rotary embeddings whose angles depend on how long a sequence is.

`longrope` has one set of angles up to the length a model was first trained for and another beyond:
two regimes, each with pages of its own. Dynamic NTK has other angles for each length beyond it, and
they depend on what was computed before: nothing beyond can be shared.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The kinds of rotary embedding a module computes, by layer type (`None`: for all layers)."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return {k: v for k, v in kind.items() if isinstance(v, str)} if isinstance(kind, dict) else {}


def changes_with_length(module: nn.Module) -> bool:
    """Whether a module computes angles that follow the length."""
    return any("dynamic" in kind or kind == "longrope" for kind in _kinds(module).values())


@dataclass(frozen=True, slots=True)
class LengthRule:
    """How a model's angles depend on the longest sequence of a pass.

    Attributes:
        turns: lengths beyond which angles are other ones (longrope), ascending.
        end: from this length on nothing is reproducible (dynamic NTK); `None`: no such length.
    """

    turns: tuple[int, ...] = ()
    end: int | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "LengthRule":
        """What the rotary embeddings inside a model do."""
        turns: set[int] = set()
        ends: set[int] = set()
        for module in model.modules():
            for layers, kind in _kinds(module).items():
                if kind == "longrope":
                    turns.add(_first_length(module, layers))
                elif "dynamic" in kind:
                    ends.add(int(getattr(module, "original_max_seq_len", 0)))
        return cls(tuple(sorted(turns)), min(ends, default=None))

    def regime(self, length: int) -> bytes | None:
        """What of a pass whose longest sequence is `length` pages' bytes depend on, or `None` if
        they are of no use to others.
        """
        if self.end is not None and length >= self.end:
            return None
        passed = sum(length > turn for turn in self.turns)
        return f"rope {passed}".encode() if self.turns else b""


def _first_length(module: nn.Module, layers: str | None) -> int:
    """The length up to which a longrope module has its short angles; 0 if it does not say."""
    config: Any = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(parameters, dict) and layers is not None:
        parameters = parameters.get(layers)
    named = parameters if isinstance(parameters, dict) else {}
    length = named.get("original_max_position_embeddings")
    return int(length or getattr(config, "original_max_position_embeddings", 0) or 0)
