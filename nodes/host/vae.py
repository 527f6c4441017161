"""Images and latents of a host VAE, one latent per image: a VAE of videos would take a batch of images for the frames of one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.transfer import Lane

if TYPE_CHECKING:
    from .denoiser import HostDenoiser

log = logging.getLogger(__name__)


def cell_side(vae: Any) -> int:
    """Return the side in pixels of what becomes one latent cell; a VAE of another pack may not have the host's method."""
    if hasattr(vae, "spacial_compression_encode"):
        return int(vae.spacial_compression_encode())
    ratio = getattr(vae, "downscale_ratio", 8)
    return int(ratio[-1] if isinstance(ratio, tuple) else ratio)  # of a video VAE: frames, height, width


def encode_images(vae: Any, images: Tensor) -> Tensor:
    """Return the LATENT samples (B, C, h, w), or (B, C, 1, h, w) of a VAE of videos, for IMAGE (B, H, W, 3)."""
    at_once = 1 if getattr(vae, "latent_dim", 2) == 3 else len(images)
    return torch.cat([vae.encode(part) for part in images.split(at_once)])


def decode_images(vae: Any, samples: Tensor) -> Tensor:
    """Return IMAGE (B, H, W, 3) for LATENT samples of one image each."""
    images: Tensor = vae.decode(samples)
    return images.flatten(0, -4)  # a VAE of videos gives (B, 1, H, W, 3)


@contextmanager
def while_sampling() -> Iterator[None]:
    """Within the context a VAE may run though a model is sampled with: what the host unloads for it is loaded again afterwards."""
    import comfy.model_management as memory

    loaded = memory.loaded_models(only_currently_used=True)
    try:
        yield
    finally:
        memory.load_models_gpu(loaded)


def vae_lanes(vae: Any, denoiser: HostDenoiser) -> dict[str, Lane]:
    """Return CUDA streams for the threads of a stream, on which the VAE works beside the network; none where weights travel.

    The network keeps the stream that the host prepares prompts and weights on. Weights that are not on the device the host brings for
    each call, by streams and buffers that serve one caller at a time.
    """
    device, networks = denoiser.device, (denoiser.model.diffusion_model, vae.first_stage_model)
    if device.type != "cuda" or any(weight.device != device for part in networks for weight in part.parameters()):
        return {}
    images = Lane(device)
    log.info("Live Stream: the VAE works on a CUDA stream of its own beside the network.")
    return {"encode": images, "denoise": Lane(device, shared=True), "decode": images}
