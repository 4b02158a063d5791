"""The floors of docs/design.md: a module imports its own floor or a lower one.

Read from the syntax tree, so imports inside functions and under TYPE_CHECKING count too. A module
that stands on no floor fails: whoever adds one says where it belongs, here and in docs/design.md.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREES = {"kvpaged": ROOT / "kvpaged", "kvpaged_kernels": ROOT / "kernels" / "kvpaged_kernels"}

# The longest prefix of a module's name decides. `kvpaged` itself holds the public names; what is
# above it uses them as anybody does.
FLOORS = {
    "kvpaged_kernels": 0,
    "kvpaged.errors": 1,
    "kvpaged.config": 1,
    "kvpaged.geometry": 1,
    "kvpaged.keys": 1,
    "kvpaged.ops": 2,
    "kvpaged.mixed_ops": 2,
    "kvpaged.operators": 2,
    "kvpaged.pages": 2,
    "kvpaged.formats": 2,
    "kvpaged.codecs": 2,
    "kvpaged.lsm": 3,
    "kvpaged.tiers": 4,
    "kvpaged.offload": 5,
    "kvpaged.cache": 6,
    "kvpaged.books": 6,
    "kvpaged.batch": 6,
    "kvpaged.sequences": 6,
    "kvpaged.group_rows": 6,
    "kvpaged.mixed_rows": 6,
    "kvpaged.mixed_step": 6,
    "kvpaged.growth": 6,
    "kvpaged.token_batch": 6,
    "kvpaged.slot_batch": 6,
    "kvpaged.session": 6,
    "kvpaged.step": 6,
    "kvpaged.step_layers": 6,
    "kvpaged.tokens": 6,
    "kvpaged.stats": 6,
    "kvpaged.loading": 6,
    "kvpaged.given": 6,
    "kvpaged.saved": 6,
    "kvpaged.documents": 6,
    "kvpaged.texts": 6,
    "kvpaged.likeness": 7,
    "kvpaged.tuning": 7,
    "kvpaged.calibration": 7,
    "kvpaged.generate": 7,
    "kvpaged.integrations": 7,
    "kvpaged.testing": 8,
    "kvpaged": 9,
    "kvpaged.bench": 10,
    "kvpaged.cli": 11,
    "kvpaged.__main__": 11,
}

# The one import upwards: cache.session hands out a transformers.Cache without needing transformers.
EXCEPTIONS = {("kvpaged.cache", "kvpaged.integrations.transformers")}

# kvpaged_kernels takes tensors and returns tensors: it must be liftable out of this repository.
KERNEL_DEPENDENCIES = {"torch", "triton", "numpy", "kvpaged_kernels"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in TREES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = file
    return found


MODULES = modules()


def imports(name: str, file: Path) -> Iterator[str]:
    """Every module that `file` imports, as absolute names; `from a import b` is a.b if a module."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def floor(name: str) -> int | None:
    """The floor of the longest listed prefix; None for a module nobody has placed."""
    if name == "kvpaged":
        return FLOORS["kvpaged"]
    prefix = name
    while prefix and prefix != "kvpaged":
        if prefix in FLOORS:
            return FLOORS[prefix]
        prefix = prefix.rpartition(".")[0]
    return None


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in TREES


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_its_own_floor_or_lower(name):
    own = floor(name)
    assert own is not None, f"{name} stands on no floor: place it in FLOORS and docs/design.md"
    for imported in imports(name, MODULES[name]):
        if not is_ours(imported) or (name, imported) in EXCEPTIONS:
            continue
        other = floor(imported)
        assert other is not None, f"{name} imports {imported}, which stands on no floor"
        assert other <= own, f"{name} (floor {own}) imports {imported} (floor {other})"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_what_is_not_installed_with_it(name):
    roots = {imported.partition(".")[0] for imported in imports(name, MODULES[name])}
    assert not roots & {"benchmarks", "examples", "tests"}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("kvpaged_kernels")])
def test_kernels_know_tensors_only(name):
    roots = {imported.partition(".")[0] for imported in imports(name, MODULES[name])}
    assert roots - sys.stdlib_module_names <= KERNEL_DEPENDENCIES


@pytest.mark.parametrize(
    "name", [n for n in MODULES if n.startswith(("kvpaged_kernels.gpu", "kvpaged_kernels.cpu"))]
)
def test_optimised_code_never_imports_its_oracle(name):
    oracles = [i for i in imports(name, MODULES[name]) if "reference" in i.split(".")]
    assert oracles == []


def test_the_exceptions_are_still_needed():
    for name, imported in EXCEPTIONS:
        assert imported in set(imports(name, MODULES[name]))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn, kvpaged.ops", {"torch.nn", "kvpaged.ops"}),
        ("from kvpaged import ops", {"kvpaged.ops"}),
        ("from kvpaged.errors import KVPagedError", {"kvpaged.errors"}),
        ("from .errors import KVPagedError", {"kvpaged.errors"}),
        ("from . import ops", {"kvpaged.ops"}),
        ("def f():\n    from kvpaged.ops import x", {"kvpaged.ops"}),
    ],
)
def test_imports_are_seen_in_every_form(tmp_path, source, expected):
    file = tmp_path / "module.py"
    file.write_text(source)
    assert set(imports("kvpaged.module", file)) == expected


def test_an_unknown_module_stands_on_no_floor():
    assert floor("kvpaged.something_new") is None
    assert floor("kvpaged.pages.anything") == 2
    assert floor("kvpaged") == 9
    assert floor("kvpaged.bench.anything") == 10
