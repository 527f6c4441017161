"""Guidance of a stream in x0 space, one rule for every step and kind of model, and blends of prompts.

Residual CFG (StreamDiffusion, arXiv 2312.12491 section 3.2) predicts the negative estimate instead of computing it. Carried
over to denoised estimates its virtual noise drops out: the negative is an anchor, the frame itself ("self") or the negative
prompt's estimate at the first step ("onetime"), so guidance is `anchor + scale * (denoised - anchor)`, here torch.lerp with
a weight above 1. The published feedback of virtual noise from frame to frame, which diverges with one step, is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice, check_range
from ..core.denoiser import Conditioning, Denoiser, per_row
from ..core.guidance import cfg, denoise_many
from .plan import MIN_SIGNAL, Plan

BLENDS = ("linear", "slerp")
# (plan, x (R, C, H, W), reference (R, C, H, W), guidance scale) -> denoised, reference
Guide = Callable[[Plan, Tensor, Tensor, float], "tuple[Tensor, Tensor]"]


def anchor(plan: Plan, x: Tensor, reference: Tensor) -> Tensor:
    """Return reference + (1 - delta) (x / a - reference), the residual negative estimate; no delta means 1."""
    if plan.delta is None:
        return reference
    return torch.lerp(x if plan.inverse_scale is None else x * plan.inverse_scale, reference, plan.delta)


def unguided(plan: Plan, x: Tensor, reference: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """R rows: the positive prompt only."""
    return plan.network(x), reference


def full(plan: Plan, x: Tensor, reference: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """2R rows: classifier-free guidance, negative rows first."""
    negative, positive = plan.network(torch.cat((x, x))).chunk(2)
    return torch.lerp(negative, positive, scale), reference


def self_negative(plan: Plan, x: Tensor, reference: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """R rows: the frame itself is the negative."""
    return torch.lerp(anchor(plan, x, reference), plan.network(x), scale), reference


def onetime_negative(plan: Plan, x: Tensor, reference: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """R + entering rows: the negative prompt is asked at a frame's first step, and its answer kept as the anchor."""
    if not plan.entering:
        return self_negative(plan, x, reference, scale)
    output = plan.network(torch.cat((x[: plan.entering], x)))
    reference = torch.cat((output[: plan.entering], reference[plan.entering :]))
    return torch.lerp(anchor(plan, x, reference), output[plan.entering :], scale), reference


GUIDES: dict[str, Guide] = {
    "none": unguided,
    "full": full,
    "self": self_negative,
    "onetime": onetime_negative,
}


@dataclass
class RCFG:
    """Residual CFG as a guided model for any sampler: (x (B, C, H, W), sigma) -> denoised. Good for one run.

    Args:
        model: the `Denoiser`.
        cond, uncond: prompt and negative prompt, 1 or B rows.
        guidance: "none" and "self" cost B rows a call, "onetime" 2B at the first call and B after it, "full" 2B.
        guidance_scale: 1 (off) or more.
        delta: see `StreamConfig`.
        reference: (B, C, H, W) the clean latents that "self" takes as the negative.
        combine: (positive, negative, x, sigma) -> guided, where a host adds patches of its own; default `cfg`.
    """

    model: Denoiser
    cond: Any
    uncond: Any
    guidance: str = "self"
    guidance_scale: float = 1.2
    delta: float = 1.0
    reference: Tensor | None = None
    combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_choice("guidance", self.guidance, tuple(GUIDES))
        check_range("guidance_scale", self.guidance_scale, 1, 100, "1 switches guidance off.")
        check_range("delta", self.delta, 0, 1)
        if self.guidance == "self" and self.reference is None and self.guidance_scale > 1:
            raise ValueError("Expected `reference` latents for guidance 'self', but got None. Use 'onetime'.")

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.guidance == "none" or self.guidance_scale == 1:
            return denoise_many(self.model, x, sigma, [self.cond])[0]
        if self.guidance == "full":
            negative, positive = denoise_many(self.model, x, sigma, [self.uncond, self.cond])
        else:
            if self.reference is None:
                self.reference, positive = denoise_many(self.model, x, sigma, [self.uncond, self.cond])
            else:
                positive = denoise_many(self.model, x, sigma, [self.cond])[0]
            negative = self._residual(x, sigma)
        if self.combine is not None:
            return self.combine(positive, negative, x, sigma)
        return cfg(negative, positive, self.guidance_scale)

    def _residual(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert self.reference is not None
        if self.delta == 1:
            return self.reference
        scale = self.model.space.scale(per_row(sigma, x))
        # Where a flow model's latent is noise only, there is no picture in it to move towards.
        delta = torch.where(scale < MIN_SIGNAL, 1.0, self.delta).to(x)
        return torch.lerp(x / scale.clamp(min=MIN_SIGNAL), self.reference, delta)


def blend(conds: Sequence[Conditioning], weights: Sequence[float], mode: str = "linear") -> Conditioning:
    """Return one prompt between several: weights are normalised to sum 1; "slerp" keeps the embeddings' length (two prompts).

    Raises ValueError for unequal lengths, negative or all-zero weights, and slerp between other than two prompts.
    """
    check_blend(len(conds), weights, mode)
    total = sum(weights)
    shares = [w / total for w in weights]
    if mode == "linear":
        return _combine(conds, lambda parts: sum(w * p for w, p in zip(shares, parts)))
    return _combine(conds, lambda parts: slerp(parts[0], parts[1], shares[1]))


def check_blend(prompts: int, weights: Sequence[float], mode: str) -> None:
    """Raise ValueError unless `weights` can blend so many prompts."""
    check_choice("mode", mode, BLENDS)
    if not prompts or prompts != len(weights):
        raise ValueError(f"Expected one weight per prompt, but got {prompts} prompts and {len(weights)} weights.")
    total = sum(weights)
    if min(weights) < 0 or not math.isfinite(total) or total <= 0:
        raise ValueError(f"Expected `weights` of at least 0 with a sum above 0, but got {list(weights)}.")
    if mode == "slerp" and prompts != 2:
        raise ValueError(f"Expected 2 prompts for slerp, but got {prompts}. Use linear.")


def _combine(conds: Sequence[Conditioning], fn: Callable[[Sequence[Tensor]], Any]) -> Conditioning:
    joined = conds[0].join(*conds[1:])  # brings contexts to one length and refuses unequal parts
    return joined.map(lambda t: fn(t.chunk(len(conds))) if t.is_floating_point() else t.chunk(len(conds))[0])


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate spherically along the last dimension; nearly parallel vectors are mixed linearly."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    angle = cosine.acos()
    sine = angle.sin()
    parallel = sine < 1e-4
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    curved = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / safe
    return torch.where(parallel, torch.lerp(a, b, weight), curved)
