"""A small network and a small image for the edit's tests: 16 channels, 8 x 12 cells, a red box on blue."""

from __future__ import annotations

from typing import Any

import torch
from slipstream.core import Conditioning, DiffusersDenoiser
from slipstream.core.schedules import scaled_linear_alphas_cumprod
from slipstream.edit import Canvas, EditConfig, Inversion, invert
from torch import Tensor

HEIGHT, WIDTH = 64, 96
CANVAS = Canvas((HEIGHT, WIDTH), (8, 12), 8)
FAST = EditConfig(steps=6, mode="fine", anchor_object=(0.0, 0.5), anchor_fill=(0.0, 0.34), travel=(0.0, 0.0))


def network(prediction: str = "epsilon") -> DiffusersDenoiser:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=["CrossAttnDownBlock2D"] * 3, up_block_types=["CrossAttnUpBlock2D"] * 3,
    )  # fmt: skip
    return DiffusersDenoiser(unet.eval(), scaled_linear_alphas_cumprod(), prediction)


def cond(seed: int = 1) -> Conditioning:
    return Conditioning(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed)))


def picture() -> Tensor:
    image = torch.zeros(1, HEIGHT, WIDTH, 3)
    image[..., 2] = torch.linspace(0.3, 0.9, WIDTH)
    image[:, 16:40, 16:40] = torch.tensor([0.9, 0.2, 0.1])
    return image


def box(
    top: int = 16, left: int = 16, bottom: int = 40, right: int = 40, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> Tensor:
    mask = torch.zeros(size)
    mask[top:bottom, left:right] = 1
    return mask


def encode(image: Tensor) -> Tensor:
    """A stand-in for a VAE: cell means and a constant."""
    small = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 8) * 2 - 1
    return torch.cat([small, small.mean(1, keepdim=True)], 1)


def decode(latents: Tensor) -> Tensor:
    big = torch.nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="bilinear")
    return ((big + 1) / 2).clamp(0, 1).movedim(1, -1)


def inverted(model: Any = None, config: EditConfig = FAST, image: Tensor | None = None) -> tuple[Any, Inversion]:
    model, image = model or network(), picture() if image is None else image
    return model, invert(model, encode(image), cond(), config, CANVAS, image)
