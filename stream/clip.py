"""The clip that comes with the pack, drawn by code: a shaded ball that bounces through a room, with camera grain."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.checks import check_integer

RATE, SECONDS = 12, 4
FRAMES = RATE * SECONDS
RADIUS, FLOOR, BOUNCES, GRAIN = 0.2, 0.8, 4, 0.008


def ball_position(time: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x, y) of the ball's centre in shares of the frame: it crosses once and bounces `BOUNCES` times."""
    phase = (time * BOUNCES / SECONDS) % 1.0
    return 0.2 + 0.6 * time / SECONDS, FLOOR - RADIUS - 0.35 * 4 * phase * (1 - phase)


def ball_clip(frames: int = FRAMES, size: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return IMAGE (frames, size, size, 3) in [0, 1] at `RATE` frames a second, and MASK (frames, size, size), 1 on the ball."""
    check_integer("frames", frames, 1, FRAMES, f"The clip has {FRAMES} frames.")
    check_integer("size", size, 16, 4096)
    axis = torch.arange(size) / size
    y, x = axis[:, None], axis[None, :]
    cx, cy = (value[:, None, None] for value in ball_position(torch.arange(frames) / RATE))
    image = _room(x, y) * (1 - _shadow(x, y, cx, cy)[..., None])
    u, v = (x - cx) / RADIUS, (y - cy) / RADIUS
    mask = ((1 - torch.hypot(u, v)) * RADIUS * size).clamp(0, 1)
    image = torch.lerp(image, _ball(u, v), mask[..., None])
    grain = GRAIN * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + grain).clamp(0, 1), mask


def _room(x: Tensor, y: Tensor) -> Tensor:
    """A blue wall and a darker floor (size, size, 3), lit from the upper left."""
    light = 1.1 - 0.35 * torch.hypot(x - 0.3, y - 0.2)
    wall, floor = torch.tensor([0.18, 0.33, 0.83]), torch.tensor([0.12, 0.2, 0.5])
    return torch.where((y < FLOOR)[..., None], wall, floor) * light[..., None]


def _shadow(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """Share of the light that the ball takes from the floor (frames, size, size): softer and fainter the higher it is."""
    height = (FLOOR - RADIUS - cy) / 0.35
    distance = ((x - cx - 0.04) / 0.2) ** 2 + ((y - FLOOR - 0.04) / 0.05) ** 2
    return 0.55 * (1 - 0.5 * height) * torch.exp(-distance * (1.5 - height / 2))


def _ball(u: Tensor, v: Tensor) -> Tensor:
    """The lit red ball (frames, size, size, 3) at (u, v) radii from its centre."""
    depth = (1 - u**2 - v**2).clamp(min=0).sqrt()
    diffuse = (-0.45 * u - 0.55 * v + 0.7 * depth).clamp(0, 1)
    return torch.tensor([0.86, 0.16, 0.16]) * (0.45 + 0.6 * diffuse)[..., None] + 0.5 * (diffuse**24)[..., None]
