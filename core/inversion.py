"""DDIM inversion: latents moved up in noise along the network's own estimate."""

from __future__ import annotations

from torch import Tensor

from .denoiser import NoiseSpace
from .guidance import Denoise


def invert_step(
    denoise: Denoise, x: Tensor, low: Tensor, high: Tensor, space: NoiseSpace, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `x` (B, C, H, W) moved up from level `low` to `high`, and the denoised estimate (arXiv 2010.02502 section 4.3).

    The noise is asked for at the level it goes to, not at the one it leaves: level 0 needs no special case, and detail that the
    model finds impossible (the edge of a cut-out) at most doubles per step, where the other choice multiplies it by the ratio of
    the levels. `seen` is what the network is shown at `high`; left out, `x` with the signal of that level.
    """
    if seen is None:
        seen = x * (space.scale(high) / space.scale(low))
    denoised = denoise(seen, high)
    noise = space.noise_of(seen, denoised, high)
    clean = (x - low * noise) / space.scale(low)
    return space.add_noise(clean, noise, high), denoised
