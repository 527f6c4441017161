"""The widgets of the nodes: each returns one entry of INPUT_TYPES. Further options of the host go in as keywords."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Widget = tuple[Any, dict[str, Any]]


def integer(default: int, low: int, high: int, tooltip: str, **more: Any) -> Widget:
    return "INT", {"default": default, "min": low, "max": high, "tooltip": tooltip, **more}


def number(default: float, low: float, high: float, tooltip: str, step: float = 0.01, **more: Any) -> Widget:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **more}


def choice(choices: Iterable[str], default: str, tooltip: str) -> Widget:
    return list(choices), {"default": default, "tooltip": tooltip}


def switch(default: bool, tooltip: str) -> Widget:
    return "BOOLEAN", {"default": default, "tooltip": tooltip}


def string(default: str, tooltip: str, **more: Any) -> Widget:
    return "STRING", {"default": default, "tooltip": tooltip, **more}


def seed(tooltip: str, default: int = 0, high: int = 2**64 - 1) -> Widget:
    """A seed of a sampling; the frontend may change it after each run."""
    return integer(default, 0, high, tooltip, control_after_generate=True)
