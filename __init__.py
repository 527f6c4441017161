"""Slipstream: training-free ways to sample diffusion models, as a Python library and as ComfyUI nodes."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "load"]

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = "./web"

# `__package__` is empty only when a tool (pytest's collector) runs this file as a loose module; the host always sets it.
if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


def load(*args: Any, **kwargs: Any) -> Any:
    """Load a model as a `Pipeline`: see `slipstream.core.loading.load`."""
    from .core.loading import load as load_pipeline

    return load_pipeline(*args, **kwargs)
