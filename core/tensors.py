"""Tensor layouts: the host's IMAGE (B, H, W, C) in [0, 1] and the VAE's pixels (B, C, H, W) in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_finite


def image_to_pixels(image: Tensor) -> Tensor:
    """Return (B, 3, H, W) in [-1, 1] from IMAGE (B, H, W, 1|3|4) or (H, W, C) in [0, 1]; alpha is dropped, grey repeated.

    uint8 counts from 0 to 255. Raises ValueError for other shapes and for NaN; looking for NaN makes a GPU wait.
    """
    check_image(image)
    return unchecked_pixels(image)


def check_image(image: Tensor, finite: bool = True) -> None:
    """Raise ValueError unless `image` is IMAGE (B, H, W, 1|3|4) or (H, W, C), without NaN when `finite` is asked for."""
    if image.ndim not in (3, 4) or image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"Expected `image` of shape (batch, height, width, 1, 3 or 4), but got {tuple(image.shape)}.")
    if finite and image.is_floating_point():
        check_finite("image", image)


def unchecked_pixels(image: Tensor) -> Tensor:
    """Return what `image_to_pixels` does, without looking at the values: nothing waits."""
    return unit_pixels(image) * 2 - 1


def unit_pixels(image: Tensor) -> Tensor:
    """Return float32 (B, 3, H, W) in [0, 1] from IMAGE as `unchecked_pixels` takes it."""
    image = image[None] if image.ndim == 3 else image
    rgb = image.expand(*image.shape[:3], 3) if image.shape[-1] == 1 else image[..., :3]
    values = rgb.movedim(-1, 1).float()
    return values / 255 if image.dtype == torch.uint8 else values


def pixels_to_image(pixels: Tensor) -> Tensor:
    """Return IMAGE (B, H, W, 3) in [0, 1] from pixels (B, 3, H, W) in [-1, 1], clamped, on their device."""
    return ((pixels.float() + 1) / 2).clamp(0, 1).movedim(1, -1).contiguous()


def image_to_bytes(image: Tensor) -> Tensor:
    """Return uint8 of the same shape from IMAGE, clamped to [0, 1] and rounded; bytes stay as they are."""
    return image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)


def image_to_numpy(image: Tensor) -> np.ndarray:
    """Return uint8 (B, H, W, C) from IMAGE in [0, 1], rounded."""
    return image_to_bytes(image).cpu().numpy()


def numpy_to_image(array: np.ndarray) -> Tensor:
    """Return IMAGE (B, H, W, C) in [0, 1] from uint8 (B, H, W, C) or (H, W, C)."""
    image = torch.from_numpy(np.ascontiguousarray(array)).float() / 255
    return image[None] if image.ndim == 3 else image


def composite(base: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """Return `image` (B, H, W, C) where `mask` (B, H, W) is 1 and `base` where it is 0; exact at 0 and 1."""
    return blend(base, image, mask[..., None].to(image))


def blend(base: Tensor, over: Tensor, weight: Tensor) -> Tensor:
    """Return `over` where `weight` is 1 and `base` where it is 0, mixed in between; exact at both, of any shapes that broadcast."""
    return torch.where(weight == 0, base, torch.where(weight == 1, over, base + weight * (over - base)))


def fill(values: Tensor, known: Tensor) -> Tensor:
    """Return values (B, C, H, W) with what is not `known` (B, 1, H, W) filled smoothly from around it (pull-push pyramid)."""
    if min(values.shape[-2:]) <= 2 or bool((known > 0.999).all()):
        mean = (values * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1e-6)
        return known * values + (1 - known) * mean
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(values * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = fill(coarse, (weight * 4).clamp(max=1))
    smooth = F.interpolate(coarse, values.shape[-2:], mode="bilinear", align_corners=False)
    return known * values + (1 - known) * smooth


def gaussian_blur(x: Tensor, deviation: float, radius: int) -> Tensor:
    """Return (B, C, H, W) blurred by a Gaussian of `deviation` cells that is cut off at `radius`, the border repeated."""
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / deviation) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    across = F.conv2d(padded, kernel[:, :, None], groups=x.shape[1])
    return F.conv2d(across, kernel[..., None], groups=x.shape[1])
