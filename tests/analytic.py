"""Exact denoisers: data whose posterior mean has a closed form, for tests that need no network."""

from __future__ import annotations

import torch
from slipstream.core.denoiser import VE, Conditioning, NoiseSpace, per_row
from slipstream.core.schedules import DiscreteLevels, FlowLevels, scaled_linear_alphas_cumprod
from torch import Tensor


class GaussianDenoiser:
    """Independent pixels N(mean, std^2), where the mean is taken from the conditioning (context[:, 0, 0]) plus `mean`.

    E[x0 | x] = mean + a std^2 / (a^2 std^2 + sigma^2) * (x - a mean), with a = 1 (VE) or 1 - sigma (FLOW).
    """

    def __init__(self, std: float = 1.0, mean: float = 0.0, space: NoiseSpace = VE) -> None:
        self.std, self.mean, self.space = std, mean, space
        self.levels = FlowLevels() if space.name == "flow" else DiscreteLevels(scaled_linear_alphas_cumprod())
        self.sigma_min, self.sigma_max = self.levels.sigma_min, self.levels.sigma_max
        self.calls = self.rows = 0
        self.latent_channels = 4

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        assert sigma.shape == (len(x),)
        self.calls += 1
        self.rows += len(x)
        mean = self.mean + cond.expand(len(x)).context[:, 0, 0].reshape(-1, *[1] * (x.ndim - 1)).to(x)
        sigma = per_row(sigma, x)
        scale = self.space.scale(sigma)
        return mean + scale * self.std**2 / (scale**2 * self.std**2 + sigma**2) * (x - scale * mean)


def constant_cond(value: float = 0.0, rows: int = 1) -> Conditioning:
    """Conditioning whose rows shift the mean of a `GaussianDenoiser` by `value`."""
    return Conditioning(torch.full((rows, 1, 1), float(value)))
