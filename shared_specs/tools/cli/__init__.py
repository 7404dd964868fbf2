"""The `psa` command. One file per subcommand; frameworks are imported only where one runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from shared_specs import __version__

# Each module of this package named here has `add_parser(subparsers)`, which sets the default
# `run`: a function of the parsed arguments that returns the exit status.
COMMANDS = ("demo", "info", "mask", "presets", "apply", "conformance", "parity")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="psa", description="Pyramid sparse attention for PyTorch and JAX."
    )
    parser.add_argument("--version", action="version", version=f"psa {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"shared_specs.tools.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit status: 0 done, 1 the request cannot be met (one line on stderr says why), 2 wrong
        usage (by argparse).
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(f"psa {args.command}: {error}", file=sys.stderr)
        return 1
