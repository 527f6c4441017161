"""The clip that comes with the pack: size, mask and motion."""

from __future__ import annotations

import pytest
import torch
from slipstream.stream.clip import FRAMES, RADIUS, RATE, ball_clip, ball_position


def test_frames_and_masks() -> None:
    frames, mask = ball_clip()
    assert frames.shape == (FRAMES, 128, 128, 3)
    assert mask.shape == (FRAMES, 128, 128)
    assert float(frames.min()) >= 0
    assert float(frames.max()) <= 1
    area = torch.pi * (RADIUS * 128 - 0.5) ** 2  # the edge is one pixel wide, inside the ball
    assert mask[6:42].sum((1, 2)).sub(area).abs().max() < 0.01 * area
    red, _, blue = frames[10][mask[10] == 1].mean(0)
    assert red > blue + 0.3
    red, _, blue = frames[10][mask[10] == 0].mean(0)
    assert blue > red + 0.2


def test_the_mask_follows_the_ball() -> None:
    _, mask = ball_clip(20, size=64)
    axis = (torch.arange(64) / 64).float()
    x, y = ball_position(torch.arange(20) / RATE)
    for i in range(6, 20):
        assert abs(float((mask[i].sum(0) * axis).sum() / mask[i].sum() - x[i])) < 0.01
        assert abs(float((mask[i].sum(1) * axis).sum() / mask[i].sum() - y[i])) < 0.01


def test_fewer_frames_are_the_first_ones_up_to_grain() -> None:
    few, all_frames = ball_clip(5)[0], ball_clip()[0]
    assert (few - all_frames[:5]).abs().mean() < 0.02
    with pytest.raises(ValueError, match="between 1 and 48, but got 49"):
        ball_clip(FRAMES + 1)
