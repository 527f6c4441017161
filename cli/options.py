"""The options that commands share, each spelled, explained and checked in one place, and the parser that reports mistakes."""

from __future__ import annotations

import argparse
import logging
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NoReturn

from ..core.checks import check_text
from ..core.device import DTYPES
from ..core.files import check_output
from ..core.images import check_image_name
from ..core.pipeline import Pipeline
from ..core.unused import Unused, without_effect

log = logging.getLogger(__name__)

IMAGE = "image"  # in place of suffixes: whatever Pillow writes
LARGEST_SEED = 2**64 - 1
NEGATIVE_RULE = Unused("negative", lambda v: v.cfg_scale == 1, "at --cfg 1, which is off. Raise it.")
SHARED = ("--model", "--vae", "--device", "--dtype", "--size", "--seed")


class _Help(argparse.HelpFormatter):
    """Help that ends with the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = isinstance(action.default, (str, int, float, pathlib.Path)) and not isinstance(action.default, bool)
        known = not shown or action.default in ("", argparse.SUPPRESS) or "default" in (action.help or "default")
        return action.help if known else f"{action.help} (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, and whose help names every default.

    Attributes:
        arguments: the options behind arguments of the library, beside their `dest`.
        unused: rules of options that have no effect beside others; see `core.unused`.
    """

    arguments: dict[str, str] = {}
    unused: tuple[Unused, ...] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Note the parser of the innermost command in the namespace as `parser`."""
        namespace, rest = super().parse_known_args(args, namespace)
        namespace.parser = getattr(namespace, "parser", self)
        return namespace, rest

    def warnings(self, args: argparse.Namespace) -> Iterator[str]:
        """Yield one sentence for each option that is not at its default and has no effect beside the others."""
        options = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        yield from without_effect(
            self.unused, args, lambda name: getattr(args, name) != self.get_default(name), options.__getitem__
        )

    def explain(self, error: BaseException) -> str:
        """Return an error of a command in one line that begins with the option behind the argument that the error names."""
        text = " ".join(str(error).split("\n")) or type(error).__name__
        options = {action.dest: action.option_strings[0] for action in self._actions if action.option_strings}
        found = re.match(r"Expected `(\w+)`", text)
        option = {**options, **self.arguments}.get(found[1]) if found else None
        return f"{self.prog}: {f'argument {option}: ' if option else ''}{text}"


class UsageError(Exception):
    """A mistake on the command line; the text is complete."""


class _WithoutEffect(argparse.Action):
    """An option of other commands that this one takes, so that one set of options fits all, and warns about."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        log.warning("%s has no effect on `%s`.", self.option_strings[0], parser.prog)


# ------------------------------------------------------------------------------------------------ values


def checked(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return `check` as a type for argparse, which else hides the text of a ValueError."""

    def convert(value: str) -> Any:
        try:
            return check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def number(low: float = -math.inf, high: float = math.inf) -> Callable[[str], Any]:
    """Return the type of a finite number from `low` to `high`."""
    return checked(lambda value: _within(_parsed(float, value, "a number"), low, high))


def integer(low: float = -math.inf, high: float = math.inf) -> Callable[[str], Any]:
    """Return the type of an integer from `low` to `high`."""
    return checked(lambda value: _within(_parsed(int, value, "an integer"), low, high))


def _parsed(kind: type, value: str, what: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"Expected {what}, but got {value!r}.") from None


def _within(value: float, low: float, high: float) -> float:
    if value in (math.inf, -math.inf) or not low <= value <= high:  # NaN is in no range
        limits = "" if math.isinf(low) else f" of {low} or more" if math.isinf(high) else f" from {low} to {high}"
        raise ValueError(f"Expected a finite number{limits}, but got {value}.")
    return value


@checked
def text(value: str) -> str:
    """The type of text for a model."""
    return check_text("text", value)


def parse_size(value: str) -> tuple[int, int]:
    """Return (height, width) of WIDTHxHEIGHT; raises ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value.strip().lower())
    if not found or 0 in (sides := (int(found[2]), int(found[1]))):
        raise ValueError(f"Expected WIDTHxHEIGHT in pixels, but got {value!r}. Example: 512x512.")
    return sides


# ------------------------------------------------------------------------------------------------ options


def add_model(parser: Any, default: str = "pocket") -> None:
    """Declare --model, --vae, --device and --dtype; see `load_pipeline`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=default,
        help='"pocket", "pocket-lcm", a diffusers folder or a .safetensors file',
    )  # fmt: skip
    group.add_argument("--vae", help="another VAE, for example a tiny one (TAESD): a folder or a .safetensors file")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: SLIPSTREAM_DEVICE, else CUDA if available)")
    group.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: float16 on CUDA, else float32)")


def load_pipeline(args: argparse.Namespace) -> Pipeline:
    """Return the model that the options of `add_model` name."""
    from ..core.loading import load

    return load(args.model, args.device, args.dtype, vae=args.vae)


def add_prompt(parser: Any, help: str = "what the image shows", **options: Any) -> None:
    """Declare --prompt and --negative; `options` are argparse's, for --prompt."""
    parser.add_argument("--prompt", type=text, help=help, **options)
    parser.add_argument("--negative", type=text, default="", help="what to avoid")


def add_steps(parser: Any, default: int, low: float = -math.inf, help: str = "denoising steps") -> None:
    """Declare --steps."""
    parser.add_argument("--steps", type=integer(low), default=default, help=help)


def add_cfg(parser: Any, default: float | None, note: str = "") -> None:
    """Declare --cfg."""
    help = f"guidance scale, 1 is off {note}".rstrip()
    parser.add_argument("--cfg", dest="cfg_scale", metavar="SCALE", type=number(), default=default, help=help)


def add_seed(parser: Any, *aliases: str, default: int = 0, **options: Any) -> None:
    """Declare --seed."""
    seed = integer(0, LARGEST_SEED)
    parser.add_argument("--seed", *aliases, type=seed, default=default, help="of the noise", **options)


def add_size(parser: Any, note: str, type: Callable[[str], Any] | None = None) -> None:
    """Declare --size, --width and --height; `size_of` reads them."""
    parser.add_argument("--size", type=type or checked(parse_size), metavar="WIDTHxHEIGHT", help=note)
    parser.add_argument("--width", type=integer(1), help=argparse.SUPPRESS)
    parser.add_argument("--height", type=integer(1), help=argparse.SUPPRESS)


def size_of(args: argparse.Namespace, default: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) as --size, --width and --height say, and as in `default` where they do not."""
    height, width = args.size or default
    return args.height or height, args.width or width


def check_cells(pipe: Pipeline, height: int, width: int) -> None:
    """Raise ValueError for a size that is not in whole latent cells."""
    if height % pipe.downscale or width % pipe.downscale:
        raise ValueError(f"Expected `size` in multiples of {pipe.downscale} for this model, but got {width}x{height}.")


def joined_sizes(words: Sequence[str]) -> list[str]:
    """Return a command line in which an older `--size HEIGHT WIDTH` is written as `--size WIDTHxHEIGHT`."""
    joined = re.sub(r"(^|\0)--size\0(\d+)\0(\d+)(?=\0|$)", r"\1--size\0\3x\2", "\0".join(words))
    return joined.split("\0") if words else []


def add_output(
    parser: Any, *flags: str, kind: Collection[str] | str = IMAGE, help: str = "file of the result",
    **options: Any,
) -> None:  # fmt: skip
    """Declare an output file, refused at once when it cannot be written; `kind` is IMAGE or the suffixes that are possible."""
    name = flags[0].lstrip("-")

    def check(value: str) -> pathlib.Path:
        path = pathlib.Path(value).expanduser()
        if kind == IMAGE:
            check_image_name(path)
        return check_output(name, path, () if kind == IMAGE else kind)

    parser.add_argument(*flags, type=checked(check), help=help, **options)


def add_without_effect(parser: argparse.ArgumentParser) -> None:
    """Take the shared options that `parser` has no use for, and warn when one is given."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    for flag in SHARED:
        if flag not in known:
            parser.add_argument(flag, action=_WithoutEffect, help=argparse.SUPPRESS)
