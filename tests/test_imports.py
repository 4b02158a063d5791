"""What `import kvpaged` costs: neither transformers nor triton is loaded before it is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules present in a fresh interpreter after `statement`."""
    script = f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize("statement", ["import kvpaged", "from kvpaged import PagedKVCache"])
def test_importing_kvpaged_loads_no_optional_dependency(statement):
    loaded = loaded_by(statement)
    assert "torch" in loaded
    assert not loaded & {"transformers", "triton", "gguf", "safetensors", "matplotlib"}


def test_the_command_line_loads_no_optional_dependency_either():
    assert not loaded_by("import kvpaged.cli") & {"transformers", "triton", "gguf", "matplotlib"}


def test_importing_kvpaged_testing_models_loads_no_transformers():
    assert not loaded_by("import kvpaged.testing.models") & {"transformers", "gguf"}


def test_the_kernels_folder_is_no_package():
    # A regular package named `kernels` at the root shadows the one that transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "kvpaged_kernels" / "__init__.py").exists()


def test_the_version_is_the_distributions():
    import tomllib

    import kvpaged

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert kvpaged.__version__ == project["version"]
