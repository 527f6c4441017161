"""Guidance of a stream, one rule for every step and kind of model, and blends of prompts.

Residual CFG (StreamDiffusion, arXiv 2312.12491 section 3.2; the formula is in `core.guidance`) takes an anchor as the negative
estimate: the frame itself ("self"), or the negative prompt's estimate at the frame's first step ("onetime"). Each frame keeps
its own anchor. The published feedback of virtual noise from frame to frame, which diverges with one step, is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_choice
from ..core.denoiser import Conditioning
from ..core.guidance import residual_negative
from .plan import Plan

BLENDS = ("linear", "slerp")
# (plan, x (R, C, H, W), reference (R, C, H, W), cfg_scale) -> denoised, reference
Guide = Callable[[Plan, Tensor, Tensor, float], "tuple[Tensor, Tensor]"]


def unguided(plan: Plan, x: Tensor, reference: Tensor, cfg_scale: float) -> tuple[Tensor, Tensor]:
    """R rows: the positive prompt only."""
    return plan.network(x) if plan.guided is None else plan.guided(x, None, 1.0), reference


def full(plan: Plan, x: Tensor, reference: Tensor, cfg_scale: float) -> tuple[Tensor, Tensor]:
    """2R rows: classifier-free guidance, negative rows first."""
    if plan.guided is not None:
        return plan.guided(x, None, cfg_scale), reference
    negative, positive = plan.network(torch.cat((x, x))).chunk(2)
    return torch.lerp(negative, positive, cfg_scale), reference


def self_negative(plan: Plan, x: Tensor, reference: Tensor, cfg_scale: float) -> tuple[Tensor, Tensor]:
    """R rows: the frame itself is the negative."""
    negative = residual_negative(x, reference, plan.residual)
    if plan.guided is not None:
        return plan.guided(x, negative, cfg_scale), reference
    return torch.lerp(negative, plan.network(x), cfg_scale), reference


def onetime_negative(plan: Plan, x: Tensor, reference: Tensor, cfg_scale: float) -> tuple[Tensor, Tensor]:
    """R + entering rows: the negative prompt is asked at a frame's first step, and its answer kept as the anchor."""
    if not plan.entering:
        return self_negative(plan, x, reference, cfg_scale)
    output = plan.network(torch.cat((x[: plan.entering], x)) if plan.guided is None else x[: plan.entering])
    reference = torch.cat((output[: plan.entering], reference[plan.entering :]))
    if plan.guided is not None:
        return self_negative(plan, x, reference, cfg_scale)
    return torch.lerp(residual_negative(x, reference, plan.residual), output[plan.entering :], cfg_scale), reference


GUIDES: dict[str, Guide] = {
    "none": unguided,
    "full": full,
    "self": self_negative,
    "onetime": onetime_negative,
}


def blend(conds: Sequence[Conditioning], weights: Sequence[float], mode: str = "linear") -> Conditioning:
    """Return one prompt between several: weights are normalised to sum 1; "slerp" keeps the embeddings' length (two prompts).

    A prompt whose weight is all of the sum is returned as it is. Otherwise a shorter prompt counts as zeros after its end.
    Raises ValueError for unequal lengths, negative or all-zero weights, and slerp between other than two prompts.
    """
    check_blend(len(conds), weights, mode)
    total = sum(weights)
    shares = [w / total for w in weights]
    if max(shares) == 1:
        return conds[shares.index(1)]
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
    mixed = joined.map(lambda t: fn(t.chunk(len(conds))) if t.is_floating_point() else t.chunk(len(conds))[0])
    if joined.mask is None or any(c.mask is None and c.context.shape[1] == joined.context.shape[1] for c in conds):
        return replace(mixed, mask=None)
    return replace(mixed, mask=torch.stack(joined.mask.chunk(len(conds))).any(0))


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate spherically along the last dimension; nearly parallel vectors are mixed linearly."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-1, 1).unsqueeze(-1)
    angle = cosine.acos()
    sine = angle.sin()
    parallel = sine < 1e-4
    safe = torch.where(parallel, torch.ones_like(sine), sine)
    curved = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / safe
    return torch.where(parallel, torch.lerp(a, b, weight), curved)
