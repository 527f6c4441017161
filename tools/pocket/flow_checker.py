"""Stage `flow-checker`: the network that reads pocket-flow's scenes from an image, trained on real scenes made a little worse."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .checker import Checker, agreement, load_checker, predict
from .flow_scenes import KINDS, NOUNS, Scenes, make_atlas, render, sample_scenes
from .scenes import COLOURS, PLACES, SIZES
from .train_checker import worsen
from .training import Loop, apply_gradients, cosine, rank

WEIGHTS = pathlib.Path(__file__).with_name("flow_checker.safetensors")
WIDTH = 32
# `object` is what lies there, `colour` that of a coloured shape; the numbered ones are the right or the lower object of a pair.
HEADS = {
    "background": len(COLOURS), "kind": len(KINDS), "count": 2, "object": len(NOUNS), "size": len(SIZES),
    "colour": len(COLOURS), "place": len(PLACES), "object2": len(NOUNS), "size2": len(SIZES), "colour2": len(COLOURS),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FlowCheckerSettings:
    """Settings of the CPU and of a GPU alike, but for the minutes."""

    minutes: float = 12.0
    batch: int = 64
    pool: int = 640
    reuse: int = 30
    lr: float = 3e-3


def labels(scenes: Scenes) -> dict[str, Tensor]:
    """True class per attribute, (B,) each; -100 where there is none."""
    first = [scenes.background, scenes.kind, (scenes.noun[:, 1] >= 0).long(), scenes.noun[:, 0], scenes.size[:, 0]]
    rest = [scenes.colour[:, 0], scenes.place[:, 0], scenes.noun[:, 1], scenes.size[:, 1], scenes.colour[:, 1]]
    return dict(zip(HEADS, first + rest))


def score(checker: Checker, images: Tensor, scenes: Scenes) -> dict[str, float]:
    """Share of images in which each attribute is as the scene says."""
    return agreement(labels(scenes), predict(checker, images))


def load_flow_checker(path: pathlib.Path = WEIGHTS) -> Checker:
    """A checker that `train_flow_checker` wrote; the bundled one reads every attribute of 512 rendered scenes right."""
    return load_checker(path, WIDTH, HEADS)


def _pool(rng: np.random.Generator, count: int, atlas: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    scenes = sample_scenes(count, rng, pairs=0.35)
    sharp = F.interpolate(render(scenes, atlas), 64, mode="area")
    soft = F.interpolate(F.interpolate(sharp, 24, mode="area"), 64, mode="bilinear")
    return sharp, soft, {name: truth.to(atlas.device) for name, truth in labels(scenes).items()}


def train_flow_checker(work: pathlib.Path, device: str, settings: FlowCheckerSettings) -> None:
    """Train and write `work`/flow_checker.safetensors in fp16."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = Checker(WIDTH, HEADS).to(device).train()
    atlas = make_atlas().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, weight_decay=1e-2)
    loop = Loop(work / "flow_checker.pt", settings.minutes, {"net": net, "optimizer": optimizer})
    rng = np.random.default_rng([rank(), loop.step])
    for i, share in enumerate(loop):
        if i % settings.reuse == 0:
            sharp, soft, truth = _pool(rng, settings.pool, atlas)
        picks = torch.randint(0, settings.pool, (settings.batch,), device=device)
        logits = net(worsen(sharp[picks], soft[picks]))
        losses = [F.cross_entropy(logits[h], truth[h][picks], reduction="sum") for h in HEADS]
        loss = torch.stack(losses).sum() / settings.batch
        apply_gradients(loss, settings.lr * cosine(share), optimizer)
        loop.report(loss=loss)
    if rank() == 0:
        net.cpu().eval()
        scenes = sample_scenes(512, np.random.default_rng(7))
        loop.log(**score(net, render(scenes, atlas.cpu()), scenes))
        state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
        save_file(state, work / "flow_checker.safetensors")
