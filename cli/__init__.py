"""The `slipstream` command: one sub-command per technique, each declared in a module of this folder."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from .options import Parser

log = logging.getLogger(__name__)
COMMANDS: tuple[str, ...] = ("cow", "edit", "lmd", "search", "stream", "live", "doctor")


def build_parser() -> Parser:
    """Return the parser with every technique's sub-command."""
    from .options import Parser

    parser = Parser(prog="slipstream", description="Training-free ways to sample diffusion models.")
    parser.add_argument("--version", action="version", version=f"slipstream {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f".{name}", __package__).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; a user's mistake prints one line and returns 2.

    Ctrl-C, SIGTERM and SIGHUP end it in good order, print one line and return 128 and the signal's number.
    """
    prog, ended = "slipstream", [signal.SIGINT]
    try:
        with _signals_as_ctrl_c(ended):
            args = _parsed(sys.argv[1:] if argv is None else argv)
            if args is None:
                return 2
            prog = args.parser.prog
            return _run(args)
    except KeyboardInterrupt as error:
        print(f"{prog}: cancelled{f': {error}' if str(error) else ''}", file=sys.stderr)
        return 128 + ended[-1]


def _parsed(argv: Sequence[str]) -> argparse.Namespace | None:
    """Return the options of a command line, or None after one line of what is wrong with it."""
    from ..core.checks import printable
    from .options import UsageError, joined_sizes

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    # Pillow's, of damaged records in a file, which are left out.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")  # our own limit is lower
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        return build_parser().parse_args(joined_sizes(argv))
    except UsageError as error:
        print(printable(str(error)), file=sys.stderr)
        return None


def _run(args: argparse.Namespace) -> int:
    """Run the sub-command that was parsed; a user's mistake prints one line and returns 2."""
    from ..core.checks import printable

    parser = vars(args).pop("parser")
    for text in parser.warnings(args):
        log.warning("%s", text)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, MemoryError) as error:
        print(printable(parser.explain(error)), file=sys.stderr)
        return 2


@contextmanager
def _signals_as_ctrl_c(ended: list[signal.Signals]) -> Iterator[None]:
    """Raise KeyboardInterrupt for the signals of `kill` and of a closed terminal too, and note them; those ignored stay so."""

    def interrupt(number: int, frame: Any) -> None:
        ended.append(signal.Signals(number))
        raise KeyboardInterrupt

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    found = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in found if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
