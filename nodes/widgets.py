"""The widgets of the nodes: each returns one entry of INPUT_TYPES, with further options of the host as keywords; and their checks.

`advanced=True` is for what experts change: the frontend shows it on demand.
"""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from ..core.checks import check_choice, check_range
from ..core.files import stamp

Widget = tuple[Any, dict[str, Any]]


def integer(default: int, low: int, high: int, tooltip: str, **more: Any) -> Widget:
    return "INT", {"default": default, "min": low, "max": high, "tooltip": tooltip, **more}


def number(default: float, low: float, high: float, tooltip: str, step: float = 0.01, **more: Any) -> Widget:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **more}


def choice(choices: Iterable[str], default: str, tooltip: str, **more: Any) -> Widget:
    return list(choices), {"default": default, "tooltip": tooltip, **more}


def switch(default: bool, tooltip: str, **more: Any) -> Widget:
    return "BOOLEAN", {"default": default, "tooltip": tooltip, **more}


def string(default: str, tooltip: str, **more: Any) -> Widget:
    return "STRING", {"default": default, "tooltip": tooltip, **more}


def seed(tooltip: str, default: int = 0, high: int = 2**64 - 1) -> Widget:
    """A seed of a sampling; the frontend may change it after each run."""
    return integer(default, 0, high, tooltip, control_after_generate=True)


def watched(files: Callable[[], Iterable[pathlib.Path]]) -> str | float:
    """Return what IS_CHANGED must for a node that reads `files()`: another value when one of them has changed.

    Where they cannot be listed, because one is missing or its name is linked (None), it is NaN: the node runs in every run.
    """
    try:
        return stamp(*files())
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError):
        return math.nan


def refusal(node: type[Any], check: Callable[..., object], **values: Any) -> bool | str:
    """Return what VALIDATE_INPUTS must, before anything runs: True, or one sentence that says what is wrong.

    The host no longer checks the range of an input that VALIDATE_INPUTS names, so that is checked here first.

    Args:
        node: the class.
        check: called with the values as keywords when all of them are known; raises ValueError.
        values: widgets by name; None for one that is linked, whose value is not known yet.
    """
    declared = node.INPUT_TYPES()
    specs = {**declared.get("required", {}), **declared.get("optional", {})}
    known = {name: value for name, value in values.items() if value is not None}
    try:
        for name, value in known.items():
            _check_widget(name, specs[name], value)
        if len(known) == len(values):
            check(**values)
    except ValueError as error:
        return str(error)
    return True


def _check_widget(name: str, spec: Any, value: Any) -> None:
    kind, options = spec[0], spec[1]
    if isinstance(kind, list):
        check_choice(name, value, kind)
    elif kind in ("INT", "FLOAT"):
        check_range(name, value, options["min"], options["max"])


# Nothing, a hidden file, what some system takes for a path or refuses, and devices of Windows with any ending.
NO_STEM = re.compile(r'^$|^\.|\.$|[/\\:*?"<>|\x00-\x1f]|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def file_stem(name: str) -> str:
    """Return a file name without its ending; raises ValueError for what is no plain file name on every system."""
    stem = name.strip()
    for ending in (".json", ".safetensors"):
        stem = stem.removesuffix(ending)
    if len(stem) > 100:
        raise ValueError(f"Expected `name` of at most 100 characters, but got {len(stem)}. Shorten it.")
    if NO_STEM.search(stem):
        raise ValueError(f"Expected `name` to be a plain file name, but got {name!r}. Use letters, digits, - and _.")
    return stem


def work_seed(tooltip: str, high: int = 2**64 - 1) -> Widget:
    """The seed of work that resumes: the frontend must not change it, or the next run would begin other work."""
    return integer(0, 0, high, tooltip, control_after_generate=False)
