"""The photos that come with the pack, each with the mask of its subject (assets/README.md states their sources)."""

from __future__ import annotations

import pathlib

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
PHOTOS = {"astronaut": (ASSETS / "astronaut.jpg", ASSETS / "astronaut_mask.png")}
