"""Images from the pocket model, in batches with shared noise, and contact sheets of them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .models import tokenize

if TYPE_CHECKING:
    from PIL.Image import Image

_TIMESTEP_SCALING, _SIGMA_DATA = 10.0, 0.5


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of a consistency model, (B, 1, 1, 1) each: as `LCMScheduler` defines them (Luo et al. 2023, sec. 4.1)."""
    scaled = t.double() * _TIMESTEP_SCALING
    total = scaled**2 + _SIGMA_DATA**2
    skip, out = _SIGMA_DATA**2 / total, scaled / total.sqrt()
    return skip.float().view(-1, 1, 1, 1), out.float().view(-1, 1, 1, 1)


def predict_clean(latents: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """x0 from x_t and eps, where `alpha` is the cumulative alpha (Song et al. 2021, eq. 12)."""
    return (latents - (1 - alpha).sqrt() * eps) / alpha.sqrt()


def start_noise(unet: Any, count: int, seed: int) -> Tensor:
    """Noise of image i does not depend on `count`."""
    side = unet.config.sample_size
    return torch.randn(count, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def embed(pipe: Any, captions: Sequence[str]) -> Tensor:
    """Prompt embeddings, (B, 77, width)."""
    return pipe.text_encoder(tokenize(pipe.tokenizer, list(captions)).to(pipe.unet.device))[0]


@torch.no_grad()
def ddim_latents(pipe: Any, captions: Sequence[str], noise: Tensor, steps: int = 20, cfg_scale: float = 3.0) -> Tensor:
    """Deterministic DDIM with classifier-free guidance, one batch; latents (B, 4, h, w) at the VAE's scale."""
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    alphas = [scheduler.alphas_cumprod[t] for t in times] + [scheduler.final_alpha_cumprod]
    context = torch.cat([embed(pipe, [""]).expand(len(noise), -1, -1), embed(pipe, captions)])
    latents = noise.to(unet.device)
    for t, alpha, alpha_next in zip(times, alphas, alphas[1:]):
        uncond, cond = unet(torch.cat([latents, latents]), t, context).sample.chunk(2)
        eps = uncond + cfg_scale * (cond - uncond)
        clean = predict_clean(latents, eps, alpha)
        latents = alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * eps
    return latents


@torch.no_grad()
def lcm_latents(pipe: Any, captions: Sequence[str], noise: Tensor, steps: int, seed: int) -> Tensor:
    """Multistep consistency sampling by the pipeline's own `LCMScheduler`, without guidance; latents (B, 4, h, w)."""
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(steps)
    context = embed(pipe, captions)
    generator = torch.Generator().manual_seed(seed)
    latents = noise.to(unet.device)
    for t in scheduler.timesteps:
        eps = unet(latents, t, context).sample
        latents = scheduler.step(eps, t, latents, generator=generator, return_dict=False)[0]
    return latents


@torch.no_grad()
def decode(vae: Any, latents: Tensor, batch: int = 32) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] on the CPU."""
    parts = [vae.decode(z / vae.config.scaling_factor).sample.clamp(-1, 1).float().cpu() for z in latents.split(batch)]
    return torch.cat(parts)


def load_pipeline(folder: pathlib.Path, student: bool = False, device: str = "cpu") -> Any:
    """The saved folder in float32; with `student` the few-step UNet and its scheduler in the place of the first ones."""
    from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    parts: dict[str, nn.Module | LCMScheduler] = {}
    if student:
        parts["unet"] = UNet2DConditionModel.from_pretrained(folder / "unet_lcm", torch_dtype=torch.float32)
        parts["scheduler"] = LCMScheduler.from_pretrained(folder / "scheduler_lcm")
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None, **parts)
    return pipe.to(device)


def contact_sheet(images: Tensor, captions: Sequence[str], columns: int = 8) -> Image:
    """Images (B, 3, H, W) in [-1, 1] in rows, each with its caption below."""
    import textwrap

    from PIL import Image, ImageDraw

    side, gap, text = images.shape[-1], 4, 58
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap), rows * (side + gap + text)), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for i, (image, caption) in enumerate(zip(pixels, captions)):
        left, top = (i % columns) * (side + gap), (i // columns) * (side + gap + text)
        sheet.paste(Image.fromarray(image), (left, top))
        draw.multiline_text((left + 1, top + side), textwrap.fill(caption, side // 6), fill="black", spacing=0)
    return sheet
