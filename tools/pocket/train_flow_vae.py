"""Stage `flow-vae`: the 16-channel autoencoder of pocket-flow, whose latents survive noise, then its decoder alone."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

from .flow_scenes import RES, SIDES, Scenes, make_atlas, render, sample_scenes
from .models import make_vae
from .muon import Muon
from .train_vae import anchor_loss, make_certain, reconstruction_loss
from .training import Average, Loop, apply_gradients, cosine, rank

POCKET = pathlib.Path(__file__).resolve().parents[2] / "pocket"
LATENT_CHANNELS = 16


@dataclasses.dataclass(frozen=True)
class FlowVaeSettings:
    """Settings of the bundled autoencoder."""

    minutes: float = 18.0
    batch: int = 8
    full_batch: int = 2
    crop: int = 64
    crop_share: float = 0.85  # of the time; whole images after it
    lr: float = 2e-3
    noise: float = 0.3  # largest deviation of the noise on latents whose own deviation is about 1
    anchor: float = 2.0
    latent_scale: float = 1.5
    pool: int = 128
    decoder_only: bool = False


class SceneImages:
    """Endless training images: scenes from a pool that is drawn again when it is used up, cropped around an object."""

    def __init__(self, settings: FlowVaeSettings, rng: np.random.Generator, device: str) -> None:
        self.settings, self.rng, self.left = settings, rng, 0
        self.atlas = make_atlas().to(device)

    def batch(self, count: int, crop: bool) -> Tensor:
        if self.left <= 0:
            self.scenes = sample_scenes(self.settings.pool, self.rng)
            self.images, self.left = render(self.scenes, self.atlas), 2 * self.settings.pool
        self.left -= count
        picks = torch.from_numpy(self.rng.integers(0, len(self.scenes), count))
        whole = self.images[picks.to(self.images.device)]
        if crop:
            corners = self._crops(self.scenes[picks])
            size = self.settings.crop
            whole = torch.stack([x[:, t : t + size, s : s + size] for x, (s, t) in zip(whole, corners.tolist())])
        return whole.contiguous(memory_format=torch.channels_last)

    def _crops(self, scenes: Scenes) -> Tensor:
        """Corners of crops near the first object, on the grid of 8: most of a scene is flat background, which is soon learned."""
        side = torch.tensor(SIDES)[scenes.size[:, 0]][:, None]
        spread = torch.from_numpy(self.rng.normal(0, 12, (len(scenes), 2)))
        corner = scenes.corner[:, 0] + side / 2 - self.settings.crop / 2 + spread
        return (corner / 8).round().long().mul(8).clamp(0, RES - self.settings.crop)


def _loss(vae: nn.Module, images: Tensor, settings: FlowVaeSettings, noise: float) -> Tensor:
    mean = vae.encode(images).latent_dist.mean
    latents = mean * settings.latent_scale
    level = noise * torch.rand(len(images), 1, 1, 1, device=mean.device).square()
    decoded = vae.decode((latents + level * torch.randn_like(latents)) / settings.latent_scale).sample
    # Larger latents would drown the noise: keep each channel's power near 1.
    power = (latents.square().mean((0, 2, 3)) - 1.1).clamp(min=0).square().sum()
    loss = reconstruction_loss(decoded, images) + settings.anchor * anchor_loss(mean, images)
    return loss + 0.2 * power + 0.01 * latents.mean((0, 2, 3)).square().sum()


def widened(old: AutoencoderKL) -> AutoencoderKL:
    """Pocket's autoencoder with 16 latent channels: the first four as they were, the others new. A start, not a result."""
    vae, before = make_vae(tuple(old.config.block_out_channels), LATENT_CHANNELS), old.config.latent_channels
    state = {k: v for k, v in old.state_dict().items() if v.shape == vae.state_dict()[k].shape}
    vae.load_state_dict(state, strict=False)
    moments = [*range(before), *range(LATENT_CHANNELS, LATENT_CHANNELS + before)]  # means, log variances
    with torch.no_grad():
        vae.encoder.conv_out.weight[moments] = old.encoder.conv_out.weight
        vae.encoder.conv_out.bias[moments] = old.encoder.conv_out.bias
        torch.nn.init.dirac_(vae.quant_conv.weight)
        vae.quant_conv.weight[torch.tensor(moments)[:, None], torch.tensor(moments)] = old.quant_conv.weight
        vae.quant_conv.bias[moments] = old.quant_conv.bias
        torch.nn.init.dirac_(vae.post_quant_conv.weight)
        vae.post_quant_conv.weight[:before, :before] = old.post_quant_conv.weight
        vae.post_quant_conv.bias[:before] = old.post_quant_conv.bias
        vae.decoder.conv_in.weight[:, :before] = old.decoder.conv_in.weight
        vae.decoder.conv_in.weight[:, before:] *= 0.5
        vae.decoder.conv_in.bias[:] = old.decoder.conv_in.bias
    return vae


def make_optimizers(module: nn.Module, lr: float, outer: tuple[str, ...]) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the inner matrices and convolutions, AdamW for layers whose name has a part in `outer`, norms and biases."""
    inner = [
        p for n, p in module.named_parameters() if p.requires_grad and p.ndim >= 2 and not any(o in n for o in outer)
    ]
    chosen = {id(p) for p in inner}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    return Muon(inner, lr), torch.optim.AdamW(others, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99))


def train_flow_vae(work: pathlib.Path, device: str, settings: FlowVaeSettings) -> None:
    """Train and write `work`/vae; with `decoder_only` continue with the decoder of `work`/vae, so that latents stay as they are."""
    from diffusers import AutoencoderKL

    torch.manual_seed(rank())
    if settings.decoder_only:
        vae = AutoencoderKL.from_pretrained(work / "vae")
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    else:
        vae = widened(AutoencoderKL.from_pretrained(POCKET / "vae", torch_dtype=torch.float32))
    vae = vae.to(device, memory_format=torch.channels_last).train()
    optimizers = make_optimizers(vae, settings.lr, ("conv_in", "conv_out", "quant_conv"))
    average = Average(vae, 0.99)
    parts = {"vae": vae, "muon": optimizers[0], "adam": optimizers[1], "average": average}
    loop = Loop(work / ("decoder.pt" if settings.decoder_only else "vae.pt"), settings.minutes, parts)
    images = SceneImages(settings, np.random.default_rng([rank(), loop.step, settings.decoder_only]), device)
    for share in loop:
        crop = share < settings.crop_share
        batch = images.batch(settings.batch if crop else settings.full_batch, crop)
        loss = _loss(vae, batch, settings, settings.noise * min(1.0, 0.3 + share / 0.15))
        apply_gradients(loss, settings.lr * cosine(share), *optimizers)
        average.update()
        loop.report(loss=loss)
    if rank() == 0:
        final = copy.deepcopy(vae).to("cpu", memory_format=torch.contiguous_format).eval()
        average.copy_to(final)
        if not settings.decoder_only:
            make_certain(final)
            final.register_to_config(scaling_factor=settings.latent_scale)
        final.save_pretrained(work / "vae")
        loop.log(psnr=round(psnr(final, images.atlas.cpu()), 2))


@torch.no_grad()
def psnr(vae: nn.Module, atlas: Tensor, count: int = 64) -> float:
    """Mean PSNR of held-out scenes through the autoencoder, in dB; 255 levels."""
    images = render(sample_scenes(count, np.random.default_rng(4242)), atlas)
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return float((10 * (4 / (decoded - images).square().mean((1, 2, 3))).log10()).mean())
