"""Where things go: maps between pixels of the image and cells of the latents, explicit per cell, without wrap-around."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.masks import bounding_box, grow, snapped, touched
from ..core.points import Point


@dataclass(frozen=True)
class Canvas:
    """An image of `size` (height, width) pixels over a `grid` (h, w) of latent cells, `cell` pixels each, top left corners aligned.

    The grid may reach beyond the image: sizes that are no multiple of the cell are padded on the right and below.
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
        # On a grid of whole pixels area resizing is exact; a resized image has fractional cells, which it approximates.
        height, width = (max(s, round(g * self.cell)) for s, g in zip(self.size, self.grid))
        padded = F.pad(mask[None, None], (0, width - mask.shape[-1], 0, height - mask.shape[-2]))
        return snapped(F.interpolate(padded, self.grid, mode="area"))


@dataclass(frozen=True, eq=False)
class Photo:
    """An image (1, H, W, 3), if it is known, and how its pixels lie on the latents: all that a task needs before any sampling."""

    canvas: Canvas
    image: Tensor | None = None


def _centres(height: int, width: int, step: float) -> Tensor:
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([xs, ys], -1) * step


@dataclass(frozen=True)
class Placement:
    """A task in pixels: its target region (H, W), what it takes away, what of that stays uncovered, and where each pixel comes
    from (H, W, 2). `bends`: what it takes away is torn open by a bend, so that it is filled after the bend, not before. `source`
    is the object's mask (H_s, W_s) in the image that it comes from: colours are weighed by it, so that none of its surroundings
    come along. `carries` is False where nothing is carried and the target is repainted, `keeps` where what is carried is only a
    look to begin with. `hard`: what is carried keeps hard edges instead of being smoothed between pixels."""

    target: Tensor
    removed: Tensor
    vacated: Tensor
    points: Tensor
    bends: bool = False
    source: Tensor | None = None
    carries: bool = True
    keeps: bool = True
    hard: bool = False


@dataclass(frozen=True)
class Affine:
    """p -> centre + scale * R (p - centre) + shift, in pixels; R turns by `angle` degrees, clockwise in an image (y points down)."""

    centre: Point
    scale: float
    shift: Point
    angle: float = 0.0

    def forward(self, points: Tensor) -> Tensor:
        """Return where points (..., 2) go."""
        centre, shift = points.new_tensor(self.centre), points.new_tensor(self.shift)
        return self.scale * _turned(points - centre, self.angle) + centre + shift

    def inverse(self, points: Tensor) -> Tensor:
        """Return where points (..., 2) come from."""
        centre, shift = points.new_tensor(self.centre), points.new_tensor(self.shift)
        return _turned(points - centre - shift, -self.angle) / self.scale + centre


def _turned(points: Tensor, angle: float) -> Tensor:
    """Return points (..., 2) turned about the origin by `angle` degrees."""
    # Quarter turns are exact: their sine is 0, 1 or -1, never 1e-16.
    quarters, rest = divmod(angle, 90)
    sine, cosine = math.sin(math.radians(rest)), math.cos(math.radians(rest))
    for _ in range(int(quarters) % 4):
        sine, cosine = cosine, -sine
    x, y = points.unbind(-1)
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)


def centre_of(mask: Tensor, about: str) -> Point:
    """Return the fixed point of a scaling or a turn: the middle of the mask's bounding box, or of the image."""
    if about == "image":
        return mask.shape[-1] / 2, mask.shape[-2] / 2
    top, left, bottom, right = bounding_box(mask)
    return (left + right) / 2, (top + bottom) / 2


def sample_at(values: Tensor, points: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Return values (1, C, H, W) of an image of `size` at pixel coordinates (h, w, 2): (1, C, h, w), zero outside."""
    height, width = size
    normalised = points / points.new_tensor([width, height]) * 2 - 1
    return F.grid_sample(
        values.float(), normalised[None].to(values.device, torch.float32), mode, "zeros", align_corners=False
    )


def bent(points: Tensor, pairs: Sequence[tuple[Point, Point]], free: Tensor, power: float = 3.0) -> Tensor:
    """Return where points (..., 2) come from under a bend that takes every handle to its target.

    Shepard's interpolation of the shifts (weights 1 / distance^power to the targets), times `free` (...) in [0, 1]: exact at
    targets where `free` is 1, none where it is 0. One pair carries everything; a pair that stays pins its surroundings.
    """
    targets = points.new_tensor([t for _, t in pairs])
    pulls = points.new_tensor([[h[0] - t[0], h[1] - t[1]] for h, t in pairs])
    weights = 1 / (torch.cdist(points.reshape(-1, 2), targets) ** power + 1e-6)
    weights = weights / weights.sum(-1, keepdim=True)
    return points + free[..., None] * (weights @ pulls).reshape(points.shape)


def around(region: Tensor) -> Tensor:
    """Return 1 on the cells (1, 1, h, w) that a region touches and their neighbours, else 0."""
    return touched(grow(region, 1)).float()


def depth(mask: Tensor, most: int) -> Tensor:
    """Return how many pixels (at most `most`) each pixel of a mask (H, W) lies within it; the image's border is no edge."""
    inside, deep = mask > 0.5, torch.zeros_like(mask)
    for _ in range(most):
        deep = deep + inside
        inside = grow(inside, -1)
    return deep


def freedom(mask: Tensor, targets: Sequence[Point]) -> Tensor:
    """Return 1 deep inside a mask (H, W) and at all targets, fading to 0 at its edge over half of the least depth of a target."""
    deep = depth(mask, 64)
    height, width = mask.shape
    reached = [float(deep[min(int(y), height - 1), min(int(x), width - 1)]) for x, y in targets]
    share = (deep / max(1.0, min(reached) / 2)).clamp(max=1)
    return share * share * (3 - 2 * share)
