"""Stage `vae`: an autoencoder whose latents survive noise, because a small diffusion model never hits them exactly."""

from __future__ import annotations

import copy
import dataclasses
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .models import make_vae
from .scenes import Scene, render, sample_scene
from .training import Average, Loop, apply_gradients, cosine, rank


@dataclasses.dataclass(frozen=True)
class VaeSettings:
    """Those of the bundled autoencoder's last 11 minutes, on two processes; the minutes are for a run from nothing."""

    minutes: float = 40.0
    res: int = 128
    channels: tuple[int, ...] = (16, 32, 48, 64)
    batch: int = 8
    full_batch: int = 3
    crop: int = 64
    crop_share: float = 0.8  # of the time; whole images after it settle the group norms
    lr: float = 2e-3
    noise: float = 0.35  # largest deviation of the noise on latents whose own deviation is about 1
    anchor: float = 2.0
    latent_scale: float = 1.45
    pool: int = 96


class _Images:
    """Endless training images from a pool of scenes that is drawn again when used up."""

    def __init__(self, settings: VaeSettings, rng: np.random.Generator) -> None:
        self.settings, self.rng, self.left = settings, rng, 0

    def batch(self, count: int, crop: bool) -> Tensor:
        if self.left <= 0:
            self.scenes = [sample_scene(self.rng) for _ in range(self.settings.pool)]
            self.images, self.left = render(self.scenes, self.settings.res), 2 * self.settings.pool
        self.left -= count
        picks = self.rng.integers(0, len(self.scenes), count)
        whole = self.images[picks]
        if crop:
            whole = torch.stack([self._crop(p, self.scenes[i]) for i, p in zip(picks, whole)])
        return whole.contiguous(memory_format=torch.channels_last)

    def _crop(self, image: Tensor, scene: Scene) -> Tensor:
        """Around an object: most of a scene is flat background, which is soon learned."""
        size, res = self.settings.crop, self.settings.res
        item = scene.items[self.rng.integers(len(scene.items))]
        corner = np.array([item.y, item.x]) * res - size / 2 + self.rng.normal(0, 0.22 * size, 2)
        top, left = corner.round().clip(0, res - size).astype(int)
        return image[:, top : top + size, left : left + size]


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images.diff(dim=-1), images.diff(dim=-2)


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 + squared error, the same colours at a quarter of the size, the same edges."""
    loss = F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images)
    loss = loss + F.l1_loss(F.avg_pool2d(decoded, 4), F.avg_pool2d(images, 4))
    return loss + sum(F.l1_loss(a, b) for a, b in zip(_edges(decoded), _edges(images)))


def anchor_loss(mean: Tensor, images: Tensor) -> Tensor:
    """Latent channels 0 to 2 as a small RGB image: colours come out right early, and previews are linear.

    Mostly asked of 2x2 cells together, so that within them the channels may carry edges.
    """
    cell = images.shape[-1] // mean.shape[-1]
    coarse = F.mse_loss(F.avg_pool2d(mean[:, :3], 2), F.avg_pool2d(images, 2 * cell))
    return coarse + 0.2 * F.mse_loss(mean[:, :3], F.avg_pool2d(images, cell))


def _loss(vae: torch.nn.Module, images: Tensor, settings: VaeSettings, noise: float) -> Tensor:
    mean = vae.encode(images).latent_dist.mean
    latents = mean * settings.latent_scale
    rows = len(images)
    level = (
        noise * torch.rand(rows, 1, 1, 1, device=mean.device) * (torch.rand(rows, 1, 1, 1, device=mean.device) > 0.15)
    )
    decoded = vae.decode((latents + level * torch.randn_like(latents)) / settings.latent_scale).sample
    # Larger latents would drown the noise: keep each channel's power near 1.
    power = (latents.square().mean((0, 2, 3)) - 1.1).clamp(min=0).square().sum()
    centre = latents[:, 3].mean().square()
    loss = reconstruction_loss(decoded, images) + settings.anchor * anchor_loss(mean, images)
    return loss + 0.2 * power + 0.01 * centre


def make_certain(vae: torch.nn.Module) -> None:
    """Give the posterior the fixed deviation exp(-4): nothing trained its own, and hosts may sample from it."""
    with torch.no_grad():
        channels = vae.config.latent_channels
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -8.0


def train_vae(work: pathlib.Path, device: str, settings: VaeSettings) -> None:
    """Train and write `work`/vae."""
    torch.manual_seed(rank())
    vae = make_vae(settings.channels).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.lr, weight_decay=1e-4, betas=(0.9, 0.99))
    average = Average(vae, 0.99)
    loop = Loop(work / "vae.pt", settings.minutes, {"vae": vae, "optimizer": optimizer, "average": average})
    images = _Images(settings, np.random.default_rng([rank(), loop.step]))
    for share in loop:
        crop = share < settings.crop_share
        batch = images.batch(settings.batch if crop else settings.full_batch, crop).to(device)
        noise = settings.noise * min(1.0, 0.3 + share / 0.15)
        loss = _loss(vae, batch, settings, noise)
        apply_gradients(loss, settings.lr * cosine(share), optimizer)
        average.update()
        loop.report(loss=loss)
    if rank() == 0:
        final = copy.deepcopy(vae).to("cpu", memory_format=torch.contiguous_format).eval()
        average.copy_to(final)
        make_certain(final)
        final.register_to_config(scaling_factor=settings.latent_scale)
        final.save_pretrained(work / "vae")
