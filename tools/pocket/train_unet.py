"""Stage `unet`: the diffusion model itself, on cached latents, with the text encoder frozen."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .latents import Batches
from .models import build_tokenizer, make_scheduler, make_unet, save_pipeline
from .muon import Muon
from .training import Average, Loop, apply_gradients, cosine, processes, rank


@dataclasses.dataclass(frozen=True)
class UnetSettings:
    """Those of the bundled UNet's last leg, on two processes; the minutes are for a run from nothing."""

    minutes: float = 120.0
    res: int = 128
    channels: tuple[int, ...] = (32, 64, 96)
    latents: int = 5000
    batch: int = 24  # per process
    lr: float = 1.5e-3
    ema: float = 0.998
    empty: float = 0.1  # share of empty captions, for guidance
    full: float = 0.75  # share of complete captions among the others


def timestep_density() -> Tensor:
    """Shares of the 1000 timesteps in training: fewest where the decoder forgives the error, most where shapes are decided."""
    density = torch.ones(1000)
    density[:50], density[50:150], density[150:750], density[750:] = 0.3, 0.6, 1.2, 0.8
    return density / density.sum()


def draw_timesteps(count: int, density: Tensor) -> Tensor:
    """Stratified draw: one timestep from each of `count` equal shares of the density, in random order."""
    uniform = (torch.arange(count) + torch.rand(count)) / count
    return torch.searchsorted(density.cumsum(0), uniform[torch.randperm(count)]).clamp(max=len(density) - 1)


def loss_weights(alphas: Tensor) -> Tensor:
    """Weight of the squared epsilon error that makes min(SNR + 1, 5) the weight of the squared x0 error.

    Plain epsilon weights, and min-SNR ones (Hang et al. 2023), leave the highest noise, where layout and background colour
    are decided, next to no gradient in so short a training.
    """
    snr = alphas / (1 - alphas)
    return (snr + 1).clamp(max=5) / snr


def denoising_loss(
    unet: Any, clean: Tensor, context: Tensor, alphas: Tensor, weights: Tensor, density: Tensor
) -> Tensor:
    """Weighted squared error of the predicted noise."""
    t = draw_timesteps(len(clean), density).to(clean.device)
    alpha = alphas[t].view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    eps = unet(noisy.contiguous(memory_format=torch.channels_last), t, context).sample
    return (weights[t] * (eps - noise).square().mean((1, 2, 3))).mean()


def _load_frozen(work: pathlib.Path, device: str) -> tuple[Any, Any, Any]:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    for part in ("vae", "text_encoder"):
        if not (work / part).exists():
            raise FileNotFoundError(f"Expected {work / part}, but it is not there. Run the stages vae and text first.")
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device, memory_format=torch.channels_last)
    text = CLIPTextModel.from_pretrained(work / "text_encoder").to(device)
    tokenizer = build_tokenizer(work / "tokenizer")
    return vae.eval().requires_grad_(False), text.eval().requires_grad_(False), tokenizer


def make_optimizers(unet: nn.Module, lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the inner matrices and convolutions, AdamW for the first and last layers, norms and biases."""
    outer = ("conv_in", "conv_out", "time_embedding")
    inner = [p for name, p in unet.named_parameters() if p.ndim >= 2 and not name.startswith(outer)]
    chosen = {id(p) for p in inner}
    others = [p for p in unet.parameters() if id(p) not in chosen]
    return Muon(inner, lr), torch.optim.AdamW(others, lr=lr, weight_decay=1e-3, betas=(0.9, 0.99))


def train_unet(work: pathlib.Path, out: pathlib.Path, device: str, settings: UnetSettings) -> None:
    """Train and write the pipeline folder `out`."""
    torch.manual_seed(0)  # all processes start from the same weights
    vae, text, tokenizer = _load_frozen(work, device)
    unet = make_unet(settings.channels).to(device, memory_format=torch.channels_last).train()
    muon, adam = make_optimizers(unet, settings.lr)
    average = Average(unet, settings.ema)
    parts = {"unet": unet, "muon": muon, "adam": adam, "average": average}
    loop = Loop(work / "unet.pt", settings.minutes, parts)
    torch.manual_seed(1000 * rank() + loop.step)
    rng = np.random.default_rng([2, rank(), loop.step])
    batches = Batches(work, vae, text, tokenizer, settings.latents // processes(), settings.res, rng)
    alphas = make_scheduler().alphas_cumprod.to(device)
    weights, density = loss_weights(alphas), timestep_density()
    for share in loop:
        clean, context = batches.draw(settings.batch, settings.full, settings.empty)
        loss = denoising_loss(unet, clean, context, alphas, weights, density)
        apply_gradients(loss, settings.lr * cosine(share), muon, adam)
        average.update()
        loop.report(loss=loss)
    if rank() == 0:
        average.copy_to(unet)
        save_pipeline(out, vae, text, tokenizer, unet)
