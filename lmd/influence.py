"""How far a change reaches: the difference of two runs against distance, step by step.

It is a description of two runs, not a physical constant: a denoising network sees the whole image at once, so no diffusion law
holds and nothing here is a diffusion coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.checks import check_finite
from ..core.masks import as_mask, touched


@dataclass(frozen=True)
class InfluenceProfile:
    """The difference of two runs against distance to what was changed.

    `distance` (D,): mean distance of each ring in cells, 0 for the changed region itself. `mean` (S, D): mean absolute
    difference in each ring at each of S steps. `heat` (S, H, W): the difference itself, averaged over batch and channels.
    `reach_e`, `reach_10` (S,): distance at which the mean first falls to 1/e and to 10 % of its value in the region; 0 when
    nothing changed, infinity when it never falls so far. `outside` (S,): share of the whole difference that lies outside.
    """

    distance: Tensor
    mean: Tensor
    heat: Tensor
    reach_e: Tensor
    reach_10: Tensor
    outside: Tensor


def distance_to(mask: Tensor) -> Tensor:
    """Return the Euclidean distance (H, W) in cells from every cell to the nearest touched cell of `mask` (H, W), exactly.

    Rows first, then the lower envelope over rows, one row at a time (as in Felzenszwalb & Huttenlocher 2012, brute force).
    """
    inside = touched(mask.float())
    if not inside.any():
        raise ValueError(
            "Expected `mask` with at least one painted cell, but got an empty mask. Paint what was changed."
        )
    height, width = mask.shape
    columns = torch.arange(width, dtype=torch.float64)
    gaps = (columns[:, None] - columns).square()  # (to, from)
    far = torch.full((width,), torch.inf, dtype=torch.float64)
    along = torch.stack([(gaps + torch.where(row, 0.0, far)).amin(1) for row in inside.cpu()])  # (H, W) squared
    rows = torch.arange(height, dtype=torch.float64)[:, None]
    return torch.stack([(along + (rows - y).square()).amin(0) for y in range(height)]).sqrt().float()


def influence(before: Tensor | Sequence[Tensor], after: Tensor | Sequence[Tensor], mask: Tensor) -> InfluenceProfile:
    """Compare two runs: `before` and `after` are (S, B, C, H, W), or S tensors (B, C, H, W), one for each step; of a
    video (B, C, T, H, W), averaged over its frames.

    `mask` (h, w) or (1, h, w), 1 = where the runs were made to differ, at any size. Raises ValueError for unequal shapes, NaN
    or an empty mask.
    """
    first, second = (torch.stack(list(run)).float().cpu() for run in (before, after))
    if first.ndim == 6:  # the frames of a video count as channels
        first, second = (run.flatten(2, 3) for run in (first, second))
    if first.shape != second.shape or first.ndim != 5:
        raise ValueError(
            f"Expected `before` and `after` of one shape (steps, batch, channels, height, width), but got "
            f"{tuple(first.shape)} and {tuple(second.shape)}. Run both with the same steps and size."
        )
    check_finite("before", first)
    check_finite("after", second)
    # A mask cell counts as changed if any part of it was.
    region = touched(as_mask(mask.cpu(), 1, *first.shape[-2:]))[0]
    heat = (second - first).abs().mean((1, 2))  # (S, H, W)
    distance = distance_to(region)
    ring = distance.round().long()
    ring = torch.where(region, 0, ring.clamp(min=1))
    counts = torch.bincount(ring.flatten())
    used = counts > 0
    sums = torch.stack([torch.bincount(ring.flatten(), h.flatten().double()) for h in heat])
    mean = (sums[:, used] / counts[used]).float()
    centres = (torch.bincount(ring.flatten(), distance.flatten().double())[used] / counts[used]).float()
    total = heat.flatten(1).sum(1)
    outside = torch.where(total > 0, (heat * ~region).flatten(1).sum(1) / total.clamp(min=1e-30), torch.zeros(()))
    reach = {share: torch.stack([reach_of(centres, m, share) for m in mean]) for share in (1 / math.e, 0.1)}
    return InfluenceProfile(centres, mean, heat, reach[1 / math.e], reach[0.1], outside)


def reach_of(distance: Tensor, mean: Tensor, share: float) -> Tensor:
    """Return where `mean` (D,) over ascending `distance` (D,) first falls to `share` of its first value.

    Between rings the logarithm is taken as linear, so an exponential gives its exact reach.
    """
    if mean[0] <= 0:
        # Equal runs reach nowhere; a change that shows only elsewhere has no scale to fall from.
        return mean.new_tensor(0.0 if not mean.any() else math.inf)
    below = (mean <= share * mean[0] * (1 + 1e-6)).nonzero().flatten()
    if not len(below):
        return mean.new_tensor(math.inf)
    high = int(below[0])
    low = high - 1
    drop, wanted = (torch.log((m / mean[low]).clamp(min=1e-30)) for m in (mean[high], share * mean[0]))
    return distance[low] + (distance[high] - distance[low]) * (wanted / drop).clamp(0, 1)


def recorded(steps: list[Tensor]) -> Tensor:
    """Stack the denoised estimates that a callback collected into (S, B, C, H, W); raises ValueError when there are none."""
    if not steps:
        raise ValueError("Expected a run of at least one step, but got none. Give sigmas of two or more levels.")
    return torch.stack([step.detach().float().cpu() for step in steps])
