"""Latents (B, C, T, H, W): with one frame they are images in every technique, with more a mask holds in every frame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slipstream.core import FLOW, VE, SeededNoise
from slipstream.core.masks import as_mask, over
from slipstream.cow import CowConfig, generate
from slipstream.lmd import RegenerateConfig, regenerate
from slipstream.lmd.influence import influence
from slipstream.stream import StreamBatch, StreamConfig
from slipstream_tests.analytic import GaussianDenoiser, constant_cond
from torch import Tensor

COND, UNCOND = constant_cond(0.3), constant_cond(-1.0)


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def corner(value: float = 1.0) -> Tensor:
    mask = torch.zeros(1, 8, 8)
    mask[:, 1:4, 2:6] = value
    return mask


def cow(model: Any, x: Tensor) -> Tensor:
    config = CowConfig(steps=8, cycles=2, cfg_scale=2.0)
    return generate(model, x, corner(), COND, UNCOND, config, SeededNoise(1)).latents


def regenerated(model: Any, x: Tensor) -> Tensor:
    config = RegenerateConfig(rounds=2, steps=3, candidates=2, cfg_scale=2.0)
    return regenerate(model, x, COND, UNCOND, config, SeededNoise(1), mask=corner()).latents


def streamed(renoise: str, guidance: str) -> Any:
    def run(model: Any, x: Tensor) -> Tensor:
        config = StreamConfig(
            strength=0.6, steps=3, renoise=renoise, guidance=guidance, cfg_scale=1.5, static_rows=True, delta=0.5
        )
        batch = StreamBatch(model, COND, UNCOND, config)
        frames = [*batch.push(x), *batch.drain()]
        return torch.cat([frame.latents for frame in frames])

    return run


TECHNIQUES = {
    "cow": cow,
    "regenerate": regenerated,
    **{
        f"stream {r} {g}": streamed(r, g)
        for r, g in (("fixed", "self"), ("fresh", "full"), ("ddim", "onetime"), ("none", "none"))
    },
}


@pytest.mark.parametrize("space", [VE, FLOW], ids=lambda space: space.name)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_one_frame_is_an_image(name: str, space: Any) -> None:
    x = latents(2, 4, 8, 8)
    image = TECHNIQUES[name](GaussianDenoiser(0.5, space=space), x)
    video = TECHNIQUES[name](GaussianDenoiser(0.5, space=space), x[:, :, None])
    assert video.shape == (2, 4, 1, 8, 8)
    torch.testing.assert_close(video[:, :, 0], image, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("space", [VE, FLOW], ids=lambda space: space.name)
def test_a_mask_holds_in_every_frame(space: Any) -> None:
    x, inside = latents(1, 4, 3, 8, 8), corner()[0] > 0
    model = GaussianDenoiser(0.5, space=space)
    kept = cow(model, x)
    torch.testing.assert_close(kept[..., inside], x[..., inside], atol=1e-5, rtol=1e-5)
    assert (kept - x).abs()[..., ~inside].flatten(0, 2).amax(-1).min() > 0.1
    changed = regenerated(model, x)
    assert torch.equal(changed[..., ~inside], x[..., ~inside])
    assert (changed - x).abs()[..., inside].flatten(0, 2).amax(-1).min() > 0.1


def test_the_influence_of_a_video_is_the_mean_over_its_frames() -> None:
    before, after = latents(2, 1, 4, 3, 8, 8), latents(2, 1, 4, 3, 8, 8).flip(0)
    whole = influence(before, after, corner()[0])
    frames = [influence(before[:, :, :, t], after[:, :, :, t], corner()[0]) for t in range(3)]
    torch.testing.assert_close(whole.heat, torch.stack([frame.heat for frame in frames]).mean(0))


def test_a_stream_of_videos_is_refused() -> None:
    batch = StreamBatch(GaussianDenoiser(0.5), COND, None, StreamConfig(guidance="none"))
    with pytest.raises(
        ValueError, match=r"one image per frame, but got a video of 3 frames.*push the frames one by one"
    ):
        batch.push(latents(1, 4, 3, 8, 8))
    batch.push(latents(1, 4, 1, 8, 8))
    with pytest.raises(ValueError, match=r"like the frames in flight"):
        batch.push(latents(1, 4, 8, 8))


def test_masks_of_every_shape() -> None:
    frames = torch.stack([corner()[0], corner()[0].flip(0)])[None, None]  # (1, 1, 2, 8, 8)
    assert torch.equal(as_mask(frames, 1, 8, 8), torch.maximum(*frames[0, 0])[None])
    mask = as_mask(corner(), 2, 8, 8)
    for x in (latents(2, 4, 8, 8), latents(2, 4, 3, 8, 8)):
        assert (over(mask, x) * x).shape == x.shape
        assert torch.equal((over(mask, x) * x)[1, 2], x[1, 2] * corner()[0])
