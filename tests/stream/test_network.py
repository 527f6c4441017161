"""Streams over small real UNets: every kind of prediction and SDXL, each frame as the definition has it alone."""

from __future__ import annotations

import functools

import pytest
import torch
from slipstream.core import Conditioning, DiffusersDenoiser, SeededNoise
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.stream import StreamBatch, StreamConfig
from slipstream_tests.stream.test_batch import alone, collect, stacked

SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,  # 8 pooled and 6 x 4 of the time ids
}


@functools.cache
def denoiser(kind: str = "epsilon", sdxl: bool = False) -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **(SDXL if sdxl else {}),
    ).eval()  # fmt: skip
    return DiffusersDenoiser(unet, None if kind == "flow" else scaled_linear_alphas_cumprod(), kind)


def rows(seed: int, sdxl: bool = False) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 5, 8, generator=generator)
    if not sdxl:
        return Conditioning(context)
    time_ids = torch.tensor([[64.0, 48.0, 0.0, 8.0 * seed, 64.0, 48.0]])
    return Conditioning(context, torch.randn(1, 8, generator=generator), {"time_ids": time_ids})


def expected(model, cond, uncond, config, frame) -> torch.Tensor:
    noise = SeededNoise(config.seed)(frame.new_empty(config.stages, *frame.shape[1:]))
    with torch.no_grad():
        return alone(model, cond, uncond, config, frame, noise)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randn(5, 4, 8, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("guidance", ["none", "full", "self", "onetime"])
@pytest.mark.parametrize("steps", [1, 3])
def test_every_kind_of_network(clip, kind, guidance, steps) -> None:
    model, cond, uncond = denoiser(kind), rows(1), rows(2)
    config = StreamConfig(strength=0.7, steps=steps, guidance=guidance, cfg_scale=1.6, delta=0.8)
    got = stacked(collect(StreamBatch(model, cond, uncond, config), clip))
    for frame, result in zip(clip.split(1), got.split(1)):
        torch.testing.assert_close(result, expected(model, cond, uncond, config, frame), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", ["none", "full", "self", "onetime"])
@pytest.mark.parametrize("static_rows", [False, True])
def test_sdxl_pooled_text_and_time_ids_of_each_frame(clip, guidance, static_rows) -> None:
    """Every frame has a prompt, pooled text and image sizes of its own, in calls that mix frames, steps and negatives."""
    model = denoiser(sdxl=True)
    config = StreamConfig(strength=0.7, steps=3, guidance=guidance, cfg_scale=1.6, delta=0.8, static_rows=static_rows)
    stream = StreamBatch(model, rows(1, True), rows(2, True), config)
    conds = [rows(10 + i, True) for i in range(len(clip))]
    out = [f for frame, cond in zip(clip.split(1), conds) for f in stream.push(frame, cond=cond)] + stream.drain()
    for frame, cond, result in zip(clip.split(1), conds, stacked(out).split(1)):
        torch.testing.assert_close(result, expected(model, cond, rows(2, True), config, frame), rtol=1e-4, atol=1e-4)
    other = expected(model, conds[1], rows(2, True), config, clip[:1])
    assert (stacked(out)[:1] - other).abs().max() > 1e-2


def test_sdxl_without_time_ids_is_one_sentence(clip) -> None:
    cond = Conditioning(torch.randn(1, 5, 8), torch.randn(1, 8))
    with pytest.raises(ValueError, match="time_ids"):
        StreamBatch(denoiser(sdxl=True), cond, None, StreamConfig(guidance="none")).push(clip[:1])
