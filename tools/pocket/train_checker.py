"""Stage `checker`: the network that scores caption accuracy, trained on real scenes made a little worse."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checker import HEADS, Checker, labels, score
from .scenes import render, sample_scene
from .training import Loop, apply_gradients, cosine, rank

# All four kinds of background, so that one checker serves every recipe.
_KINDS = (0.55, 0.15, 0.15, 0.15)


@dataclasses.dataclass(frozen=True)
class CheckerSettings:
    """Enough for 98 % of shapes and nearly all of the rest on real scenes."""

    minutes: float = 4.0
    batch: int = 64
    pool: int = 1280
    reuse: int = 80
    lr: float = 3e-3


def _pool(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    scenes = [sample_scene(rng, 2 if rng.random() < 0.35 else 1, _KINDS) for _ in range(count)]
    sharp = render(scenes, 64)
    return sharp, F.interpolate(F.interpolate(sharp, 24, mode="area"), 64, mode="bilinear"), labels(scenes)


def worsen(sharp: Tensor, soft: Tensor) -> Tensor:
    """Blur, noise and a colour cast: a decoder's weaknesses must not count as another attribute."""
    rows = len(sharp)
    mixed = torch.lerp(sharp, soft, 0.6 * torch.rand(rows, 1, 1, 1, device=sharp.device))
    grain = 0.06 * torch.rand(rows, 1, 1, 1, device=sharp.device) * torch.randn_like(mixed)
    return mixed + grain + 0.03 * torch.randn(rows, 3, 1, 1, device=sharp.device)


def train_checker(work: pathlib.Path, device: str, settings: CheckerSettings) -> None:
    """Train and write `work`/checker.safetensors in fp16."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = Checker().to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=1e-2)
    loop = Loop(work / "checker.pt", settings.minutes, {"net": net, "optimizer": optimizer})
    rng = np.random.default_rng([rank(), loop.step])
    for i, share in enumerate(loop):
        if i % settings.reuse == 0:
            sharp, soft, truth = _pool(rng, settings.pool)
        picks = torch.randint(0, settings.pool, (settings.batch,))
        logits = net(worsen(sharp[picks], soft[picks]).to(device))
        # a missing second object has the class -100, which cross entropy leaves out
        losses = [F.cross_entropy(logits[h], truth[h][picks].to(device), reduction="sum") for h in HEADS]
        loss = torch.stack(losses).sum() / settings.batch
        apply_gradients(loss, settings.lr * cosine(share), optimizer)
        loop.report(loss=loss)
    if rank() == 0:
        net.cpu().eval()
        scenes = [sample_scene(np.random.default_rng([7, i])) for i in range(1000)]
        loop.log(**score(net, render(scenes, 64), scenes))
        state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
        save_file(state, work / "checker.safetensors")
