"""MASK conventions and geometry: (B, H, W) in [0, 1], 1 = repaint as in the host unless the argument is called `keep`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_finite, check_integer


def as_mask(mask: Tensor, batch: int, height: int, width: int, name: str = "mask") -> Tensor:
    """Return `mask` as (batch, height, width) in [0, 1], resized by area; accepts (H, W), (B, H, W) or (B, 1, H, W).

    Raises ValueError for other shapes, for NaN, and when the batch is neither 1 nor `batch`.
    """
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"Expected `{name}` of shape (batch, height, width), but got {tuple(mask.shape)}.")
    check_finite(name, mask, "Paint the mask again.")
    if len(mask) not in (1, batch):
        raise ValueError(
            f"Expected `{name}` with 1 or {batch} masks, but got {len(mask)}. Give one mask, or one per image."
        )
    return resize_mask(mask.float().clamp(0, 1), height, width).expand(batch, height, width)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize (B, H, W) by area when shrinking and bilinearly when growing; nearest would drop thin parts."""
    if mask.shape[-2:] == (height, width):
        return mask
    shrink = height <= mask.shape[-2] and width <= mask.shape[-1]
    options = {"mode": "area"} if shrink else {"mode": "bilinear", "align_corners": False}
    return F.interpolate(mask[:, None], (height, width), **options)[:, 0]


def grow(mask: Tensor, cells: int) -> Tensor:
    """Dilate (cells > 0) or erode (cells < 0) a mask (B, H, W) by a square of that radius."""
    limit = min(mask.shape[-2:])
    check_integer("cells", cells, -limit, limit)
    if cells < 0:
        return 1 - grow(1 - mask, -cells)
    # max_pool2d pads with minus infinity: the picture's border is an edge of neither the mask nor its complement.
    return F.max_pool2d(mask[:, None], 2 * cells + 1, 1, cells)[:, 0]


def feather(mask: Tensor, radius: int) -> Tensor:
    """Blur a mask (B, H, W) with a Gaussian of standard deviation radius / 2, borders replicated."""
    check_integer("radius", radius, 0)
    if radius == 0:
        return mask
    radius = min(radius, min(mask.shape[-2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=mask.dtype, device=mask.device)
    kernel = torch.exp(-0.5 * (offsets / (max(radius, 1) / 2)) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(mask[:, None], [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[:, 0]


def bounding_box(mask: Tensor, threshold: float = 0.5) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right) of a mask (H, W) above `threshold`, ends exclusive; raises ValueError if empty."""
    rows = (mask > threshold).any(1).nonzero().flatten()
    columns = (mask > threshold).any(0).nonzero().flatten()
    if not len(rows):
        raise ValueError("Expected `mask` with at least one painted pixel, but got an empty mask. Paint the subject.")
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
