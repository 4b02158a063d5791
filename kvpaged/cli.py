"""The command line, `kvpaged COMMAND`: which commands there are."""

import argparse
import sys
from collections.abc import Sequence

import kvpaged
from kvpaged.bench import command as bench
from kvpaged.errors import KVPagedError
from kvpaged.lsm import commands as stores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. An error of ours is one line on stderr, and status 1."""
    parser = argparse.ArgumentParser(prog="kvpaged", description=kvpaged.__doc__)
    parser.add_argument("--version", action="version", version=f"kvpaged {kvpaged.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bench.add_arguments(
        commands.add_parser("bench", help="serve requests, beside Hugging Face and vLLM")
    )
    stores.add_commands(commands)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except KVPagedError as error:
        print(f"kvpaged {chosen.command}: {error}", file=sys.stderr)
        return 1
