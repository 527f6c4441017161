"""Slipstream: training-free ways to sample diffusion models, as a Python library and as ComfyUI nodes."""

from __future__ import annotations

import pathlib
import re
from typing import Any

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "load"]

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = "./web"


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

# `__package__` is empty only when a tool (pytest's collector) runs this file as a loose module; the host always sets it.
if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


def load(*args: Any, **kwargs: Any) -> Any:
    """Load a model as a `Pipeline`: see `slipstream.core.loading.load`."""
    from .core.loading import load as load_pipeline

    return load_pipeline(*args, **kwargs)
