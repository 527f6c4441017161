"""Where a displacement field tears or folds, and the fields to look at: a drag's, and the optical flow between two frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.checks import check_finite, check_integer, check_range, check_shape
from ..core.points import read_pairs
from ..core.tensors import gaussian_blur
from ..core.transfer import to_device


@dataclass(frozen=True)
class StretchMap:
    """`stretch` (B, H, W): log of the largest stretching; `fold` (B, H, W), bool: where the map turns over or collapses."""

    stretch: Tensor
    fold: Tensor


def gradient(field: Tensor) -> Tensor:
    """Return d field_i / d x_j as (B, 2, 2, H, W) of a field (B, 2, H, W), central differences, one-sided at the border."""
    dy, dx = torch.gradient(field, dim=(-2, -1))
    return torch.stack([dx, dy], 2)


def stretch_map(displacement: Tensor, frames: int = 1, backward: bool = False) -> StretchMap:
    """Return the stretch of the map x -> x + `displacement` (B, 2, H, W), x before y, in cells.

    ln(sigma_max(I + grad u)) / frames: the finite-time Lyapunov exponent of one known map (Haller 2015, Annu. Rev. Fluid Mech.
    47), with no trajectory behind it. `frames` is how many frames the map spans. It folds where det(I + grad u) <= 0.
    With `backward` the displacement says where each place comes from, as a warp has it: the stretching is then 1 / sigma_min.
    Raises ValueError for other shapes, fields below 2 x 2 cells, or NaN.
    """
    check_shape("displacement", displacement, (None, 2, None, None), "Give (batch, 2, height, width), x before y.")
    check_integer("frames", frames, 1)
    if min(displacement.shape[-2:]) < 2:
        raise ValueError(f"Expected `displacement` of at least 2 x 2 cells, but got {tuple(displacement.shape[-2:])}.")
    check_finite("displacement", displacement)
    # On the CPU: not every device has float64.
    deformation = gradient(displacement.cpu().double()) + torch.eye(2, dtype=torch.float64)[None, :, :, None, None]
    a, b, c, d = (deformation[:, i, j] for i in range(2) for j in range(2))
    determinant = a * d - b * c
    # The singular values of a 2 x 2 matrix are the sum and the difference of these.
    turning, shearing = torch.hypot(a + d, c - b) / 2, torch.hypot(a - d, b + c) / 2
    largest = 1 / (turning - shearing).abs().clamp(min=1e-3) if backward else turning + shearing
    stretch = (largest.clamp(min=1e-12).log() / frames).float()
    return StretchMap(stretch.to(displacement.device), (determinant <= 0).to(displacement.device))


def drag_field(handles: Tensor, targets: Tensor, height: int, width: int, radius: float) -> Tensor:
    """Return the displacement (1, 2, height, width) that moves `handles` (N, 2) to `targets` (N, 2), x before y, in cells.

    A Gaussian of standard deviation `radius` around each handle, weighted so that every handle moves exactly to its target and
    far cells stay. One drag of length L folds when L > radius * sqrt(e). Raises ValueError for bad shapes.
    """
    check_shape("handles", handles, (None, 2))
    check_shape("targets", targets, (len(handles), 2), "Give one target for each handle.")
    check_range("radius", radius, 0.25)
    if len(handles) == 0:
        return torch.zeros(1, 2, height, width)
    handles = handles.cpu().double()
    moves = targets.cpu().double() - handles
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([x.flatten(), y.flatten()], 1).double()

    def kernel(points: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(points, handles).square() / (2 * radius**2))

    # Least squares, so that two drags from one handle give their mean instead of a singular matrix.
    weights = torch.linalg.pinv(kernel(handles), rtol=1e-8) @ moves
    return (kernel(cells) @ weights).T.reshape(1, 2, height, width).float()


def parse_points(points: str) -> tuple[Tensor, Tensor]:
    """Return handles and targets (N, 2) of arrows in any form of `core.points`; raises ValueError naming the line that is not one."""
    found = torch.tensor(read_pairs(points)).reshape(-1, 2, 2)
    return found[:, 0], found[:, 1]


def warp(image: Tensor, displacement: Tensor, border: str = "border") -> Tensor:
    """Return `image` (B, C, H, W) sampled at x + `displacement` (B, 2, H, W), bilinear; beyond it the border or "zeros"."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).to(displacement) + displacement
    size = torch.tensor([width, height]).to(displacement).reshape(2, 1, 1)
    grid = ((2 * place + 1) / size - 1).movedim(1, -1)
    return F.grid_sample(image, grid, padding_mode=border, align_corners=False)


def compose(flows: Sequence[Tensor]) -> Tensor:
    """Return the displacement (B, 2, H, W) of following `flows` one after the other, each (B, 2, H, W)."""
    total = flows[0]
    for flow in flows[1:]:
        total = total + warp(flow, total)
    return total


def optical_flow(
    before: Tensor, after: Tensor, window: float = 3.0, rounds: int = 5, callback: Callable[[], object] | None = None
) -> Tensor:
    """Return the displacement (B, 2, H, W) from `before` to `after`, both (B, C, H, W): before(x) ~ after(x + flow(x)).

    Pyramidal Lucas-Kanade (Lucas & Kanade 1981; Bouguet 2001), dense: each cell solves least squares over a Gaussian window of
    standard deviation `window` cells, coarse to fine. Flat areas keep what their surroundings give, or zero. `callback` is called
    between its passes and may raise to stop.
    """
    check_shape("before", before, (None, None, None, None))
    check_shape("after", after, tuple(before.shape), "Both frames need one size.")
    check_finite("before", before)
    check_finite("after", after)
    check_range("window", window, 0.5, 100)
    pyramid = [(before.float(), to_device(after, before.device).float())]
    while min(pyramid[-1][0].shape[-2:]) >= 24:
        pyramid.append(tuple(F.avg_pool2d(gaussian_blur(i, 1.0, 3), 2) for i in pyramid[-1]))  # type: ignore[arg-type]
    flow = before.new_zeros(len(before), 2, *pyramid[-1][0].shape[-2:], dtype=torch.float32)
    for first, second in reversed(pyramid):
        ratio = torch.tensor([n / o for n, o in zip(first.shape[:1:-1], flow.shape[:1:-1])]).reshape(2, 1, 1).to(flow)
        flow = F.interpolate(flow, first.shape[-2:], mode="bilinear", align_corners=False) * ratio
        for _ in range(rounds):
            if callback is not None:
                callback()
            flow = _refine(first, second, flow, window)
    return flow


def _refine(first: Tensor, second: Tensor, flow: Tensor, window: float) -> Tensor:
    """Return `flow` after one Gauss-Newton step of every cell's window."""
    dy, dx = torch.gradient(first, dim=(-2, -1))
    # A cell whose target lies outside the image is ignored.
    seen = (warp(torch.ones_like(first[:, :1]), flow, "zeros") > 0.99).float()
    error = (first - warp(second, flow)) * seen
    dx, dy = dx * seen, dy * seen
    terms = torch.stack([(p * q).sum(1) for p, q in ((dx, dx), (dx, dy), (dy, dy), (dx, error), (dy, error))], 1)
    xx, xy, yy, xe, ye = gaussian_blur(terms, window, math.ceil(3 * window)).unbind(1)
    # The small ridge keeps flat windows where they are.
    ridge = 1e-4 * (xx + yy).mean((-2, -1), keepdim=True) + 1e-9
    xx, yy = xx + ridge, yy + ridge
    step = torch.stack([yy * xe - xy * ye, xx * ye - xy * xe], 1) / (xx * yy - xy * xy)[:, None]
    # Smoothing the sum lets windows without texture follow their neighbours; a linear flow stays what it is.
    return gaussian_blur(flow + step.clamp(-2, 2), window / 2, math.ceil(1.5 * window))
