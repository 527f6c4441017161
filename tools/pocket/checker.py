"""A small network that reads a scene's attributes from an image: the measure of caption accuracy, a test asset only."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import COLOURS, KINDS, PLACES, SHAPES, Scene

WEIGHTS = pathlib.Path(__file__).with_name("checker.safetensors")
# Attribute -> number of classes. Pairs are read left to right or top to bottom; `place` is the first object's.
HEADS: dict[str, int] = {
    "background": 8,
    "kind": 4,
    "count": 2,
    "colour": 8,
    "shape": 6,
    "size": 2,
    "place": 5,
    "colour2": 8,
    "shape2": 6,
    "size2": 2,
}
_UNSAID = -100


class Checker(nn.Module):
    """Images (B, 3, H, W) in [-1, 1], reduced to 64x64 -> logits per attribute; `classes` says how many there are of each."""

    def __init__(self, width: int = 24, classes: Mapping[str, int] = HEADS) -> None:
        super().__init__()
        plan = [(3, 1, 2), (1, 1, 1), (1, 2, 2), (2, 2, 1), (2, 3, 2), (3, 4, 2)]
        blocks = [self._block(a if i == 0 else a * width, b * width, stride) for i, (a, b, stride) in enumerate(plan)]
        self.net = nn.Sequential(*blocks)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, count) for name, count in classes.items()})

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    def features(self, images: Tensor) -> Tensor:
        """The 128 activations before the heads, for distances between sets of images."""
        if images.shape[-2:] != (64, 64):
            images = F.interpolate(images, 64, mode="area")
        return self.fc(self.net(images))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        h = self.features(images)
        return {name: head(h) for name, head in self.heads.items()}


def load_checker(path: str | pathlib.Path = WEIGHTS, width: int = 24, classes: Mapping[str, int] = HEADS) -> Checker:
    """The trained checker in float32, ready to measure."""
    from safetensors.torch import load_file

    checker = Checker(width, classes)
    checker.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return checker.eval().requires_grad_(False)


def labels(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """True class per attribute, (B,) each; -100 where a scene has no second object."""
    rows = []
    for scene in scenes:
        row = [COLOURS.index(scene.background), KINDS.index(scene.kind), len(scene.items) - 1]
        for i in range(2):
            item = scene.items[i] if i < len(scene.items) else None
            seen = (
                [COLOURS.index(item.colour), SHAPES.index(item.shape), int(item.size == "large")]
                if item
                else [-100] * 3
            )
            place = [list(PLACES).index(scene.items[0].place)] if i == 0 else []
            row += seen + place
        rows.append(row)
    return dict(zip(HEADS, torch.tensor(rows).T))


@torch.no_grad()
def predict(checker: Checker, images: Tensor) -> dict[str, Tensor]:
    """Most likely class per attribute, (B,) each."""
    device = next(checker.parameters()).device
    outs = [checker(part.to(device)) for part in images.float().clamp(-1, 1).split(256)]
    return {name: torch.cat([o[name] for o in outs]).argmax(1).cpu() for name in outs[0]}


def score(checker: Checker, images: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of images in which each attribute is as the scene says; `all` asks for every attribute at once."""
    return agreement(labels(scenes), predict(checker, images))


def agreement(truth: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of rows in which each attribute is seen as it is; `all` asks for every attribute at once. Class -100 is not asked for."""
    right = torch.ones(len(next(iter(truth.values()))), dtype=torch.bool)
    result = {}
    for name in truth:
        asked = truth[name] != _UNSAID
        hit = seen[name] == truth[name]
        right &= hit | ~asked
        if asked.any():
            result[name] = hit[asked].float().mean().item()
    return {**result, "all": right.float().mean().item()}


@torch.no_grad()
def features(checker: Checker, images: Tensor) -> Tensor:
    """Checker activations of images (B, 3, H, W), (B, 128): standardise with a real set's mean and deviation before use."""
    device = next(checker.parameters()).device
    return torch.cat([checker.features(part.to(device)).cpu() for part in images.float().clamp(-1, 1).split(256)])
