"""A model whose every answer is known exactly: stationary Gaussian fields. No weights, no training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from slipstream.core.denoiser import VE, Conditioning, per_row
from slipstream.core.schedules import DiscreteLevels, scaled_linear_alphas_cumprod
from torch import Tensor


class GaussianField:
    """Periodic fields (1, size, size) of unit variance with spectrum (1 + (length k)^2)^-roughness; E[x0 | x] is a Wiener filter."""

    latent_channels = 1

    def __init__(self, size: int = 24, length: float = 1.5, roughness: float = 2.0) -> None:
        k = torch.fft.fftfreq(size) * 2 * torch.pi
        spectrum = (1 + length**2 * (k[:, None] ** 2 + k[None] ** 2)) ** -roughness
        self.spectrum = spectrum / spectrum.mean()
        self.size, self.space = size, VE
        self.levels = DiscreteLevels(scaled_linear_alphas_cumprod())
        self.sigma_min, self.sigma_max = self.levels.sigma_min, self.levels.sigma_max
        self.calls = self.rows = 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        gain = self.spectrum / (self.spectrum + per_row(sigma, x) ** 2)
        return torch.fft.ifft2(torch.fft.fft2(x) * gain).real

    def sample(self, count: int, seed: int) -> Tensor:
        """Return `count` fields (B, 1, size, size)."""
        white = torch.randn(count, 1, self.size, self.size, generator=torch.Generator().manual_seed(seed))
        return torch.fft.ifft2(torch.fft.fft2(white) * self.spectrum.sqrt()).real

    def covariance(self) -> Tensor:
        """Return the covariance of all cells (size^2, size^2) in float64."""
        kernel = torch.fft.ifft2(self.spectrum.double()).real
        index = torch.arange(self.size)
        shift = (index[:, None] - index[None]) % self.size
        rows = kernel[shift[:, None, :, None], shift[None, :, None, :]]  # (y, x, y', x')
        return rows.reshape(self.size**2, self.size**2)


@dataclass
class Bed:
    """Fields of which a square is kept, on a background of zeros; the true rest is known in distribution."""

    model: GaussianField
    truth: Tensor
    keep: Tensor

    @classmethod
    def make(cls, count: int = 64, seed_size: int = 10, size: int = 24, seed: int = 4321) -> Bed:
        """`seed` is that of the fields; a method whose noise has the same seed would start from what the fields were made of."""
        model = GaussianField(size)
        keep = torch.zeros(1, 1, size, size)
        start = (size - seed_size) // 2
        keep[..., start : start + seed_size, start : start + seed_size] = 1
        return cls(model, model.sample(count, seed), keep)

    @property
    def canvas(self) -> Tensor:
        return self.truth * self.keep

    def metrics(self, x: Tensor) -> dict[str, float]:
        """Return the measures of a result (B, 1, H, W); ideals are 0 for the seed's error and 1 for everything else."""
        pasted = torch.where(self.keep > 0, self.truth, x)
        outside = (self.keep == 0).expand_as(x)
        return {
            "seed RMSE": float((x - self.truth)[~outside].square().mean().sqrt()),
            "seam": self._seam(x),
            "seam after paste": self._seam(pasted),
            "background variance": float(x[outside].var()),
            "Mahalanobis": self._mahalanobis(pasted),
        }

    def _seam(self, x: Tensor) -> float:
        """Mean squared jump across the edge of the mask over its expectation in real fields."""
        jumps, expected = [], []
        for axis in (2, 3):
            edge = (self.keep != self.keep.roll(-1, axis)).expand_as(x)
            jumps.append((x - x.roll(-1, axis)).square()[edge])
            one = self.model.covariance().reshape(*[self.model.size] * 4)
            expected.append(2 * (one[0, 0, 0, 0] - (one[0, 0, 1, 0] if axis == 2 else one[0, 0, 0, 1])))
        return float(torch.cat(jumps).mean() / torch.stack(expected).mean())

    def _mahalanobis(self, x: Tensor) -> float:
        """Squared Mahalanobis distance of the background given the true seed, per dimension."""
        covariance = self.model.covariance()
        kept = self.keep.flatten() > 0
        across, inner = covariance[~kept][:, kept], covariance[kept][:, kept]
        gain = torch.linalg.solve(inner, across.T).T
        conditional = covariance[~kept][:, ~kept] - gain @ across.T
        flat = x.flatten(1).double()
        residual = flat[:, ~kept] - flat[:, kept] @ gain.T
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(conditional), residual.T, upper=False)
        return float(white.square().mean())
