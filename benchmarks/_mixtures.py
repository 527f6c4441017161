"""Models whose score is known exactly: Gaussian mixtures in 2 and 64 dimensions, as eps and as flow models. No weights, no training."""

from __future__ import annotations

import math

import torch
from slipstream.core.denoiser import FLOW, VE, Conditioning
from slipstream.core.schedules import DiscreteLevels, FlowLevels, Levels, scaled_linear_alphas_cumprod
from torch import Tensor

SHIFT = 3.0  # of the flow form's levels, as SD3 has it


class Mixture:
    """Data = sum_k w_k N(mu_k, s_k^2 I) as (D, 1, 1) latents; E[x0 | x] in closed form.

    x = a x0 + sigma n, with a = 1 (VE) or 1 - sigma (`flow`). With v_k = a^2 s_k^2 + sigma^2 and p_k proportional to
    w_k N(x; a mu_k, v_k): E[x0 | x] = sum_k p_k (mu_k + a s_k^2 / v_k (x - a mu_k)).
    """

    def __init__(self, centres: Tensor, widths: Tensor, weights: Tensor, flow: bool = False) -> None:
        self.centres, self.variances = centres.double(), widths.double() ** 2
        self.log_weights = (weights.double() / weights.double().sum()).log()
        self.space = FLOW if flow else VE
        self.levels: Levels = FlowLevels(SHIFT) if flow else DiscreteLevels(scaled_linear_alphas_cumprod())
        self.sigma_min, self.sigma_max = self.levels.sigma_min, self.levels.sigma_max
        self.calls = self.rows = 0

    @property
    def size(self) -> tuple[int, int, int]:
        return (self.centres.shape[1], 1, 1)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        flat, sigma = x.flatten(1).double(), sigma.double()[:, None]
        scale = self.space.scale(sigma)
        total = scale**2 * self.variances[None] + sigma**2  # (B, K)
        distance = (
            (flat**2).sum(1)[:, None] + scale**2 * (self.centres**2).sum(1)[None] - 2 * scale * (flat @ self.centres.T)
        )
        logits = self.log_weights - 0.5 * distance / total - 0.5 * flat.shape[1] * total.log()
        share = torch.softmax(logits, 1)
        gain = share * scale * self.variances / total
        denoised = (share - scale * gain) @ self.centres + gain.sum(1, keepdim=True) * flat
        return denoised.to(x.dtype).reshape(x.shape)

    def draw(self, count: int, seed: int) -> Tensor:
        """Return exact samples (count, D)."""
        generator = torch.Generator().manual_seed(seed)
        picks = torch.multinomial(self.log_weights.exp(), count, True, generator=generator)
        noise = torch.randn(count, self.centres.shape[1], generator=generator, dtype=torch.float64)
        return self.centres[picks] + self.variances[picks, None].sqrt() * noise


def ring(flow: bool = False) -> Mixture:
    """Nine modes in 2-D: a ring of eight, narrow and wide in turn, and a heavier one in the middle."""
    angle = torch.arange(8) / 8 * 2 * math.pi
    centres = torch.cat([1.2 * torch.stack([angle.cos(), angle.sin()], 1), torch.zeros(1, 2)])
    return Mixture(centres, torch.tensor([0.05, 0.1] * 4 + [0.15]), torch.tensor([1.0] * 8 + [2.0]), flow)


def digits(count: int = 500, flow: bool = False) -> Mixture:
    """A kernel density over scikit-learn's 8 x 8 digits: 64 dimensions, width 0.12."""
    import numpy as np
    from sklearn.datasets import load_digits

    pixels = load_digits().data.astype(np.float32) / 8 - 1
    order = np.random.default_rng(0).permutation(len(pixels))[:count]
    return Mixture(torch.from_numpy(pixels[order]), torch.full((count,), 0.12), torch.ones(count), flow)
