"""Images to the latents of a VAE and back: scaling, clamping and casts in one place, with as few operators as the VAE allows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d

from .taps import plain_type

# (x, convolution, tensor to add or None) -> relu(convolution(x) + tensor)
ConvRelu = Callable[[Tensor, Any, "Tensor | None"], Tensor]


def latents_of(code: Any) -> Tensor:
    """Return the latents that a VAE's encoder means, unscaled: of a distribution its mode."""
    latents: Tensor = code.latents if hasattr(code, "latents") else code.latent_dist.mode()
    return latents


class Codec:
    """Both ways of any VAE of diffusers, for images on its device."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @property
    def current(self) -> bool:
        """Whether the VAE is still as it was when its codec was chosen."""
        return True

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the VAE's latents (B, C, h, w) of pixels (B, 3, H, W) in [0, 1]."""
        return latents_of(self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)))

    def decode(self, latents: Tensor) -> Tensor:
        """Return float32 pixels (B, 3, H, W) about [0, 1], not clamped, of the VAE's latents (B, C, h, w)."""
        return (self.vae.decode(latents).sample.float() + 1) / 2


class TinyCodec(Codec):
    """Both ways of an AutoencoderTiny (TAESD), which counts from 0 to 1 inside: nothing is scaled to [-1, 1] and back.

    `fused`: ReLU is a part of the convolution before it, where the device has such kernels. Leave it out for torch.compile.
    """

    def __init__(self, vae: Any, fused: bool = True) -> None:
        super().__init__(vae)
        self.conv_relu = conv_relu_of(vae.device.type, vae.dtype) if fused else _conv_relu

    @property
    def current(self) -> bool:
        return not (self.vae.use_slicing or self.vae.use_tiling)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._run(self.vae.encoder.layers, pixels.to(self.vae.dtype))

    def decode(self, latents: Tensor) -> Tensor:
        return self._run(self.vae.decoder.layers, torch.tanh(latents / 3) * 3).float()

    def _run(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        steps = list(layers)
        for layer, after in zip(steps, [*steps[1:], None]):
            if isinstance(layer, nn.ReLU):
                continue  # done with the convolution before it
            if isinstance(layer, nn.Conv2d):
                x = self.conv_relu(x, layer, None) if isinstance(after, nn.ReLU) else layer(x)
            elif isinstance(layer, nn.Upsample):
                x = layer(x)
            else:
                x = self._block(layer, x)
        return x

    def _block(self, block: Any, x: Tensor) -> Tensor:
        first, second, last = block.conv[0], block.conv[2], block.conv[4]
        inner = self.conv_relu(self.conv_relu(x, first, None), second, None)
        return self.conv_relu(inner, last, block.skip(x))


class FrameCodec(Codec):
    """Both ways of a VAE of videos that normalises each channel of its latents (Qwen-Image), one frame at a time."""

    def encode(self, pixels: Tensor) -> Tensor:
        mean, deviation = self._normalisation
        latents = latents_of(self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)[:, :, None]))[:, :, 0]
        return (latents - mean) / deviation

    def decode(self, latents: Tensor) -> Tensor:
        mean, deviation = self._normalisation
        return super().decode((latents * deviation + mean)[:, :, None])[:, :, 0]

    @functools.cached_property
    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """The mean and the standard deviation of each channel (C, 1, 1)."""
        config = self.vae.config
        both = torch.tensor([config.latents_mean, config.latents_std], device=self.vae.device, dtype=self.vae.dtype)
        mean, deviation = both[..., None, None]
        return mean, deviation


def codec_of(vae: Any, fused: bool = True) -> Codec:
    """Return the codec of a VAE of diffusers."""
    if _is_tiny(vae):
        return TinyCodec(vae, fused)
    return FrameCodec(vae) if plain_type(vae).__name__ == "AutoencoderKLQwenImage" else Codec(vae)


def _is_tiny(vae: Any) -> bool:
    """Whether a VAE is an AutoencoderTiny as published: ReLU, no slices, no tiles, no hooks."""
    if (
        not isinstance(vae, nn.Module)
        or plain_type(vae).__name__ != "AutoencoderTiny"
        or vae.use_slicing
        or vae.use_tiling
    ):
        return False
    usual = (nn.ReLU, nn.Conv2d, nn.Upsample, nn.Sequential, nn.Identity)
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in vae.modules())
    parts: list[Any] = [vae.encoder, vae.decoder]
    inner = (module for part in parts for module in part.layers.modules())
    return not hooked and all(isinstance(m, usual) or plain_type(m).__name__ == "AutoencoderTinyBlock" for m in inner)


# -- convolutions with ReLU in one kernel


def _conv_relu(x: Tensor, conv: Any, other: Tensor | None) -> Tensor:
    y = conv(x)
    return F.relu(y if other is None else y + other)


def _conv_relu_cudnn(x: Tensor, conv: Any, other: Tensor | None) -> Tensor:
    rest = conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    if other is None:
        return torch.cudnn_convolution_relu(x, conv.weight, *rest)
    return torch.cudnn_convolution_add_relu(x, conv.weight, other, 1.0, *rest)


def _conv_relu_onednn(x: Tensor, conv: Any, other: Tensor | None) -> Tensor:
    given = x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    if other is None:
        return torch.ops.mkldnn._convolution_pointwise(*given, "relu", [], "")
    x, *rest = given
    return torch.ops.mkldnn._convolution_pointwise.binary(x, other, *rest, "add", 1.0, "relu", [], "")


@functools.cache
def conv_relu_of(device: str, dtype: torch.dtype) -> ConvRelu:
    """Return relu(convolution + tensor) as one kernel of a device type, where it has one that is tried here and right."""
    kernels: dict[str, ConvRelu] = {"cpu": _conv_relu_onednn, "cuda": _conv_relu_cudnn}
    if device not in kernels:
        return _conv_relu
    try:
        with torch.no_grad():
            # Not initialised by torch, whose random numbers belong to the user.
            conv = nn.utils.skip_init(Conv2d, 8, 8, 3, padding=1, device=device, dtype=dtype)
            for part in conv.parameters():
                part.copy_(torch.linspace(-0.2, 0.3, part.numel()).view_as(part))
            x = torch.linspace(-1, 1, 2048, device=device).reshape(1, 8, 16, 16).to(dtype)
            for other in (None, x):
                torch.testing.assert_close(
                    kernels[device](x, conv, other), _conv_relu(x, conv, other), rtol=1e-2, atol=1e-2
                )
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError):
        return _conv_relu
    return kernels[device]
