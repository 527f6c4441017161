"""What a user would do instead of COW: image to image, masked replacement, RePaint. Each in a few lines on any Denoiser."""

from __future__ import annotations

from slipstream.core.denoiser import NoiseSpace
from slipstream.core.guidance import Denoise
from slipstream.core.noise import NoiseSource
from torch import Tensor


def image_to_image(denoise: Denoise, canvas: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource) -> Tensor:
    """Noise the pasted canvas to sigmas[0] and sample down (SDEdit, arXiv 2108.01073)."""
    x = space.add_noise(canvas, noise(canvas), sigmas[0])
    for high, low in zip(sigmas[:-1], sigmas[1:]):
        x = space.step(x, denoise(x, high), high, low)
    return x


def masked_replacement(
    denoise: Denoise, canvas: Tensor, keep: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource, eta: float
) -> Tensor:
    """Sample from noise with the kept part replaced at each step by itself under one fixed noise: the host's noise mask."""
    fixed = noise(canvas)
    x = space.add_noise(canvas, fixed, sigmas[0])
    for high, low in zip(sigmas[:-1], sigmas[1:]):
        x = space.step(x, denoise(x, high), high, low, eta, noise(x) if eta and low > 0 else None)
        x = keep * space.add_noise(canvas, fixed, low) + (1 - keep) * x if low > 0 else x
    return x


def repaint(
    denoise: Denoise, canvas: Tensor, keep: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource, repeats: int
) -> Tensor:
    """Masked replacement with fresh noise, each step taken `repeats` times with re-noising between (arXiv 2201.09865 alg. 1)."""
    x = space.add_noise(canvas, noise(canvas), sigmas[0])
    for high, low in zip(sigmas[:-1], sigmas[1:]):
        for repeat in range(repeats):
            x = space.step(x, denoise(x, high), high, low, 1.0, noise(x) if low > 0 else None)
            if low > 0:
                x = keep * space.add_noise(canvas, noise(x), low) + (1 - keep) * x
            if repeat < repeats - 1:
                x = space.renoise(x, low, high, noise(x))
    return x
