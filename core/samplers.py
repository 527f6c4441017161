"""Samplers on a guided model: plain loops over descending sigmas (S+1,) that hold for VE and FLOW models alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_choice, check_finite, check_sigmas
from .denoiser import Denoiser, NoiseSpace
from .guidance import Denoise
from .noise import NoiseSource
from .progress import Callback, Reporter


def euler(
    denoise: Denoise, x: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource | None = None,
    callback: Callback | None = None, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Euler steps, deterministic at `eta` 0 (arXiv 2206.00364 alg. 1 without churn), with fresh noise after each step above."""
    if eta and noise is None:
        raise ValueError("Expected `noise` for a sampler that adds noise, but got None. Give `SeededNoise(seed)`.")
    report = Reporter(len(sigmas) - 1, callback)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        denoised = denoise(x, sigma)
        fresh = noise(x) if noise is not None and eta and sigma_next > 0 else None
        x = space.step(x, denoised, sigma, sigma_next, eta, fresh)
        report("sample", sigma_next, denoised)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource | None = None,
    callback: Callback | None = None, eta: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler with fresh noise after each step: k-diffusion's ancestral sampler, DDIM at eta 1. Needs `noise`."""
    return euler(denoise, x, sigmas, space, noise, callback, eta)


def heun(
    denoise: Denoise, x: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Heun's second-order steps, two network calls each but for the last (arXiv 2206.00364 alg. 1)."""
    report = Reporter(len(sigmas) - 1, callback)
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        x_next = space.step(x, denoised, sigma, sigma_next)
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
        report("sample", sigma_next, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M), one network call a step (arXiv 2211.01095 alg. 2), in log-SNR time of either noise space."""
    report = Reporter(len(sigmas) - 1, callback)
    previous, h_previous = None, x.new_zeros(())
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        denoised = denoise(x, sigma)
        h = _log_snr(space, sigma_next) - _log_snr(space, sigma)
        target = denoised
        # The first flow step starts at infinite log-SNR distance (scale 0), the last step ends there: both first order.
        if previous is not None and sigma_next > 0 and torch.isfinite(h_previous):
            target = denoised + h / (2 * h_previous) * (denoised - previous)
        x = space.step(x, target, sigma, sigma_next)
        previous, h_previous = denoised, h
        report("sample", sigma_next, denoised)
    return x


def _log_snr(space: NoiseSpace, sigma: Tensor) -> Tensor:
    return space.scale(sigma).log() - sigma.log()


def start_scale(model: Denoiser, sigma: float) -> float:
    """Return the standard deviation of the noise that a run starts with: `sigma`, and at sigma_max that of a noised image.

    A variance-preserving network was trained on images whose variance at sigma_max is 1 + sigma_max^2; the host starts so too.
    """
    if model.space.name == "flow" or sigma < model.sigma_max * (1 - 1e-5):
        return sigma
    return (1 + sigma**2) ** 0.5


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


def sample(
    name: str, denoise: Denoise, x: Tensor, sigmas: Tensor, space: NoiseSpace, noise: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:  # fmt: skip
    """Run a named sampler from `x` (B, C, H, W) at sigmas[0]; raises ValueError for bad sigmas, NaN or an unknown name."""
    check_choice("sampler", name, SAMPLERS)
    check_sigmas("sigmas", sigmas)
    check_finite("x", x)
    # Differences of half-precision levels would be rounded to nothing.
    levels = sigmas.to(x.device, torch.promote_types(sigmas.dtype, torch.float32))
    return SAMPLERS[name](denoise, x, levels, space, noise, callback)
