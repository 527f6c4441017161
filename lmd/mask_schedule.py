"""How much is masked, and which patches, over a run: the ratios of latent masking diffusion (arXiv 2312.07971)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check_choice, check_integer, check_range
from ..core.masks import as_mask
from ..core.noise import SeededNoise
from .tokens import lowest, masked_count, token_grid, tokens_to_cells, tokens_touched

DIRECTIONS = ("increasing", "decreasing")


def _linear(fraction: float) -> float:
    return fraction


def _piecewise(fraction: float) -> float:
    """Ramp to 5/12 of the way at 1/6, hold to 1/3, ramp to the end at 2/3, hold: 0.15, 0.40, 0.40, 0.75, 0.75 by default.

    The published code evaluates its second ramp from the start of the run, which would pass 1; this is the ramp it means.
    """
    knots = ((0.0, 0.0), (1 / 6, 5 / 12), (1 / 3, 5 / 12), (2 / 3, 1.0), (1.0, 1.0))
    for (left, low), (right, high) in zip(knots[:-1], knots[1:]):
        if fraction <= right:
            return low + (high - low) * (fraction - left) / (right - left)
    return 1.0


def _cosine(fraction: float) -> float:
    """Follow 1 - f(s) / f(0), f(s) = cos^2((s / N + 0.008) / 1.008 * pi / 2), up to N = 2/3 of the run, then hold."""
    if fraction >= 2 / 3:
        return 1.0

    def f(s: float) -> float:
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    return 1 - f(fraction * 3 / 2) / f(0.0)


def _fixed(fraction: float) -> float:
    return 1.0


KINDS: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "piecewise": _piecewise,
    "cosine": _cosine,
    "fixed": _fixed,
}


def mask_ratio(kind: str, fraction: float, low: float = 0.15, high: float = 0.75) -> float:
    """Return the masked share at `fraction` (0 to 1) of a run, between `low` and `high`; "fixed" is always `high`."""
    check_choice("kind", kind, KINDS)
    check_range("fraction", fraction, 0, 1)
    progress = KINDS[kind](fraction)
    return (1 - progress) * low + progress * high


@dataclass(frozen=True)
class MaskSchedule:
    """`masks` (steps, height, width) with 1 = masked, and `ratios`, the share of patches that each was asked to mask."""

    ratios: tuple[float, ...]
    masks: Tensor


def mask_schedule(
    steps: int,
    kind: str = "cosine",
    low: float = 0.15,
    high: float = 0.75,
    direction: str = "decreasing",
    patch: int = 2,
    seed: int = 0,
    nested: bool = True,
    height: int = 16,
    width: int = 16,
    region: Tensor | None = None,
) -> MaskSchedule:
    """Return `steps` random patch masks whose ratios follow a schedule, both of its ends included.

    The published order is "increasing" (a curriculum for training); sampling wants "decreasing", few visible patches first.
    Patches are `patch` x `patch` cells of `height` x `width`. With `nested` every smaller mask lies inside every larger one.
    `region` (H, W) limits the masks to the patches it touches, and ratios count those. One step has the `high` ratio.
    Raises ValueError for values out of range.
    """
    check_integer("steps", steps, 1, 10_000)
    check_integer("patch", patch, 1, min(height, width), "Use smaller patches or larger latents.")
    check_range("low", low, 0, 1)
    check_range("high", high, low, 1, "`high` must not be below `low`.")
    check_choice("direction", direction, DIRECTIONS)
    ratios = [mask_ratio(kind, k / (steps - 1) if steps > 1 else 1.0, low, high) for k in range(steps)]
    if direction == "decreasing":
        ratios.reverse()
    rows, columns = token_grid(height, width, patch)
    inside = torch.ones(1, rows, columns, dtype=torch.bool)
    if region is not None:
        inside = tokens_touched(as_mask(region.cpu(), 1, height, width, "region"), patch)
    scores = _scores(steps, rows * columns, seed, nested)
    scores[~inside.flatten(1).expand_as(scores)] = torch.inf
    counts = [masked_count(int(inside.sum()), ratio) for ratio in ratios]
    chosen = torch.cat([lowest(score[None], count) for score, count in zip(scores, counts)])
    masks = tokens_to_cells(chosen.unflatten(1, (rows, columns)).float(), patch, height, width)
    return MaskSchedule(tuple(ratios), masks)


def _scores(steps: int, tokens: int, seed: int, nested: bool) -> Tensor:
    """Return random scores (steps, tokens), the same for every step when `nested`."""
    noise = SeededNoise(seed).fork("patches")
    return noise(torch.empty(1 if nested else steps, tokens)).repeat(steps if nested else 1, 1)
