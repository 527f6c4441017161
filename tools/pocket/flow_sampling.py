"""Images from a folder of pocket-flow, for the contact sheet and the figures: plain Euler steps with classifier-free guidance."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .flow_models import SIDE, Trainer
from .flow_scenes import Scenes, caption, sample_scenes
from .models import tokenize
from .sampling import decode
from .scenes import COLOURS, PLACES, pixel_check
from .train_flow import Frozen
from .train_flow_vae import LATENT_CHANNELS


def held_out(count: int, pairs: float, objects: Sequence[str], seed: int = 4242) -> tuple[Scenes, list[str]]:
    """Scenes and complete captions that no training draws."""
    scenes = sample_scenes(count, np.random.default_rng(seed), pairs, objects=objects)
    return scenes, [caption(scenes, i) for i in range(count)]


def read_by_pixels(images: Tensor, scenes: Scenes) -> dict[str, float]:
    """Share of images of one coloured shape on a plain background with the right background, colour and place, without a network."""
    seen = pixel_check(images)
    truth = {
        "background": [COLOURS[i] for i in scenes.background],
        "colour": [COLOURS[i] for i in scenes.colour[:, 0]],
        "place": [[*PLACES][i] for i in scenes.place[:, 0]],
    }
    return {name: sum(s[name] == t for s, t in zip(seen, wanted)) / len(seen) for name, wanted in truth.items()}


def plain_shapes(count: int, seed: int = 4242) -> tuple[Scenes, list[str]]:
    """Scenes of one coloured shape on a plain background, which `read_by_pixels` can read, with complete captions."""
    scenes = sample_scenes(8 * count, np.random.default_rng(seed), pairs=0.0, shapes=1.0)
    chosen = scenes[(scenes.kind == 0).nonzero()[:count, 0]]
    return chosen, [caption(chosen, i) for i in range(len(chosen))]


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels from 1 to 0, (steps + 1,): evenly spaced, then shifted (Esser et al. 2024, eq. 23)."""
    sigmas = torch.linspace(1, 0, steps + 1)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@torch.no_grad()
def euler_latents(
    net: nn.Module, context: Tensor, empty: Tensor, noise: Tensor, sigmas: Tensor, cfg_scale: float
) -> Tensor:
    """Latents (B, C, h, w) from `noise` for text (B, L, D); `empty` (1, L, D) is the text that guidance leads away from."""
    x, text = noise, torch.cat([empty.expand(len(noise), -1, -1), context])
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        times = (1 - sigma).expand(2 * len(x)).to(x.device)
        uncond, cond = net(torch.cat([x, x]), times, text).chunk(2)
        x = x + (sigma - sigma_next) * (uncond + cfg_scale * (cond - uncond))
    return x


class FlowPipeline:
    """The networks of a folder in float32."""

    def __init__(self, folder: pathlib.Path, device: str = "cpu") -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel

        self.parts, self.device = Frozen(folder, device), device
        for part in (self.parts.vae, self.parts.text):
            part.float()
        model = Lumina2Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        self.net = Trainer(model.eval()).to(device)
        self.shift: float = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift

    @torch.no_grad()
    def embed(self, captions: list[str]) -> Tensor:
        context: Any = self.parts.text(tokenize(self.parts.tokenizer, captions).to(self.device))
        return context[0]

    @torch.no_grad()
    def rebuilt(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) through the autoencoder."""
        vae = self.parts.vae
        parts = [
            vae.decode(vae.encode(part.to(self.device)).latent_dist.mean).sample.cpu() for part in images.split(32)
        ]
        return torch.cat(parts)

    def draw(
        self, captions: list[str], steps: int = 20, cfg_scale: float = 3.0, seed: int = 1, batch: int = 32
    ) -> Tensor:
        """One image per caption, (B, 3, 128, 128) in [-1, 1]; the noise of an image does not depend on their number."""
        shape = (len(captions), LATENT_CHANNELS, SIDE, SIDE)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        sigmas, empty = shifted_sigmas(steps, self.shift), self.embed([""])
        parts = []
        for i in range(0, len(captions), batch):
            context = self.embed(captions[i : i + batch])
            parts.append(euler_latents(self.net, context, empty, noise[i : i + batch], sigmas, cfg_scale))
        return decode(self.parts.vae, torch.cat(parts))
