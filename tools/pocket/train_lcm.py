"""Stage `lcm`: a student that draws in one to four steps, distilled from the finished pipeline with guidance baked in."""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .latents import Batches
from .models import make_lcm_scheduler, make_scheduler, save_half
from .sampling import boundary_scalings, load_pipeline, predict_clean
from .train_unet import make_optimizers
from .training import Average, Loop, apply_gradients, cosine, processes, rank


@dataclasses.dataclass(frozen=True)
class LcmSettings:
    """Those of the bundled student, on two processes (Luo et al. 2023, Latent Consistency Models)."""

    minutes: float = 25.0
    res: int = 128
    latents: int = 5000
    batch: int = 24  # per process
    lr: float = 6e-4
    cfg_scale: float = 3.0
    grid: int = 50  # timesteps of LCMScheduler
    skip: int = (
        4  # grid steps per teacher step: 12 of its steps draw as well as 50, and a quarter of the hops learn sooner
    )
    first: float = 0.15  # extra share of the noisiest timestep, where every sampling starts
    target_decay: float = 0.95
    full: float = 0.75


class _Distiller:
    """One training pair: the student at t, and its slow average one guided teacher step further."""

    def __init__(self, pipe: Any, nothing: Tensor, settings: LcmSettings) -> None:
        self.teacher, self.nothing, self.settings = pipe.unet.eval().requires_grad_(False), nothing, settings
        self.alphas = make_scheduler().alphas_cumprod.to(pipe.unet.device)
        stride = len(self.alphas) // settings.grid
        self.times = (torch.arange(1, settings.grid + 1) * stride - 1).to(pipe.unet.device)

    def alpha(self, t: Tensor) -> Tensor:
        return self.alphas[t].view(-1, 1, 1, 1)

    def consistency(self, unet: Any, noisy: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """f(x, t) = c_skip x + c_out x0(x, t)."""
        skip, out = boundary_scalings(t)
        eps = unet(noisy, t, context).sample
        return skip * noisy + out * predict_clean(noisy, eps, self.alpha(t))

    @torch.no_grad()
    def teacher_step(self, noisy: Tensor, t: Tensor, t_next: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """One guided DDIM step; (x0, x at t_next)."""
        both = torch.cat([self.nothing.expand(len(noisy), -1, -1), context])
        uncond, cond = self.teacher(torch.cat([noisy, noisy]), torch.cat([t, t]), both).sample.chunk(2)
        eps = uncond + self.settings.cfg_scale * (cond - uncond)
        clean = predict_clean(noisy, eps, self.alpha(t))
        alpha = self.alpha(t_next)
        return clean, alpha.sqrt() * clean + (1 - alpha).sqrt() * eps

    def loss(self, student: Any, target: Any, clean: Tensor, context: Tensor) -> Tensor:
        """Pseudo-Huber distance of student and target (Song & Dhariwal 2023)."""
        rows = len(clean)
        k = torch.randint(0, len(self.times), (rows,), device=clean.device)
        k[torch.rand(rows, device=clean.device) < self.settings.first] = len(self.times) - 1
        behind = k < self.settings.skip  # the teacher steps straight to x0
        t, t_next = self.times[k], self.times[(k - self.settings.skip).clamp(min=0)]
        alpha = self.alpha(t)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn_like(clean)
        stepped, nearer = self.teacher_step(noisy, t, t_next, context)
        with torch.no_grad():
            ahead = self.consistency(target, nearer, t_next, context)
            wanted = torch.where(behind.view(-1, 1, 1, 1), stepped, ahead)
        difference = self.consistency(student, noisy, t, context) - wanted
        return (difference.square() + 1e-6).sqrt().mean()


def train_lcm(work: pathlib.Path, out: pathlib.Path, device: str, settings: LcmSettings) -> None:
    """Distil `out`/unet and write `out`/unet_lcm and `out`/scheduler_lcm."""
    pipe = load_pipeline(out, device=device)
    student = copy.deepcopy(pipe.unet).train()
    target = copy.deepcopy(pipe.unet).eval().requires_grad_(False)
    muon, adam = make_optimizers(student, settings.lr)
    average = Average(student, settings.target_decay)
    parts = {"student": student, "muon": muon, "adam": adam, "average": average}
    loop = Loop(work / "lcm.pt", settings.minutes, parts)
    torch.manual_seed(1000 * rank() + loop.step)
    average.copy_to(target)
    rng = np.random.default_rng([6, rank(), loop.step])
    batches = Batches(
        work, pipe.vae, pipe.text_encoder, pipe.tokenizer, settings.latents // processes(), settings.res, rng
    )
    distiller = _Distiller(pipe, batches.embed([""]), settings)
    for share in loop:
        clean, context = batches.draw(settings.batch, settings.full, empty=0.0)
        loss = distiller.loss(student, target, clean, context)
        apply_gradients(loss, settings.lr * cosine(share), muon, adam)
        average.update()
        average.copy_to(target)
        loop.report(loss=loss)
    if rank() == 0:
        save_half(target, out / "unet_lcm")
        make_lcm_scheduler().save_pretrained(out / "scheduler_lcm")
