"""DiffEditor: move, resize, paste, re-texture and drag in a photo (arXiv 2402.02583, arXiv 2307.02421)."""

from __future__ import annotations

from .config import EditConfig
from .geometry import Canvas
from .guided import GuidedEdit, prepare
from .invert import Inversion, invert
from .loop import edit, sample_edit
from .picture import EditResult, finish, fit
from .tasks import Appearance, Drag, Move, Paste, Task, Tasks

__all__ = [
    "Appearance",
    "Canvas",
    "Drag",
    "EditConfig",
    "EditResult",
    "GuidedEdit",
    "Inversion",
    "Move",
    "Paste",
    "Task",
    "Tasks",
    "edit",
    "finish",
    "fit",
    "invert",
    "prepare",
    "sample_edit",
]
