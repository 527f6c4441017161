"""Masks whose black is not quite 0 or whose white is not quite 1: what video, JPEG and brushes make of them."""

from __future__ import annotations

import torch
from torch import Tensor

NOISY = {"black is 3": (3, 255), "video": (16, 235), "white is 240": (0, 240), "noise": (13, 242)}


def noisy(mask: Tensor, kind: str) -> Tensor:
    """Return a hard mask with black and white of a `kind` in NOISY, in 255ths; "noise" varies them by 12 on top."""
    low, high = NOISY[kind]
    mask = (mask * (high - low) + low) / 255
    if kind == "noise":
        mask = mask + (torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) - 0.5) * 24 / 255
    return mask
