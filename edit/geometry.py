"""Where things go: maps between pixels of the picture and cells of the latents, explicit per cell, without wrap-around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.masks import bounding_box
from .tasks import Point


@dataclass(frozen=True)
class Canvas:
    """A picture of `size` (height, width) pixels over a `grid` (h, w) of latent cells, `cell` pixels each, top left corners aligned.

    The grid may reach beyond the picture: sizes that are no multiple of the cell are padded on the right and below.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    cell: float

    def pixel_centres(self) -> Tensor:
        """Return (H, W, 2) pixel coordinates (x, y) of every pixel's centre."""
        return _centres(*self.size, 1.0)

    def cell_centres(self) -> Tensor:
        """Return (h, w, 2) pixel coordinates (x, y) of every cell's centre."""
        return _centres(*self.grid, self.cell)

    def normalised(self, points: Tensor) -> Tensor:
        """Return pixel coordinates (..., 2) as `grid_sample` coordinates over the grid: -1 and 1 at its outer edges."""
        h, w = self.grid
        return points / points.new_tensor([w * self.cell, h * self.cell]) * 2 - 1

    def to_grid(self, mask: Tensor) -> Tensor:
        """Return a pixel mask (H, W) as the covered share of each cell (1, 1, h, w); padding is not covered."""
        # On a grid of whole pixels area resizing is exact; a resized picture has fractional cells, which it approximates.
        height, width = (max(s, round(g * self.cell)) for s, g in zip(self.size, self.grid))
        padded = F.pad(mask[None, None], (0, width - mask.shape[-1], 0, height - mask.shape[-2]))
        return F.interpolate(padded, self.grid, mode="area")

    def to_pixels(self, weights: Tensor) -> Tensor:
        """Return weights of the grid (1, 1, h, w) at picture size (H, W), bilinear."""
        points = self.normalised(self.pixel_centres())[None].to(weights)
        return F.grid_sample(weights, points, "bilinear", "border", align_corners=False)[0, 0]


def _centres(height: int, width: int, step: float) -> Tensor:
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([xs, ys], -1) * step


@dataclass(frozen=True)
class Placement:
    """A task in pixels: its target region (H, W), what it takes away, what of that stays uncovered, and where each pixel comes
    from (H, W, 2)."""

    target: Tensor
    removed: Tensor
    vacated: Tensor
    points: Tensor


@dataclass(frozen=True)
class Affine:
    """p -> centre + scale * (p - centre) + shift, in pixels."""

    centre: Point
    scale: float
    shift: Point

    def inverse(self, points: Tensor) -> Tensor:
        """Return where points (..., 2) come from."""
        centre, shift = points.new_tensor(self.centre), points.new_tensor(self.shift)
        return (points - centre - shift) / self.scale + centre


def centre_of(mask: Tensor, about: str) -> Point:
    """Return the fixed point of a scaling: the middle of the mask's bounding box, or of the picture."""
    if about == "image":
        return mask.shape[-1] / 2, mask.shape[-2] / 2
    top, left, bottom, right = bounding_box(mask)
    return (left + right) / 2, (top + bottom) / 2


def sample_at(values: Tensor, points: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Return values (1, C, H, W) of a picture of `size` at pixel coordinates (h, w, 2): (1, C, h, w), zero outside."""
    height, width = size
    normalised = points / points.new_tensor([width, height]) * 2 - 1
    return F.grid_sample(
        values.float(), normalised[None].to(values.device, torch.float32), mode, "zeros", align_corners=False
    )


def bent(points: Tensor, pairs: Sequence[tuple[Point, Point]], pinned: Tensor, power: float = 3.0) -> Tensor:
    """Return where points (..., 2) come from under a smooth bend that takes every handle to its target.

    Shepard's interpolation of the shifts (weights 1 / distance^power): exact at the targets, none at the `pinned` points (N, 2).
    """
    targets = torch.cat([points.new_tensor([t for _, t in pairs]), pinned.to(points)])
    pulls = points.new_tensor([[h[0] - t[0], h[1] - t[1]] for h, t in pairs])
    distance = torch.cdist(points.reshape(-1, 2), targets)
    weights = 1 / (distance**power + 1e-6)
    weights = weights[:, : len(pairs)] / weights.sum(-1, keepdim=True)
    return points + (weights @ pulls).reshape(points.shape)


def border_of(mask: Tensor, count: int = 96) -> Tensor:
    """Return up to `count` points (N, 2) spread along the inner border of a mask (H, W), the picture's own border included."""
    inside = F.pad((mask > 0.5).float(), (1, 1, 1, 1))
    eroded = -F.max_pool2d(-inside[None], 3, 1)[0]
    ys, xs = ((mask > 0.5) & (eroded < 0.5)).nonzero(as_tuple=True)
    points = torch.stack([xs + 0.5, ys + 0.5], -1)
    # Ordered by angle about their middle, so that the choice is even along a simple outline.
    offset = points - points.mean(0)
    points = points[torch.atan2(offset[:, 1], offset[:, 0]).argsort()]
    return points[torch.linspace(0, len(points) - 1, min(count, len(points))).round().long()]
