"""Inception v3 features for FID, from weights that the user has. Nothing is downloaded."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def inception_embedding(weights: str | pathlib.Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Return IMAGE (B, H, W, 3) in [0, 1] -> pool3 features (B, 2048), for `NetworkFeatures`.

    A file with torch-fidelity's FID weights (its keys begin with `Conv2d_1a_3x3` and end in `fc` of 1008 classes) is run by
    torch-fidelity; any other state dict by torchvision's inception_v3, in torchvision's convention (299 pixels, ImageNet mean and
    deviation). Only the former gives FIDs that compare with published ones. Raises ValueError for a file or package that is missing.
    """
    path = pathlib.Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(
            f"Expected `weights` to be a file of Inception weights, but got {str(path)!r}. Slipstream downloads none."
        )
    state = _read(path)
    if state.get("fc.weight", torch.zeros(0)).shape[:1] == (1008,):
        return _fidelity(state, device)
    return _torchvision(state, device)


def _read(path: pathlib.Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile file makes of the unpickler
        raise ValueError(
            f"Expected `weights` to hold a state dict of tensors, but could not read {path.name!r} as one "
            f"({type(error).__name__}). Use the file as published."
        ) from error


def _fidelity(state: dict[str, Tensor], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            "Expected torch-fidelity for these weights, but it is not installed. pip install torch-fidelity"
        ) from error
    # It unpickles whatever file it is given: it gets one that holds nothing but the tensors that were read safely.
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, f"{folder}/weights.pth")
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=f"{folder}/weights.pth"
        )
    network = network.to(device).eval()

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        pixels = (images[..., :3].movedim(-1, 1).clamp(0, 1) * 255).round().to(device, torch.uint8)
        return network(pixels)[0].float().cpu()

    return embed


def _torchvision(state: dict[str, Tensor], device: torch.device | str) -> Callable[[Tensor], Tensor]:
    try:
        from torchvision.models import inception_v3
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            "Expected torchvision for Inception features, but it is not usable here. Compare pixels or CLIP vision instead."
        ) from error
    network = inception_v3(
        weights=None, init_weights=False, transform_input=False, aux_logits="AuxLogits.fc.weight" in state
    )
    network.load_state_dict(state)
    network.fc = torch.nn.Identity()
    network = network.to(device).eval()
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).reshape(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device).reshape(3, 1, 1)

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        pixels = images[..., :3].movedim(-1, 1).float().to(device)
        pixels = F.interpolate(pixels, (299, 299), mode="bilinear", antialias=True, align_corners=False)
        return network((pixels - mean) / deviation).float().cpu()

    return embed
