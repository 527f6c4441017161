"""Sampling a part of an image: what is held is shown to the network at its level and never changes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .denoiser import NoiseSpace
from .guidance import Denoise
from .tensors import blend


def held(
    denoise: Denoise, space: NoiseSpace, latents: Tensor, noise: Tensor, mask_at: Callable[[Tensor], Tensor]
) -> Denoise:
    """Return a `Denoise` that sees and gives clean `latents` (B, C, ..., H, W) outside a mask, 1 = repaint.

    The held part is re-noised with the same `noise` before every call (as in RePaint, arXiv 2201.09865, without its resampling),
    so the network sees it at the right level and any sampler keeps it on its path. `mask_at` (sigma -> mask that broadcasts over
    the latents) may hold more at one level than at another.
    """

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        mask = mask_at(sigma)
        seen = blend(space.add_noise(latents, noise, sigma), x, mask)
        return blend(latents, denoise(seen, sigma), mask)

    return call
