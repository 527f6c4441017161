"""Images to the latents of a VAE and back: scaling, clamping and casts in one place, with as few operators as the VAE allows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d

from .fused import Watch
from .taps import plain_type
from .transfer import mark, receive

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

    fused = False  # whether it runs kernels that are fused already, so that compiling gains nothing

    def refresh(self) -> None:
        """Take over weights that have changed, into the same memory, for the current CUDA stream; to be called before `decode`."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the VAE's latents (B, C, h, w) of pixels (B, 3, H, W) in [0, 1]."""
        return latents_of(self.vae.encode((pixels * 2 - 1).to(self.vae.dtype)))

    def decode(self, latents: Tensor) -> Tensor:
        """Return float32 pixels (B, 3, H, W) about [0, 1], not clamped, of the VAE's latents (B, C, h, w)."""
        return (self.vae.decode(latents).sample.float() + 1) / 2


class TinyCodec(Codec):
    """Both ways of an AutoencoderTiny (TAESD), which counts from 0 to 1 inside: nothing is scaled to [-1, 1] and back.

    ReLU is a part of the convolution before it, where the device has such kernels and `fused` is on. An image that is doubled by its
    nearest pixels and then convolved by 3 x 3 is one transposed convolution, with 4 of 9 multiplications.
    """

    def __init__(self, vae: Any, fused: bool = True) -> None:
        super().__init__(vae)
        self.conv_relu = conv_relu_of(vae.device.type, vae.dtype) if fused else _conv_relu
        self.fused = self.conv_relu is not _conv_relu
        layers = vae.decoder.layers
        self._doubled = {
            i: doubling(layers[i + 1].weight) for i in range(len(layers) - 1) if _doubles(*layers[i : i + 2])
        }
        self._made = mark(self._doubled)  # the event after which another CUDA stream may read them
        self._watch = Watch([(layers, str(i + 1)) for i in self._doubled])

    @property
    def current(self) -> bool:
        return not (self.vae.use_slicing or self.vae.use_tiling)

    def refresh(self) -> None:
        if self._watch.changed:
            for i, before in self._doubled.items():
                weight = doubling(self.vae.decoder.layers[i + 1].weight)
                same = (weight.device, weight.dtype) == (before.device, before.dtype)
                self._doubled[i] = before.copy_(weight) if same else weight
            self._made = mark(self._doubled)
            self._watch.look()
        receive(self._made, self._doubled)

    def encode(self, pixels: Tensor) -> Tensor:
        return self._run(self.vae.encoder.layers, pixels.to(self.vae.dtype), {})

    def decode(self, latents: Tensor) -> Tensor:
        return self._run(self.vae.decoder.layers, torch.tanh(latents / 3) * 3, self._doubled).float()

    def _run(self, layers: nn.Sequential, x: Tensor, doubled: dict[int, Tensor]) -> Tensor:
        """Return `x` after `layers`; those at the places of `doubled` are one with the convolution after them."""
        steps = list(layers)
        for i, (layer, after) in enumerate(zip(steps, [*steps[1:], None])):
            if isinstance(layer, nn.ReLU) or i - 1 in doubled:
                continue  # done with the layer before it
            if i in doubled:
                x = F.conv_transpose2d(x, doubled[i], after.bias, 2, 1)  # type: ignore[union-attr, arg-type]
            elif isinstance(layer, nn.Conv2d):
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


def _doubles(layer: Any, after: Any) -> bool:
    """Whether two layers double an image by its nearest pixels and convolve it by 3 x 3."""
    shape = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    return (
        isinstance(layer, nn.Upsample) and layer.mode == "nearest" and layer.scale_factor == 2 and isinstance(after, nn.Conv2d)
        and (after.kernel_size, after.stride, after.padding, after.dilation, after.groups) == shape
    )  # fmt: skip


@torch.inference_mode(False)
@torch.no_grad()
def doubling(weight: Tensor) -> Tensor:
    """Return the weight (I, O, 4, 4) of `conv_transpose2d(x, weight, stride=2, padding=1)` for that of a convolution (O, I, 3, 3).

    The convolution is one of an image that was doubled by its nearest pixels: each result sees two rows and columns of the image before,
    one of them twice.
    """
    taps = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)
    both = torch.einsum("ak,bl,oikl->ioab", taps, taps, weight.float()).to(weight.dtype)
    return both.contiguous(memory_format=torch.channels_last)


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
