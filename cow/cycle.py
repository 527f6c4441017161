"""The cycle: disturb the canvas to a higher level, then reconstruct it step by step with the subject put back at each level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from ..core.denoiser import Cond, Denoiser, NoiseSpace
from ..core.guidance import Denoise, cfg, denoise_many, guided, own_guidance
from ..core.masks import grow, touched
from ..core.noise import NoiseSource
from ..core.progress import Reporter
from .config import CowConfig, Plan


@dataclass(frozen=True)
class Subject:
    """What is kept: the canvas's latents at every level of the plan, and how firmly each cell is held (B, 1, H, W).

    Below the plan's `stop` nothing is put back.
    """

    latents: list[Tensor]
    keep: Tensor
    plan: Plan

    def put_back(self, x: Tensor, step: int) -> Tensor:
        """Return `x` (B, C, H, W), which is at level `step`, with the subject's latents of that very level in place."""
        return torch.where(self.keep >= self.plan.threshold(step), self.latents[step], x)

    def redrawn(self, clean: Tensor, noise: Tensor, firm: Tensor, levels: Tensor, space: NoiseSpace) -> Subject:
        """Return the subject on its scene instead of the canvas, for the levels up to `plan.low`: it is held with the cells around it.

        `clean` is the encoded scene with the subject's pixels in place. Cells that the subject fills keep their own noise, cells
        that it shares with the scene take the scene's `noise`. `firm` (B, 1, H, W) is the mask's highest value in each cell: a
        shared cell is right now, so it is held as long as its firmest pixel.
        """
        low = self.plan.low
        own = space.noise_of(self.latents[low], self.latents[0], levels[low])
        noise = torch.where(self.keep == 1, own, noise)
        latents = [space.add_noise(clean, noise, level) for level in levels[: low + 1]]
        return replace(self, latents=latents, keep=widened(firm, 1))


@dataclass(frozen=True)
class Repel(Generic[Cond]):
    """Guidance that pushes the background away from `suppress` and towards `enhance`: up to 4B rows a step.

    The published base of the extrapolation is uncond + weight * (suppress - enhance) outside the subject; it is affine in
    the denoised estimate, so it holds for every kind of model. Whichever of the two is None counts as `uncond`.
    """

    model: Denoiser[Cond]
    cond: Cond
    uncond: Cond
    cfg_scale: float
    keep: Tensor
    weight: float = 1.0
    suppress: Cond | None = None
    enhance: Cond | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        conds = [cond for cond in (self.suppress, self.enhance) if cond is not None]
        own = own_guidance(self.model)
        asked = [self.uncond, *conds] if own is not None else [self.uncond, *conds, self.cond]
        negative, *others = denoise_many(self.model, x, sigma, asked)
        suppressed = others.pop(0) if self.suppress is not None else negative
        enhanced = others.pop(0) if self.enhance is not None else negative
        base = negative + self.weight * (1 - self.keep) * (suppressed - enhanced)
        if own is not None:
            return own(x, sigma, self.cond, self.uncond, self.cfg_scale, base)
        return cfg(base, others[0], self.cfg_scale)


def make_repel(
    model: Denoiser[Cond], cond: Cond, uncond: Cond | None, config: CowConfig, keep: Tensor,
    suppress: Cond | None, enhance: Cond | None,
) -> Repel[Cond] | None:  # fmt: skip
    """Return the guidance of the cycles with `suppress` or `enhance`, None without both; raises ValueError without `uncond`."""
    if config.repel == 0 or (suppress is None and enhance is None):
        return None
    if uncond is None:
        raise ValueError("Expected `uncond` beside `suppress` or `enhance`, but got None. Encode an empty prompt.")
    return Repel(model, cond, uncond, config.cfg_scale, keep, config.repel, suppress, enhance)


@dataclass(frozen=True)
class MaskedCFG(Generic[Cond]):
    """Classifier-free guidance whose scale is 1 where `unguided` (B, 1, H, W) is 1: 2B rows, as `CFG`.

    A model that guides itself does so everywhere.
    """

    model: Denoiser[Cond]
    cond: Cond
    uncond: Cond | None
    cfg_scale: float
    unguided: Tensor

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.uncond is None or self.cfg_scale == 1 or own_guidance(self.model) is not None:
            return guided(self.model, x, sigma, self.cond, self.uncond, self.cfg_scale)
        negative, positive = denoise_many(self.model, x, sigma, [self.uncond, self.cond])
        return cfg(negative, positive, self.cfg_scale + self.unguided * (1 - self.cfg_scale))


def around(keep: Tensor) -> Tensor:
    """Return the ring around the subject, an eighth of the shorter side wide, as `keep`: (B, 1, H, W) or (B, 1, 1, H, W).

    There a prompt that names the subject makes more of it in the last descent.
    """
    return widened(touched(keep).to(keep), max(1, min(keep.shape[-2:]) // 8)) * (1 - keep)


def widened(keep: Tensor, cells: int) -> Tensor:
    """Return `keep` (B, 1, H, W) or (B, 1, 1, H, W) with each cell as firmly held as the firmest within `cells` of it."""
    return grow(keep.flatten(0, -3), cells).reshape(keep.shape)


def down(
    denoise: Denoise, x: Tensor, subject: Subject, levels: Tensor, steps: range, space: NoiseSpace, eta: float, noise: NoiseSource,
    report: Reporter, phase: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `x` below the last of the descending `steps` and the last denoised estimate, the subject put back after each step."""
    for step in steps:
        x, denoised = descend(denoise, x, levels, step, space, eta, noise)
        x = subject.put_back(x, step - 1)
        report(phase, levels[step - 1], denoised)
    return x, denoised


def cycle(
    denoise: Denoise, x: Tensor, subject: Subject, levels: Tensor, space: NoiseSpace, eta: float, noise: NoiseSource,
    report: Reporter, phase: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `x` at level `low` after one disturbance and reconstruction, and the last denoised estimate.

    (high - low) network calls. arXiv 2306.08247 section 4.2, with all levels aligned: the disturbance ends at the level
    that the first step assumes.
    """
    plan = subject.plan
    x = space.renoise(x, levels[plan.low], levels[plan.high], noise(x))
    x = subject.put_back(x, plan.high)
    return down(denoise, x, subject, levels, range(plan.high, plan.low, -1), space, eta, noise, report, phase)


def descend(
    denoise: Denoise, x: Tensor, levels: Tensor, step: int, space: NoiseSpace, eta: float, noise: NoiseSource
) -> tuple[Tensor, Tensor]:
    """Return `x` one level below `step` and the denoised estimate: a DDIM step with variance `eta`."""
    denoised = denoise(x, levels[step])
    fresh = noise(x) if eta and step > 1 else None
    return space.step(x, denoised, levels[step], levels[step - 1], eta, fresh), denoised
