"""What a user would do instead of COW: image to image, masked replacement, RePaint. Each in a few lines on any Denoiser."""

from __future__ import annotations

import math

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
    """Sample from noise with the kept part replaced at each step by the kept part under one fixed noise: the host's noise mask."""
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


def lanpaint(
    denoise: Denoise, canvas: Tensor, keep: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource, inner: int = 5,
    guide: float = 8.0, step: float = 0.4, friction: float = 2.0,
) -> Tensor:  # fmt: skip
    """Underdamped Langevin dynamics of `inner` steps at each level, then a step down (LanPaint, arXiv 2502.03491): inner + 1 calls a level.

    Written from its equations. The free part follows the model's score; the kept part the bidirectional guided score,
    (1 + guide) times that of its own noised self minus guide times the model's, so that it answers to the free part. Time is in units
    of the level's variance; each step is split as in BAOAB (Leimkuhler and Matthews, 2013).
    """
    x = space.add_noise(canvas, noise(canvas), sigmas[0])
    for high, low in zip(sigmas[:-1], sigmas[1:]):
        scale = space.scale(high)
        if float(scale) < 0.05:  # pure noise holds nothing to draw from
            x = space.step(x, keep * canvas + (1 - keep) * denoise(x, high), high, low)
            continue
        width, y = high / scale, x / scale

        def force(
            y: Tensor, width: Tensor = width, scale: Tensor = scale, high: Tensor = high
        ) -> tuple[Tensor, Tensor]:
            denoised = denoise(y * scale, high)
            score = (denoised - y) / width
            return (1 - keep) * score + keep * ((1 + guide) * (canvas - y) / width - guide * score), denoised

        pull, denoised = force(y)
        speed = noise(y)
        left = math.exp(-friction * step)
        for _ in range(inner):
            speed = speed + step / 2 * pull
            y = y + step / 2 * width * speed
            speed = left * speed + math.sqrt(1 - left**2) * noise(y)
            y = y + step / 2 * width * speed
            pull, denoised = force(y)
            speed = speed + step / 2 * pull
        x = space.step(y * scale, keep * canvas + (1 - keep) * denoised, high, low)
    return x
