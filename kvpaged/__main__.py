"""`python -m kvpaged`: the command line."""

import sys

from kvpaged.cli import main

if __name__ == "__main__":
    sys.exit(main())
