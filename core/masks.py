"""MASK conventions and geometry: (B, H, W) in [0, 1], 1 = repaint as in the host unless the argument is called `keep`.

What counts as painted is decided here and nowhere else. A mask that comes in is cleaned (`clean`): black that is not quite 0 and
white that is not quite 1 become exact, soft edges in between keep their weight. Resizing then gives the covered share of each
cell, and a cell is touched by what exceeds the residue of a resize (`touched`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_finite, check_integer
from .tensors import gaussian_blur

# The black of video is 16 of 255 (0.063) and its white 235 (0.922); JPEG at quality 30 is off by up to 0.03 on top of that.
NOISE = 0.1
# One pixel of a cell of 8 x 8 is 0.016.
RESIDUE = 0.01


def snapped(mask: Tensor, margin: float = RESIDUE) -> Tensor:
    """Return a mask of any shape with values within `margin` of 0 or 1 made exact, and all others as they are."""
    return torch.where(mask <= margin, 0.0, torch.where(mask >= 1 - margin, 1.0, mask))


def clean(mask: Tensor) -> Tensor:
    """Return a mask of any shape without its noise: values up to 0.1 are 0, values from 0.9 are 1. Twice is as once."""
    return snapped(mask.float(), NOISE)


def touched(mask: Tensor) -> Tensor:
    """Return where (bool) a clean or resized mask of any shape covers anything."""
    return mask > RESIDUE


def painted(mask: Tensor, name: str = "mask") -> Tensor:
    """Return a mask as it comes from a user, (H, W), (B, H, W), (B, 1, H, W) or (B, 1, T, H, W), as clean floats (B, H, W) in [0, 1].

    uint8 counts from 0 to 255 when it holds more than 0 and 1; overshoot of a resize is cut off. Raises ValueError for other
    shapes, NaN, and values that have another scale.
    """
    if mask.ndim == 5 and mask.shape[1] == 1:  # of a video: what any of its frames covers
        mask = mask.amax(2)
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"Expected `{name}` of shape (batch, height, width), but got {tuple(mask.shape)}.")
    check_finite(name, mask, "Paint the mask again.")
    low, high = (float(v) for v in mask.float().aminmax())
    if mask.dtype == torch.uint8 and high > 1:
        mask, high = mask / 255, 1.0
    if low < -0.5 or high > 1.5:
        raise ValueError(
            f"Expected `{name}` with values between 0 and 1, but got {low:.4g} to {high:.4g}. Divide it by its largest value."
        )
    return clean(mask)


def as_mask(mask: Tensor, batch: int, height: int, width: int, name: str = "mask") -> Tensor:
    """Return `mask` as (batch, height, width) in [0, 1], cleaned (see `painted`) and then resized to covered shares.

    Fewer masks than images are repeated, as in the host. Raises ValueError as `painted` does, and when `batch` is no multiple of
    the number of masks.
    """
    mask = painted(mask, name)
    if batch % len(mask):
        raise ValueError(
            f"Expected `{name}` with 1 or {batch} masks, but got {len(mask)}. Give one mask, or one per image."
        )
    return resize_mask(mask, height, width).repeat(batch // len(mask), 1, 1)


def over(mask: Tensor, latents: Tensor) -> Tensor:
    """Shape a mask (B, H, W) so that it broadcasts over `latents` (B, C, H, W), or (B, C, T, H, W): the same in every frame."""
    return mask.reshape(len(mask), *[1] * (latents.ndim - 3), *mask.shape[-2:])


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize (B, H, W) by area when shrinking and bilinearly when growing; nearest would drop thin parts, bicubic overshoots."""
    if mask.shape[-2:] == (height, width):
        return mask
    shrink = height <= mask.shape[-2] and width <= mask.shape[-1]
    options = {"mode": "area"} if shrink else {"mode": "bilinear", "align_corners": False, "antialias": True}
    return snapped(F.interpolate(mask[:, None], (height, width), **options)[:, 0])


def grow(mask: Tensor, cells: int) -> Tensor:
    """Dilate (cells > 0) or erode (cells < 0) a mask (..., H, W), of numbers or bool, by a square of that radius.

    The image's border is an edge of neither the mask nor its complement.
    """
    check_integer("cells", cells, -math.inf)
    if cells < 0:
        return ~grow(~mask, -cells) if mask.dtype == torch.bool else 1 - grow(1 - mask, -cells)
    return _maximum_along(_maximum_along(mask, cells, -2), cells, -1)


def _maximum_along(mask: Tensor, reach: int, axis: int) -> Tensor:
    """Return the maximum within `reach` along an axis, in steps that double the reach: pooling takes time with its square."""
    size, done = mask.shape[axis], 0
    while done < min(reach, size - 1):
        step = min(done + 1, min(reach, size - 1) - done)  # a larger one would leave out values at the border
        head, tail = mask.narrow(axis, 0, size - step), mask.narrow(axis, step, size - step)
        mask = mask.clone()
        for part, other in ((mask.narrow(axis, step, size - step), head), (mask.narrow(axis, 0, size - step), tail)):
            part.copy_(torch.maximum(part, other))
        done += step
    return mask


def feather(mask: Tensor, radius: int) -> Tensor:
    """Blur a mask (B, H, W) with a Gaussian of standard deviation radius / 2, borders replicated."""
    check_integer("radius", radius, 0)
    if radius == 0:
        return mask
    radius = min(radius, min(mask.shape[-2:]) - 1)
    return gaussian_blur(mask[:, None], max(radius, 1) / 2, radius)[:, 0]


def bounding_box(mask: Tensor, threshold: float = 0.5, name: str = "mask") -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of a mask (H, W) above `threshold`, ends exclusive; raises ValueError if empty."""
    inside = mask > threshold
    rows, columns = (inside.any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        raise ValueError(
            f"Expected `{name}` with at least one painted pixel, but got an empty mask. Paint the subject."
        )
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
