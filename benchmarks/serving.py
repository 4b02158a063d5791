"""`kvpaged bench` with its results in this tree: python -m benchmarks.serving [ARGUMENTS].

python -m benchmarks.serving                                    # 3 rounds, 1 of the long ones
python -m benchmarks.serving --vllm /path/to/its/bin/python     # and vLLM
python -m benchmarks.serving --quick                            # tiny: does it run at all
"""

import sys
from collections.abc import Sequence

from benchmarks import common
from kvpaged import cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    return cli.main(["bench", "--out", str(common.RESULTS), *given])


if __name__ == "__main__":
    sys.exit(main())
