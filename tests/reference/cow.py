"""The published code's own sampling, level mismatches included: for comparison with recorded runs, not for images.

It differs from `generate` in what the levels are: the network is asked at timestep tau_k about latents that carry the level
of another step. So this file works on variance-preserving latents (x = sqrt(abar) x0 + sqrt(1 - abar) n) and names the
level a latent is taken to have beside the timestep that the network is asked at. Models with an alphas_cumprod table only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from slipstream.core.checks import check_choice, check_integer, check_range
from slipstream.core.denoiser import Conditioning, Denoiser
from slipstream.core.guidance import CFG, Denoise
from slipstream.core.noise import NoiseSource
from slipstream.core.schedules import TRAIN_STEPS, DiscreteLevels
from slipstream.cow.cycle import Repel
from torch import Tensor

# Which level the published inversion gives its latents: it follows the installed version of diffusers' inverse scheduler.
CONVENTIONS = ("0.17.1", "0.27.1")


@dataclass(frozen=True)
class PublishedConfig:
    """Settings of the published pipeline: `steps` sets replace, back and final steps at 0.5, 0.7 and 0.4 of it."""

    steps: int = 10
    cycles: int = 10
    cfg_scale: float = 7.5
    eta: float = 1.0
    final_eta: float = 0.1
    convention: str = "0.17.1"

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 5, TRAIN_STEPS)
        check_integer("cycles", self.cycles, 1)
        check_range("cfg_scale", self.cfg_scale, 0, 100)
        check_range("eta", self.eta, 0, 1)
        check_range("final_eta", self.final_eta, 0, 1)
        check_choice("convention", self.convention, CONVENTIONS)

    @property
    def spacing(self) -> int:
        return TRAIN_STEPS // self.steps

    @property
    def replace(self) -> int:
        return int(0.5 * self.steps)

    @property
    def back(self) -> int:
        return int(0.7 * self.steps)

    @property
    def final(self) -> int:
        return int(0.4 * self.steps)

    def timestep(self, step: int) -> int:
        return 1 + step * self.spacing


class VpSampler:
    """DDIM on variance-preserving latents, asked at one timestep and moved between any two levels."""

    def __init__(self, levels: DiscreteLevels) -> None:
        self.levels = levels

    def coefficients(self, timestep: int) -> tuple[float, float]:
        """Return (sqrt(abar), sqrt(1 - abar)); below timestep 0 the table's first entry counts."""
        sigma = float(self.levels.sigmas[max(timestep, 0)])
        return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5

    def noise_of(self, denoise: Denoise, x: Tensor, timestep: int) -> Tensor:
        """Return the network's noise estimate for `x` at `timestep`, through the denoised estimate."""
        alpha, s = self.coefficients(timestep)
        sigma = torch.tensor(s / alpha, dtype=torch.float32)
        return (x / alpha - denoise(x / alpha, sigma)) / sigma

    def move(
        self, denoise: Denoise, x: Tensor, timestep: int, level_from: int, level_to: int, eta: float = 0.0,
        noise: NoiseSource | None = None,
    ) -> Tensor:  # fmt: skip
        """Return `x` taken from one level to another with the noise estimated at `timestep` (arXiv 2010.02502 eq. 12)."""
        eps = self.noise_of(denoise, x, timestep)
        (a_from, s_from), (a_to, s_to) = self.coefficients(level_from), self.coefficients(level_to)
        clean = (x - s_from * eps) / a_from
        if not eta or noise is None:
            return a_to * clean + s_to * eps
        variance = (eta * s_to / s_from) ** 2 * (1 - (a_from / a_to) ** 2)
        return a_to * clean + (s_to**2 - variance) ** 0.5 * eps + variance**0.5 * noise(x)

    def disturb(self, x: Tensor, level_from: int, level_to: int, noise: NoiseSource) -> Tensor:
        ratio = self.coefficients(level_to)[0] / self.coefficients(level_from)[0]
        return ratio * x + (1 - ratio**2) ** 0.5 * noise(x)


def generate_published(
    model: Denoiser, seed_latents: Tensor, canvas_latents: Tensor, seed_mask: Tensor, place: tuple[int, int],
    cond: Conditioning, uncond: Conditioning, negative: Conditioning, suppress: Conditioning, enhance: Conditioning,
    config: PublishedConfig, noise: NoiseSource, trace: Callable[[str, Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Return the latents (1, C, H, W) that the published COW pipeline computes from the same noise.

    The seed crop (1, C, h, w) with its binary mask (h, w) sits at `place` (top, left) of the canvas and is inverted on its
    own. `trace` is called with a name and the latents after each operation.
    """
    show = trace or (lambda name, x: None)
    sampler, tau = VpSampler(model.levels), config.timestep  # type: ignore[arg-type]
    guided = CFG(model, cond, uncond, config.cfg_scale)
    seeds = _invert(sampler, guided, seed_latents, config, config.back)
    x = _invert(sampler, guided, canvas_latents, config, config.replace)[-1]
    for step, latents in enumerate(seeds):
        show(f"invert/seed/{step:02d}", latents)
    show(f"invert/canvas/{config.replace:02d}", x)

    top, left = place
    region = (..., slice(top, top + seed_mask.shape[-2]), slice(left, left + seed_mask.shape[-1]))
    keep = torch.zeros_like(x[:, :1])
    keep[region] = seed_mask

    def put_back(x: Tensor, step: int) -> Tensor:
        # Unscaled, as published: under 0.17.1 these latents are one step noisier than `x`.
        x = x.clone()
        x[region] = torch.where(seed_mask > 0, seeds[step], x[region])
        return x

    repel = Repel(model, cond, negative, config.cfg_scale, keep, 1.0, suppress, enhance)
    for index in range(config.cycles):
        name = f"cycle{index:02d}"
        x = sampler.disturb(x, tau(config.replace), tau(config.back), noise)
        show(f"{name}/disturbed", x)
        x = put_back(x, config.back)
        show(f"{name}/step{config.back:02d}/replaced", x)
        for step in range(config.back - 1, config.replace - 1, -1):
            x = sampler.move(repel, x, tau(step), tau(step), tau(step - 1), config.eta, noise)
            show(f"{name}/step{step:02d}/sampled", x)
            x = put_back(x, step)
            show(f"{name}/step{step:02d}/replaced", x)

    for step in range(config.replace - 1, -1, -1):
        x = sampler.move(guided, x, tau(step), tau(step), tau(step - 1), config.final_eta, noise)
        show(f"final/step{step:02d}/sampled", x)
        if step == config.final:
            x = put_back(x, step)
            show(f"final/step{step:02d}/replaced", x)
    return x


def _invert(sampler: VpSampler, denoise: Denoise, x: Tensor, config: PublishedConfig, steps: int) -> list[Tensor]:
    # The later scheduler takes every latent to be one step cleaner than the earlier one does.
    shift = 1 if config.convention == "0.27.1" else 0
    path = [x]
    for step in range(steps):
        levels = config.timestep(step - shift), config.timestep(step + 1 - shift)
        path.append(sampler.move(denoise, path[-1], config.timestep(step), *levels))
    return path
