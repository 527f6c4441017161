"""Node that loads the bundled model, a diffusers folder or a checkpoint, for stock nodes and ours alike."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass
from typing import Any

import torch

from ..core.loading import POCKETS
from ..core.loading import bundled as bundled_model
from .widgets import choice, integer, watched


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


def checkpoints() -> list[str]:
    """Return the checkpoints that the host lists and that hold tensors alone; none without a host."""
    try:
        import folder_paths
    except ImportError:
        return []
    return [name for name in folder_paths.get_filename_list("checkpoints") if name.endswith(".safetensors")]


def find(name: str) -> Folder | pathlib.Path:
    """Return the folder, or the checkpoint's file, of a listed model; raises ValueError when it is gone."""
    known = {**listed(), **bundled()}
    if name in known:
        return known[name]
    if name in checkpoints():
        import folder_paths

        return pathlib.Path(folder_paths.get_full_path_or_raise("checkpoints", name))
    raise ValueError(
        f"Expected `model` to be one of {', '.join(map(repr, [*known, *checkpoints()]))}, but got {name!r}. "
        "Put the diffusers folder into models/diffusers, or the checkpoint into models/checkpoints, and refresh."
    )


def files_of(model: str) -> list[pathlib.Path]:
    found = find(model)
    return [found] if isinstance(found, pathlib.Path) else sorted(p for p in found.path.rglob("*") if p.is_file())


class LoadModel:
    """Loads a diffusers folder or a checkpoint as the host's own MODEL, CLIP and VAE."""

    CATEGORY = "slipstream/models"
    DESCRIPTION = (
        "Loads a bundled pocket model, a checkpoint, or a diffusers folder from models/diffusers, as ordinary MODEL, CLIP and "
        "VAE, with the image size that it was made for. Every stock node works with them. The pocket models need no download: "
        "they make 128 x 128 images of coloured shapes, to try the examples and to test workflows."
    )
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "INT", "INT")
    RETURN_NAMES = ("MODEL", "CLIP", "VAE", "width", "height")
    OUTPUT_TOOLTIPS = (
        "The diffusion model, for any sampler. LoRA, ControlNet and attention patches work on it.",
        "The text encoder, for CLIPTextEncode.",
        "Turns images into latents and back.",
        "Width in pixels of the images that the model was made for, for an empty latent.",
        "Height in pixels of the images that the model was made for, for an empty latent.",
    )
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tooltip = (
            "pocket: the tiny model that comes with this pack. pocket-lcm: the same for 4 steps at cfg 1. pocket-flow: a tiny flow "
            "transformer (Lumina2). Others: folders in models/diffusers with a model_index.json, and .safetensors files in "
            "models/checkpoints, loaded as by the host's Load Checkpoint."
        )
        return {"required": {"model": choice([*bundled(), *listed(), *checkpoints()], "pocket", tooltip)}}

    @classmethod
    def IS_CHANGED(cls, model: str) -> str | float:
        return watched(lambda: files_of(model))

    def load(self, model: str) -> tuple[Any, Any, Any, int, int]:
        from .host.diffusers_folder import load_checkpoint, load_folder
        from .host.native import checkpoint_side, folder_side, hinted

        found = find(model)
        if isinstance(found, pathlib.Path):
            made, clip, vae = load_checkpoint(found)
            side = checkpoint_side(made)
        else:
            made, clip, vae = load_folder(found.path, found.network, found.scheduler)
            made.model.model_config.label = model
            side = folder_side(found.path, found.network)
        return hinted(made, side), clip, vae, side, side


class EmptyLatent:
    """An empty latent of the size that a MODEL was made for."""

    CATEGORY = "slipstream/models"
    DESCRIPTION = (
        "An empty latent of the size and the channels of the connected model. Change the model and the size follows. "
        "Its width and height fit masks and canvases of the same image."
    )
    RETURN_TYPES = ("LATENT", "INT", "INT")
    RETURN_NAMES = ("latent", "width", "height")
    OUTPUT_TOOLTIPS = (
        "For KSampler and every other sampler.",
        "Width of the image in pixels.",
        "Height of the image in pixels.",
    )
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tip = "{} of the image in pixels. 0 takes the model's own."
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that samples, from any loader."}),
                "width": integer(0, 0, 16384, tip.format("Width"), step=8),
                "height": integer(0, 0, 16384, tip.format("Height"), step=8),
                "batch_size": integer(1, 1, 4096, "How many images."),
            }
        }

    def make(self, model: Any, width: int, height: int, batch_size: int) -> tuple[dict[str, Any], int, int]:
        import comfy.model_management

        from .host.native import cell_of, frame_side, warn_of_size

        cell, channels = cell_of(model), model.get_model_object("latent_format").latent_channels
        columns, rows = frame_side(model, "width", width) // cell, frame_side(model, "height", height) // cell
        width, height = cell * columns, cell * rows
        warn_of_size("Empty Latent for Model", model, "the size is", width, height, "Set it to {}, or to 0.")
        samples = torch.zeros(batch_size, channels, rows, columns, device=comfy.model_management.intermediate_device())
        return {"samples": samples}, width, height


NODES = {
    "SlipstreamLoadModel": (LoadModel, "Load Model"),
    "SlipstreamEmptyLatent": (EmptyLatent, "Empty Latent for Model"),
}
