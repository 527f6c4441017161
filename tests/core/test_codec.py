"""Codecs: what the VAE itself gives, with fewer operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slipstream.core import codec
from slipstream.core.codec import Codec, TinyCodec, codec_of
from torch import nn


def tiny(**more: Any) -> Any:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    return AutoencoderTiny(**widths, **more).eval().requires_grad_(False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_a_tiny_vae_both_ways(layout: torch.memory_format, fused: bool) -> None:
    vae = tiny().to(memory_format=layout)
    pixels, latents = torch.rand(2, 3, 32, 48), torch.randn(2, 4, 4, 6)
    found = codec_of(vae, fused)
    assert isinstance(found, TinyCodec)
    torch.testing.assert_close(found.encode(pixels), vae.encode(pixels * 2 - 1).latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.decode(latents), (vae.decode(latents).sample + 1) / 2, rtol=1e-5, atol=1e-5)
    assert (found.conv_relu is codec._conv_relu) != fused, "the CPU has the kernel"


@torch.no_grad()
def test_weights_are_read_where_they_are() -> None:
    vae = tiny()
    found, latents = codec_of(vae), torch.randn(1, 4, 4, 4)
    before = found.decode(latents)
    for weight in vae.parameters():
        weight.mul_(1.1)
    found.refresh()
    torch.testing.assert_close(found.decode(latents), (vae.decode(latents).sample + 1) / 2, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.decode(latents), before)


@pytest.mark.parametrize("side", [(5, 3), (4, 4)])
@torch.no_grad()
def test_doubling_and_convolving_is_one_transposed_convolution(side: tuple[int, int]) -> None:
    x, conv = torch.randn(2, 4, *side, dtype=torch.float64), nn.Conv2d(4, 6, 3, padding=1, dtype=torch.float64)
    expected = conv(nn.Upsample(scale_factor=2)(x))
    weight = codec.doubling(conv.weight.double())
    found = torch.nn.functional.conv_transpose2d(x, weight, conv.bias, 2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_every_doubling_of_a_tiny_vae_is_found_and_none_of_another_kind() -> None:
    assert len(codec_of(tiny())._doubled) == 3  # type: ignore[attr-defined]
    up, conv = nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1)
    assert codec._doubles(up, conv)
    others = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU()]
    assert not any(codec._doubles(up, other) for other in others)
    assert not codec._doubles(nn.Upsample(scale_factor=2, mode="bilinear"), conv)
    assert not codec._doubles(nn.Upsample(scale_factor=3), conv)


def test_other_vaes_tiles_and_hooks_are_left_to_the_vae() -> None:
    vae = tiny()
    vae.decoder.layers[3].register_forward_hook(lambda *_: None)
    assert type(codec_of(vae)) is Codec
    assert type(codec_of(tiny(act_fn="gelu"))) is Codec
    vae = tiny()
    found = codec_of(vae)
    assert found.current
    vae.enable_tiling()
    assert not found.current
    assert type(codec_of(vae)) is Codec


def test_a_device_without_the_kernel_takes_two_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(x: Any, conv: nn.Conv2d, other: Any) -> Any:
        raise RuntimeError("Could not run 'aten::cudnn_convolution_relu' with arguments from the 'CPU' backend.")

    monkeypatch.setattr(codec, "_conv_relu_onednn", missing)
    for wrong in (missing, lambda x, conv, other: conv(x)):
        codec.conv_relu_of.cache_clear()
        monkeypatch.setattr(codec, "_conv_relu_onednn", wrong)
        assert codec.conv_relu_of("cpu", torch.float32) is codec._conv_relu
    assert codec.conv_relu_of("mps", torch.float32) is codec._conv_relu
    codec.conv_relu_of.cache_clear()


def test_trying_a_kernel_leaves_the_random_numbers_of_torch_alone() -> None:
    codec.conv_relu_of.cache_clear()
    before = torch.get_rng_state()
    codec.conv_relu_of("cpu", torch.float32)
    assert torch.equal(before, torch.get_rng_state())
