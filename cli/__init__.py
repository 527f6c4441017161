"""The `slipstream` command: one sub-command per technique, each declared in a module of this folder."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

COMMANDS: tuple[str, ...] = ("cow", "edit", "lmd", "search", "stream")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every technique's sub-command."""
    parser = argparse.ArgumentParser(prog="slipstream", description="Training-free ways to sample diffusion models.")
    parser.add_argument("--version", action="version", version=f"slipstream {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f".{name}", __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; a user's mistake prints one sentence and returns 2, never a traceback."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, MemoryError) as error:
        print(f"slipstream {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
