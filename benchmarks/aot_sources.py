"""What docs/kernels.md is made from: so that a test can say whether it still is."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEER_RESULTS = ROOT / "benchmarks" / "results" / "aot_peers.json"


def digest() -> str:
    """Digest of everything that docs/kernels.md is made from, but for Triton itself."""
    files = [*(ROOT / "kernels" / "kvpaged_kernels" / "gpu").glob("*.*")]
    files += (ROOT / "benchmarks").glob("aot*.py")
    files += [ROOT / "benchmarks" / "sass.py", ROOT / "benchmarks" / "int4_loop.py", PEER_RESULTS]
    files = sorted(f for f in files if f.suffix in (".py", ".json") and f.exists())
    together = hashlib.sha256()
    for file in files:
        together.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return together.hexdigest()[:16]
