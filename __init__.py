"""Slipstream: training-free ways to sample diffusion models, as a Python library and as ComfyUI nodes."""

from __future__ import annotations

import pathlib
import re
from importlib import import_module
from typing import Any

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "load"]

WEB_DIRECTORY = "./web"
_PARTS = ("core", "cow", "stream", "search", "edit", "lmd", "nodes")
_MAPPINGS = ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS")


def _version() -> str:
    """Return the version in pyproject.toml, which is the only place that holds it; a wheel holds it as metadata instead."""
    project = pathlib.Path(__file__).resolve().parent / "pyproject.toml"
    if project.is_file():
        # Python 3.10 has no tomllib.
        found = re.search(r'^version = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    from importlib.metadata import version

    return version("slipstream-diffusion")


__version__ = _version()


def __getattr__(name: str) -> Any:
    """Import a part, or the nodes, when asked for: so a command can be cancelled from the start, before torch is imported."""
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    if name in _MAPPINGS:
        return globals().setdefault(name, getattr(import_module(".nodes", __name__), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(*args: Any, **kwargs: Any) -> Any:
    """Load a model as a `Pipeline`: see `slipstream.core.loading.load`."""
    from .core.loading import load as load_pipeline

    return load_pipeline(*args, **kwargs)
