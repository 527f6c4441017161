"""Move, resize, turn, paste, re-texture and drag in a photo: DiffEditor (arXiv 2402.02583), or a draft mode on any model."""

from __future__ import annotations

from .config import EditConfig
from .drafted import DraftedEdit, prepare_draft, sample_draft
from .geometry import Canvas
from .guided import GuidedEdit, prepare
from .harmonise import HARMONISE, harmonise, prepare_harmony
from .invert import Inversion, invert, taken
from .loop import edit, sample_edit
from .pixels import EditResult, finish, fit
from .tasks import Appearance, Drag, Move, Paste, Remove, Task, Tasks

__all__ = [
    "HARMONISE",
    "Appearance",
    "Canvas",
    "DraftedEdit",
    "Drag",
    "EditConfig",
    "EditResult",
    "GuidedEdit",
    "Inversion",
    "Move",
    "Paste",
    "Remove",
    "Task",
    "Tasks",
    "edit",
    "finish",
    "fit",
    "harmonise",
    "invert",
    "prepare",
    "prepare_draft",
    "prepare_harmony",
    "sample_draft",
    "sample_edit",
    "taken",
]
