"""Node that loads the bundled model, or a diffusers folder, for stock nodes and ours alike."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass
from typing import Any

from ..core.loading import POCKETS
from ..core.loading import bundled as bundled_model
from .widgets import choice, watched


@dataclass(frozen=True)
class Folder:
    """A diffusers folder and the names of the parts to take from it."""

    path: pathlib.Path
    network: str = "unet"
    scheduler: str = "scheduler"


def bundled() -> dict[str, Folder]:
    """Return the models that come with the pack, by name."""
    found = {name: Folder(*parts) for name in POCKETS if (parts := bundled_model(name))}
    return {name: folder for name, folder in found.items() if (folder.path / folder.network).is_dir()}


def listed() -> dict[str, Folder]:
    """Return the diffusers folders that the host lists, by their path below models/diffusers; none without a host."""
    try:
        import folder_paths
    except ImportError:
        return {}
    found: dict[str, Folder] = {}
    for base in folder_paths.get_folder_paths("diffusers"):
        for path, _, files in os.walk(base, followlinks=True):
            if "model_index.json" in files:
                found.setdefault(os.path.relpath(path, base), Folder(pathlib.Path(path)))
    return dict(sorted(found.items()))


def find(name: str) -> Folder:
    """Return the folder of a listed model; raises ValueError when it is gone."""
    known = {**listed(), **bundled()}
    if name not in known:
        raise ValueError(
            f"Expected `model` to be one of {', '.join(map(repr, known))}, but got {name!r}. "
            "Put the diffusers folder into models/diffusers and refresh."
        )
    return known[name]


class LoadModel:
    """Loads a diffusers folder as the host's own MODEL, CLIP and VAE."""

    CATEGORY = "slipstream/models"
    DESCRIPTION = (
        "Loads a bundled pocket model, or a diffusers folder from models/diffusers, as ordinary MODEL, CLIP and VAE. "
        "Every stock node works with them. The pocket models need no download: they make 128 x 128 images of coloured "
        "shapes, to try the examples and to test workflows."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    RETURN_NAMES = ("MODEL", "CLIP", "VAE")
    OUTPUT_TOOLTIPS = (
        "The diffusion model, for any sampler. LoRA, ControlNet and attention patches work on it.",
        "The text encoder, for CLIPTextEncode.",
        "Turns pictures into latents and back.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "pocket: the tiny model that comes with this pack. pocket-lcm: the same for 4 steps at cfg 1. pocket-flow: a tiny flow "
            "transformer (Lumina2). Others: folders in models/diffusers with a model_index.json. For a single .safetensors "
            "checkpoint use Load Checkpoint: its MODEL works with all Slipstream nodes."
        )
        return {"required": {"model": choice([*bundled(), *listed()], "pocket", tooltip)}}

    @classmethod
    def IS_CHANGED(cls, model: str) -> str | float:
        return watched(lambda: sorted(p for p in find(model).path.rglob("*") if p.is_file()))

    def load(self, model: str) -> tuple[Any, Any, Any]:
        from .host.diffusers_folder import load_folder

        folder = find(model)
        return load_folder(folder.path, folder.network, folder.scheduler)


NODES = {"SlipstreamLoadModel": (LoadModel, "Load Model")}
