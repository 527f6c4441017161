"""Inversion: the canvas's own noisy latents at every level, found by running the sampler upwards."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.denoiser import NoiseSpace
from ..core.guidance import Denoise
from ..core.inversion import invert_step
from ..core.masks import touched
from ..core.progress import Reporter


def invert(denoise: Denoise, latents: Tensor, levels: Tensor, space: NoiseSpace, report: Reporter) -> list[Tensor]:
    """Return the latents at each of the ascending `levels` (K+1,), from the clean `latents` (B, C, H, W) at levels[0] = 0.

    K network calls, see `core.inversion.invert_step`.
    """
    path = [latents]
    for low, high in zip(levels[:-1], levels[1:]):
        x, denoised = invert_step(denoise, path[-1], low, high, space)
        path.append(x)
        report("invert", high, denoised)
    return path


def limit_noise(path: list[Tensor], keep: Tensor, levels: Tensor, space: NoiseSpace, limit: float) -> list[Tensor]:
    """Return the inverted latents with the subject's noise scaled back where it is stronger than its level allows.

    Deviation from the paper: a subject unlike anything the model knows inverts to noise of a root mean square far above 1
    per channel. The network then takes the whole image for noisier than its timestep says, and leaves speckle all over the
    background. What inverts well stays as it is. `keep` (B, 1, H, W) weighs the cells.
    """
    limited = []
    for x, sigma in zip(path, levels):
        if sigma > 0:
            noise = space.noise_of(x, path[0], sigma)
            power = (noise**2 * keep).sum((-2, -1), keepdim=True) / keep.sum((-2, -1), keepdim=True)
            held = space.add_noise(path[0], noise / (power.sqrt() / limit).clamp(min=1), sigma)
            x = torch.where(touched(keep) & (power.sqrt() > limit), held, x)
        limited.append(x)
    return limited
