"""Cyclic One-Way Diffusion: a subject's pixels stay while a scene grows around it."""

from .config import CowConfig
from .sampling import CowResult, generate

__all__ = ["CowConfig", "CowResult", "generate"]
